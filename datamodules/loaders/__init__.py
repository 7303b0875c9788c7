"""Loaders whose tensors lie on the training device."""
