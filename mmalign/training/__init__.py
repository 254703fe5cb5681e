"""Training loop, checkpoints, optimizers, reports and export."""
