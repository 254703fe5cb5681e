"""Evaluation and preparation of vision-language models."""
