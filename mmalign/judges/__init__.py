"""Judges that are models of a family; `mmalign.rewards` loads them by name, as it does its own."""
