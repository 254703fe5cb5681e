"""Caches on disk, keyed by content."""
