"""Adapters over diffusers' pipelines, one file each."""
