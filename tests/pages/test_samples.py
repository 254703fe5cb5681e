"""Page of a run's samples: newest first, one file that runs and fetches nothing, and reloads until the run is over."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.pages.samples import RELOAD_SECONDS, SampleHistory, decode_image, encode_output, render_samples
from tests.helpers.chromium import rendered
from tests.helpers.page_reader import Page, digest, visible

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def page(folder: Path, history: SampleHistory, titles: list[str], *, are_texts: bool, is_over: bool = False) -> Page:
    images = [PICTURE] * len(titles) if are_texts else []
    path = folder / "samples.html"
    path.write_text(
        render_samples("t", titles, images, history, are_texts=are_texts, steps=1000, is_over=is_over), encoding="utf-8"
    )
    return Page(path)


def test_small_images_are_kept_exactly() -> None:
    assert np.array_equal(np.asarray(decode_image(encode_output(PICTURE))), np.asarray(PICTURE))
    assert encode_output("an answer") == "an answer"


def test_the_newest_update_follows_the_base(tmp_path: Path) -> None:
    """By number, not by name, and whatever the order of the record."""
    history = SampleHistory({}, ["zero"], {9: ["nine"], 100: ["hundred"], 20: ["twenty"]})
    read = page(tmp_path, history, ["q"], are_texts=True)
    quoted = [visible(text) for text in re.findall("<blockquote.*?</blockquote>", read.text)]
    assert quoted == ["zero", "hundred", "twenty", "nine"]
    assert "100 of 1,000 updates" in read.text


@pytest.mark.parametrize("is_over", [False, True])
def test_the_page_reloads_until_the_run_is_over(is_over: bool, tmp_path: Path) -> None:
    uri = encode_output(PICTURE)
    read = page(tmp_path, SampleHistory({}, [], {3: [uri]}), ["p"], are_texts=False, is_over=is_over)
    assert read.values("meta", "http-equiv") == ["Content-Security-Policy", "refresh"][: 2 - is_over]
    assert is_over or str(RELOAD_SECONDS) in read.values("meta", "content")
    (style,) = re.findall("<style>(.*?)</style>", read.text, re.DOTALL)
    policy = next(content for content in read.values("meta", "content") if "default-src" in content)
    assert digest(style) in policy and "script-src" not in policy
    assert read.values("img", "src") == [uri]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in read.tags}


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    read = page(tmp_path, SampleHistory({}, [hostile], {1: [""]}), [hostile], are_texts=True)
    assert [tag for tag, _ in read.tags if tag in ("script", "img")] == ["img"]  # the question's image
    assert "(empty)" in read.text


@pytest.mark.slow
def test_a_browser_shows_the_page_without_complaints(tmp_path: Path) -> None:
    read = page(tmp_path, SampleHistory({}, [], {1: [encode_output(PICTURE)]}), ["p"], are_texts=False)
    document, complaints = rendered(tmp_path / "samples.html", tmp_path / "profile")
    assert not complaints and "update 1" in document and read.tags
