"""Methods for text-to-image models, one file per paper."""
