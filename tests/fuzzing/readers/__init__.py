"""Readers of files that others wrote, one module for each kind of file."""
