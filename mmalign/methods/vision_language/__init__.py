"""Methods for vision-language models, one file per paper."""
