"""The run folder: configuration, checkpoints, metrics, W&B, and how a run ends."""
