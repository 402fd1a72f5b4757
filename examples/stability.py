"""The largest stable learning rate on quadratics, with and without extrapolation. Run: python examples/stability.py

A mode of curvature λ ≤ 1 follows a linear recurrence of (x, v, g, previous x), with momentum v and the gradient
g = λ y at the extrapolated point y. It is stable if no eigenvalue exceeds 1 in absolute value. Batches are full, so
that local and global directions are equal. Adam's rates are those of the heavy ball divided by 1 − β₁.
"""

from __future__ import annotations

import numpy as np

CURVATURES = np.linspace(0.01, 1, 60)
RATES = np.geomspace(0.02, 13, 300)
LOOKS = {
    "fresh gradient, η = c / λ_max": ("fresh", (0.1, 0.3, 0.5, 0.8)),
    "past gradient, η = c / λ_max": ("past", (0.05, 0.1, 0.3, 0.5)),
    "last step, times c": ("update", (0.1, 0.5, 0.9)),
}
BASES = {"no momentum": (0.0, False), "Nesterov 0.9": (0.9, True), "heavy ball 0.9, Adam": (0.9, False)}


def recurrence(rate: float, curvature: float, momentum: float, nesterov: bool, look: str, c: float) -> np.ndarray:
    """The matrix, (4, 4), of one step of one mode."""
    x, v, g, before = np.eye(4)
    y = {"fresh": x - c * curvature * x, "past": x - c * g, "update": x + c * (x - before)}[look]
    gradient = curvature * y
    velocity = momentum * v + gradient
    step = gradient + momentum * velocity if nesterov else velocity
    return np.array([x - rate * step, velocity, gradient, x])


def largest_stable_rate(momentum: float, nesterov: bool, look: str, c: float) -> float:
    """The largest of `RATES` below the first one at which a mode is unstable; 0 if there is none."""
    largest = 0.0
    for rate in RATES:
        modes = [recurrence(rate, curvature, momentum, nesterov, look, c) for curvature in CURVATURES]
        if np.abs(np.linalg.eigvals(np.stack(modes))).max() > 1 + 1e-9:
            break
        largest = float(rate)
    return largest


def main() -> None:
    """Print the largest stable rate of each base optimizer, and the factor of each extrapolation."""
    for base, (momentum, nesterov) in BASES.items():
        alone = largest_stable_rate(momentum, nesterov, "fresh", 0.0)
        print(f"{base}: stable up to a rate of {alone:.2f} / λ_max; factors:")
        for name, (look, shares) in LOOKS.items():
            factors = [largest_stable_rate(momentum, nesterov, look, c) / alone for c in shares]
            print(f"    {name:<30}" + "".join(f"  c {c:g}: {f:.2f}" for c, f in zip(shares, factors, strict=True)))


if __name__ == "__main__":
    main()
