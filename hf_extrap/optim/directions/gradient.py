"""A fresh gradient at x."""

from __future__ import annotations

from .base import Direction


class FreshGradient(Direction):
    """∇f_k(x; ξ'), taken at the start of every step by a backward pass at x (extragradient, SAM).

    Source: Korpelevich 1976; per worker, Lin et al. 2020; with `ascent`, Foret et al. 2021.
    """

    is_fresh = True
