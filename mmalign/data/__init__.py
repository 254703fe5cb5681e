"""Preference data: sources, images, caches, batches, and the bundled world."""
