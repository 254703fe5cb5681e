"""Content policy of the pages: their own style and script run, and nothing that a caption or an answer brings."""

import re
from pathlib import Path

import pytest
from PIL import Image

from mmalign.evaluation.benchmarks.base import RatedAnswer
from mmalign.pages import answers, pictures
from mmalign.pages.page import GalleryEntry, PageLayout, write_page
from tests.helpers.chromium import rendered
from tests.helpers.page_reader import Page, digest

RUN = "document.documentElement.dataset.run=1"
HOSTILE = (
    f"</h3></style></script><script>{RUN}</script>",
    f"\"' onclick=\"{RUN}\" style='color:red' x=`",
    f'<img src=x onerror="{RUN}"><svg onload="{RUN}"><a href="javascript:{RUN}">a</a></svg>',
    "<meta http-equiv=refresh content='0;url=http://example.org'><base href=http://example.org><iframe srcdoc=x>",
    "\u202egnp.exe\u2066 {{ 7 * 7 }} ]]> &lt;script&gt; --><!-- 中 😀",
    "x" * 10_000,
)
INJECTED = f"<script>{RUN}</script><img src=x onerror='{RUN}'><p style='color: red' onclick='{RUN}'>p</p>"
UNTOUCHED = '<html lang="en">'  # a run script would add data-run
IMAGES = (Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue"))


def picture(text: str, number: int) -> GalleryEntry:
    return pictures.picture_entry(text, number, IMAGES, (number % 2, 0.5), (text, text))


def answer(text: str, number: int) -> GalleryEntry:
    rated = [RatedAnswer(text, score, text, ((0, 1),)) for score in (number % 2, 0.5)]
    return answers.answer_entry(IMAGES[0], text, text, text, *rated)


KINDS = [(pictures.LAYOUT, picture), (answers.LAYOUT, answer)]
NAMES = ["pictures", "answers"]


def write(folder: Path, layout: PageLayout, entry: object) -> Path:
    assert callable(entry)
    entries = [entry(text, number) for number, text in enumerate(HOSTILE)]
    text = " ".join(HOSTILE[:5])
    summary = [[text] * 3, [text] * 3]
    return write_page(
        folder, entries, layout, title=text, summary=summary, score_name=text, provenance={"model": text, text: text}
    )


@pytest.mark.parametrize(("layout", "entry"), KINDS, ids=NAMES)
def test_policy_names_the_page_s_own_style_and_script_alone(layout: PageLayout, entry: object, tmp_path: Path) -> None:
    page = Page(write(tmp_path, layout, entry))
    (policy,) = (values["content"] for _, values in page.tags if "http-equiv" in values)
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    inline = {tag: re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL) for tag in ("style", "script")}
    assert rules == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "img-src": "data:",
        "style-src": digest(*inline["style"]),
        "script-src": digest(*inline["script"]),
    }
    assert ".share" in inline["style"][0] and "--card" in inline["style"][0]
    names = {name for _, values in page.tags for name in values}
    assert "style" not in names and not [name for name in names if name.startswith("on")]
    # The policy precedes all that it governs
    assert page.text.index(str(policy)[:20]) < page.text.index("<style>") < page.text.index("<script>")


@pytest.mark.parametrize(("layout", "entry"), KINDS, ids=NAMES)
def test_browser_runs_the_page_and_shows_hostile_texts(layout: PageLayout, entry: object, tmp_path: Path) -> None:
    path = write(tmp_path / "page", layout, entry)
    document, complaints = rendered(path, tmp_path / "profile")
    assert complaints == []
    assert UNTOUCHED in document
    assert 'aria-label="change the colour theme"' in document  # the page's own script has run
    (tmp_path / "seen.html").write_text(document, encoding="utf-8")
    seen, source = Page(tmp_path / "seen.html"), Page(path)
    assert sorted(str(title) for _, title in seen.cards) == sorted(HOSTILE)
    assert [tag for tag, _ in seen.tags if tag != "tbody"] == [tag for tag, _ in source.tags if tag != "tbody"]


def test_browser_refuses_injected_markup(tmp_path: Path) -> None:
    """Had a caption escaped, the policy would still refuse its script, its handlers and its style."""
    path = write(tmp_path / "page", *KINDS[0])
    page = path.read_text(encoding="utf-8").replace('<main class="wrap">', f'<main class="wrap">{INJECTED}')
    path.write_text(page, encoding="utf-8")
    document, complaints = rendered(path, tmp_path / "profile")
    assert UNTOUCHED in document and len(complaints) >= 3
    path.write_text(re.sub("<meta http-equiv[^>]*>", "", page), encoding="utf-8")
    document, complaints = rendered(path, tmp_path / "profile")
    assert UNTOUCHED not in document and complaints == []
