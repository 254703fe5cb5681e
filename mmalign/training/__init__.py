"""The training loop and its parts: checkpoints, optimizers, reports, export."""
