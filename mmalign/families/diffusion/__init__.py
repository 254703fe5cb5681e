"""Adapters of diffusers' pipelines, one file per text-to-image family."""
