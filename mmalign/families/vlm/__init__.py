"""The adapter over transformers' vision-language models."""
