"""Bundled synthetic worlds, scenes and crowds, with exact ground truth."""
