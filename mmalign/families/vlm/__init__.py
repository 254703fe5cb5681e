"""Adapter for the vision-language models of transformers."""
