"""Galleries of samples before and after alignment, regressions as easy to find as gains."""
