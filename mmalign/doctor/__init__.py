"""Checks of preference data before training, and reports of their findings."""
