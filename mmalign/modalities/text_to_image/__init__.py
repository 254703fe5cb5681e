"""Text-to-image: data, evaluation and preparation."""
