"""Folders of evaluations, as the commands gallery and compare read them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.commands.load_recipe import load_recipe
from mmalign.modalities import text_to_image, vision_language
from mmalign.modalities.vision_language.benchmark import read_benchmark
from tests.fuzzing.readers.recipes import SECTIONS
from tests.fuzzing.readers.rows import in_lines
from tests.fuzzing.rule import Files, Reader
from tests.helpers.data_files import png

RECIPES: dict[str, dict[str, Any]] = {
    "images": {
        "method": {"name": "diffusion_dpo"},
        **SECTIONS,
        "evaluate": {"benchmark": "scenes"},
    },
    "answers": {
        "method": {"name": "dpo"},
        **SECTIONS,
        "evaluate": {"benchmark": "crowds", "num_images": 2},
    },
}
MODALITIES = {"images": text_to_image.MODALITY, "answers": vision_language.MODALITY}
SCENE = {"score": 1.0, "note": "correct", "parts": {"shape": True, "correct": True}}
JUDGED = {"score": 0.5, "note": "", "judged": 0.5, "apart": 0.1}
ANSWER = {"text": "a dog", "score": 1.0, "note": "right", "invented": [[2, 5]]}


def image_files(side: dict[str, Any]) -> Files:
    samples = [
        {"prompt": prompt, "seed": 3, "before": side, "after": side} for prompt in ("a red circle", "a blue square")
    ]
    content = {"of": {"a": 1}, "score": "s", "table": [["", "x"], ["a", "b"]], "samples": samples}
    images = {f"evaluation/{name}/0000{number}.png": png(1) for name in ("before", "after") for number in range(2)}
    return {"evaluation/samples.json": json.dumps(content).encode(), **images}


def answer_files() -> Files:
    section: Any = load_recipe(RECIPES["answers"]).evaluate
    parts = read_benchmark(section).parts
    samples = [
        {"part": part, "image": item.question.image, "question": "?", "truth": "", "before": ANSWER, "after": ANSWER}
        for part, items in parts.items()
        for item in items
    ]
    content = {"of": {}, "score": "s", "table": [["a"]], "samples": samples}
    answers = {
        f"evaluation/{side}/{part}.jsonl": in_lines([{"question_id": one.question.id, "text": ""} for one in items])
        for side in ("before", "after")
        for part, items in parts.items()
    }
    return {"evaluation/samples.json": json.dumps(content).encode(), **answers}


def read(kind: str, folder: Path) -> None:
    recipe, parts = load_recipe({**RECIPES[kind], "output": str(folder)}), MODALITIES[kind].samples
    assert parts is not None
    content = parts.read(folder / "evaluation")
    parts.entries(recipe, folder / "evaluation", list(enumerate(content["samples"])))
    _ = [sample["after"]["score"] - sample["before"]["score"] for sample in content["samples"]]
    for metrics in parts.metrics(recipe):
        _ = [some.as_dict() for some in metrics]


READERS = (
    Reader(
        "samples of images",
        partial(read, "images"),
        (image_files(SCENE), image_files(JUDGED)),
        share=40,
        places=("an interval needs two",),
    ),
    Reader("samples of answers", partial(read, "answers"), (answer_files(),), share=20, places=("evaluation/",)),
)
