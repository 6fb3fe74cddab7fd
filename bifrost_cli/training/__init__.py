"""The one training loop, its checkpoints, order and records."""
