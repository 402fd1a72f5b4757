"""Extrapolation inside the Trainer of transformers."""
