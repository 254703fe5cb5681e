"""Thin adapters over diffusers' pipelines and transformers' vision-language models."""
