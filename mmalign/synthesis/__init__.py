"""Generation of preference pairs."""
