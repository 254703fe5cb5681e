"""Tensor mathematics of diffusion, without models."""
