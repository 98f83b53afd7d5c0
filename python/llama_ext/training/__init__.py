"""Training: data, the loop, optimisers' options, checkpoints."""
