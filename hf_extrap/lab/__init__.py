"""Studies and measurements of this package, not part of its programming interface."""
