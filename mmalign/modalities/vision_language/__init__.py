"""Checks, data, evaluation and preparation of vision-language models."""

from __future__ import annotations

from mmalign.modalities import Modality, Samples
from mmalign.modalities.vision_language import (
    benchmark,
    check,
    data,
    doctor,
    evaluate,
    gallery,
    model,
    plan,
    prepare,
    previews,
    show,
)
from mmalign.pages import answers

MODALITY = Modality(
    check_evaluation=check.check_evaluation,
    check_preparation=check.check_preparation,
    loading_hint=model.loading_hint,
    loaded_by="transformers",
    pipeline_tag="image-text-to-text",
    check_data=check.check_data,
    check_model=model.check_model,
    load_family=model.load_family,
    model_dependencies=model.prompt_dependencies,
    open_pairs=data.open_pairs,
    build_data_module=data.build_data_module,
    encode_example=plan.encode_example,
    show=show.show,
    check_samples=previews.check_samples,
    open_previews=previews.open_previews,
    open_benchmark=evaluate.open_benchmark,
    score_files=benchmark.score_files,
    doctor_inputs=doctor.doctor_inputs,
    samples=Samples(
        unavailable_reason=gallery.unavailable_reason,
        layout=answers.LAYOUT,
        read=gallery.read,
        entries=gallery.gallery_entries,
        provenance=gallery.provenance,
        metrics=evaluate.read_metrics,
        best_of=evaluate.read_best,
        outputs="answers",
        benchmark_of=gallery.benchmark_of,
    ),
    prepare=prepare.prepare,
    example_evaluation="{benchmark: crowds, num_images: 256}",
    example_preparation="for example {kind: povid, source: {path: answers.jsonl}}",
)
