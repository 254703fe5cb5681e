"""Preference data: formats, images, caches and loaders."""
