"""Checkpoints, which are whole or not there: saving, manifest, finding and verifying one, and its contents."""
