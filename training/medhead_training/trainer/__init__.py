"""The training loop: options, optimiser, checkpoints, reports."""
