"""A local page with the curves of finished and running runs."""
