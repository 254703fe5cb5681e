"""Benchmarks of generated images and answers, one file each."""
