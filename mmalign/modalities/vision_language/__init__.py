"""Vision-language: data, evaluation and preparation."""
