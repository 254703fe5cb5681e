"""The command `show`: what is printed and drawn is what training reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.show import show
from mmalign.families.loading import load_processor
from mmalign.modalities.vision_language.doctor import doctor_inputs
from tests.helpers import Folders, data_files
from tests.helpers.runs import pictures, responses


def test_scored_tokens_are_the_answer_and_its_end(vlm_folders: Folders, tmp_path: Path) -> None:
    model = vlm_folders("llava")
    content = responses(model, tmp_path, "out")
    view = show(load_recipe(content), number=2, html=tmp_path / "page.html")
    tokenizer = load_processor(str(model)).processor.tokenizer  # type: ignore[attr-defined]
    assert len(view.examples) == 2
    for example in view.examples:
        chosen, rejected = example.sides
        scored = "".join(span.text for span in chosen.text if span.scored)
        assert scored.strip().startswith("There is a ") and scored.endswith(tokenizer.eos_token)
        assert "USER" in "".join(span.text for span in chosen.text if not span.scored)
        assert chosen.note.endswith(f", {sum(span.scored for span in chosen.text)} scored")
        assert chosen.images is not None and len(chosen.images) == 1
        assert scored != "".join(span.text for span in rejected.text if span.scored)
    lines = list(view.lines())
    assert any(line.startswith("    |") and line.endswith(f"|{tokenizer.eos_token}|") for line in lines)
    assert any(line.startswith("tokens of a chosen response, of 8 pairs:") for line in lines)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article") == 2 and "<script" not in page and "<mark>" in page


def test_pictures_are_those_of_the_loader(tiny_sd15: Path, tmp_path: Path) -> None:
    content = pictures(tiny_sd15, tmp_path, "out", data={"resolution": "24x16", "flip": True})
    view = show(load_recipe(content), number=3)
    for example in view.examples:
        assert [side.name for side in example.sides] == ["chosen", "rejected"]
        for side in example.sides:
            assert side.images is not None
            (image,) = side.images.values()
            assert image.size == (24, 16) and side.note.startswith("24x16 from ")
            assert np.asarray(image).std() > 0
    assert any(fact.startswith("crops cut 33.3% of an image's area on average") for fact in view.facts)
    assert any("exceed the text encoder's limit" in fact for fact in view.facts)
    assert not (tmp_path / "out").exists()


def test_the_first_thumbs_are_those_of_a_balanced_epoch(tiny_sd15: Path, tmp_path: Path) -> None:
    """One of six is liked; 80 % of an epoch are."""
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(data_files.png(number, 16))
    rows = [{"prompt": "a", "image": f"{number}.png", "label": number == 0} for number in range(6)]
    (tmp_path / "thumbs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"format": "thumbs", "path": str(tmp_path / "thumbs.jsonl")}
    method = {"name": "diffusion_kto", "liked_share": 0.8}
    view = show(load_recipe(pictures(tiny_sd15, tmp_path, "out", data=data, method=method)), number=6)
    sides = [example.sides[0].name for example in view.examples]
    assert sides.count("liked") == 5 and sides.count("disliked") == 1


def test_dropped_rows_are_named_by_the_commonest_reason(tmp_path: Path, tiny_sd15: Path) -> None:
    rows = [{"prompt": f"<b>{n}</b>", "chosen": f"{n}.png", "rejected": "gone.png"} for n in range(3)]
    rows.append({"prompt": "<script>alert(1)</script>", "chosen": "a.png", "rejected": "b.png"})
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(data_files.png(ord(name), 16))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = pictures(tiny_sd15, tmp_path, "out", data={"format": "folder", "path": str(tmp_path / "pairs.jsonl")})
    view = show(load_recipe(content), html=tmp_path / "page.html")
    (dropped,) = (fact for fact in view.facts if fact.startswith("dropped: "))
    assert dropped.startswith("dropped: 3 rows like ") and "pairs.jsonl: line 1" in dropped
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


def test_unreadable_image_is_shown_as_skipped(tmp_path: Path, tiny_sd15: Path) -> None:
    data_files.pick_a_pic(tmp_path / "pairs.parquet", 2, bad={1: b"no image"})
    view = show(load_recipe(pictures(tiny_sd15, tmp_path, "out")))
    (skipped,) = (example for example in view.examples if example.skipped)
    assert not skipped.sides and "no known format" in skipped.skipped[0]


def test_prompts_alone_are_listed(tiny_sd15: Path, tiny_clip: Path, tmp_path: Path) -> None:
    method = {"name": "spo", "reward": {"path": str(tiny_clip)}}
    view = show(load_recipe(pictures(tiny_sd15, tmp_path, "out", method=method)), number=1)
    assert [example.sides for example in view.examples] == [()]
    assert view.examples[0].title.startswith("thing number ")


def test_prompts_without_room_for_an_answer_are_shown_as_skipped(vlm_folders: Folders, tmp_path: Path) -> None:
    """Training skips them, and the doctor checks against the same limit."""
    reward = {"name": "function", "path": "tests.helpers.judging:letters"}
    method = {"name": "grpo", "reward": reward, "generation": {"answers": 2, "max_new_tokens": 9}}
    content = responses(vlm_folders("llava"), tmp_path, "out", method=method)
    sides = [side for example in show(load_recipe(content), number=8).examples for side in example.sides]
    longest = max(int(side.note.split(" tokens")[0]) for side in sides)
    enough, scarce = (load_recipe(content, [f"data.max_length={longest + number}"]) for number in (10, 9))
    assert not any(example.skipped for example in show(enough, number=8).examples)
    assert any(example.skipped for example in show(scarce, number=8).examples)
    tokens: Any = doctor_inputs(scarce).tokens
    assert tokens.max_length == longest


def test_models_of_the_project_are_known_in_any_folder(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = pictures(tiny_sd15, tmp_path, "out", model={"path": "models/tiny_sd"})
    monkeypatch.chdir(tmp_path)
    assert show(load_recipe(content), number=1).examples


def test_a_single_file_is_shown_by_its_configuration(tiny_sd15: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    content = pictures(tiny_sd15, tmp_path, "out")
    single = load_recipe(content, [f"model.path={file}", f"model.config={tiny_sd15}"])
    assert list(show(single).lines()) == list(show(load_recipe(content)).lines())


@pytest.mark.parametrize("number", [0, 99])
def test_number_of_examples(number: int, vlm_folders: Folders, tmp_path: Path) -> None:
    view = show(load_recipe(responses(vlm_folders("llava"), tmp_path, "out")), number=number)
    assert len(view.examples) == min(number, 8)
