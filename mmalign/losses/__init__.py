"""Losses as pure functions of scores."""
