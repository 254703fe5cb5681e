"""Deterministic, resumable loaders of batches."""
