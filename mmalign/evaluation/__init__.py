"""Metrics of generated images and answers, one file for each benchmark, with confidence intervals."""
