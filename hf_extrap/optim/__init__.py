"""The optimizer wrapper: PyTorch alone, for any training loop."""
