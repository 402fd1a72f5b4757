"""Curvature of a model's mean loss: Hessian-vector products and the largest eigenvalue."""
