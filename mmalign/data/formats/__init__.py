"""File formats and layouts of preference data."""
