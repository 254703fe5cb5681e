"""Data, evaluation and preparation of each modality: text-to-image, vision-language and the step judge."""
