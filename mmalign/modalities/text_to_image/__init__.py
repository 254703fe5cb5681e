"""Data, evaluation and preparation of text-to-image models."""
