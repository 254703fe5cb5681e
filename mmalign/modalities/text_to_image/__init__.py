"""Checks, data, evaluation and preparation of text-to-image models."""

from __future__ import annotations

from mmalign.modalities import Modality, Samples
from mmalign.modalities.text_to_image import (
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
from mmalign.pages import pictures

MODALITY = Modality(
    check=check.check,
    check_evaluation=check.check_evaluation,
    check_preparation=check.check_preparation,
    loading_hint=model.loading_hint,
    loaded_by="diffusers",
    pipeline_tag="text-to-image",
    check_data=check.check_data,
    check_model=model.check_model,
    load_family=model.load_family,
    model_dependencies=lambda _, family: model.frozen_parts(family),
    open_pairs=data.open_pairs,
    build_data_module=data.build_data_module,
    encode_example=plan.encode_example,
    show=show.show,
    check_samples=previews.check_samples,
    open_previews=previews.open_previews,
    open_benchmark=evaluate.open_benchmark,
    doctor_inputs=doctor.doctor_inputs,
    samples=Samples(
        unavailable_reason=gallery.unavailable_reason,
        layout=pictures.LAYOUT,
        read=gallery.read,
        entries=gallery.gallery_entries,
        provenance=gallery.provenance,
        metrics=gallery.read_metrics,
        best_of=gallery.read_best,
        outputs="drawings",
        write_images=gallery.write_images,
    ),
    prepare=prepare.prepare,
    example_evaluation="{benchmark: scenes, prompts: 256}",
    example_preparation="configs/text_to_image/quickstart.yaml has one with a reward model",
)
