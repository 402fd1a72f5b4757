"""What local and averaged gradients tell for nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class GradientNoiseScale:
    """The batch size, in the units of `small_batch`, up to which a larger batch still pays: B = tr(Σ) / ‖G‖².

    Gradients at two batch sizes give unbiased estimates of both parts; each is smoothed over the measurements, since
    their quotient is not unbiased.

    Source: McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1.

    Attributes:
        smoothing: weight of the past in the moving averages.
    """

    smoothing: float = 0.9
    _noise: float = 0.0
    _signal: float = 0.0
    _weight: float = 0.0

    def update(self, small_square: float, large_square: float, small_batch: float, large_batch: float) -> None:
        """Take one measurement.

        Args:
            small_square: mean of ‖g‖² over the workers' gradients.
            large_square: ‖ḡ‖² of their average.
            small_batch: samples of one worker.
            large_batch: samples of all workers, more than `small_batch`.
        """
        signal = (large_batch * large_square - small_batch * small_square) / (large_batch - small_batch)
        noise = (small_square - large_square) / (1 / small_batch - 1 / large_batch)
        self._signal = self.smoothing * self._signal + (1 - self.smoothing) * signal
        self._noise = self.smoothing * self._noise + (1 - self.smoothing) * noise
        self._weight = self.smoothing * self._weight + (1 - self.smoothing)

    @property
    def value(self) -> float:
        """B; NaN before the first measurement, infinite where no signal can be told from the noise."""
        if not self._weight:
            return math.nan
        return self._noise / self._signal if self._signal > 0 else math.inf

    def state(self) -> dict[str, float]:
        """The moving averages, for a checkpoint."""
        return {"noise": self._noise, "signal": self._signal, "weight": self._weight}

    def load_state(self, state: dict[str, float]) -> None:
        """The inverse of `state`."""
        self._noise, self._signal, self._weight = state["noise"], state["signal"], state["weight"]
