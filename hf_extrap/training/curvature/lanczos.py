"""The largest eigenvalue of a symmetric matrix known by its products with vectors: Lanczos, by ARPACK."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..extras import extra
from .mean_loss import CurvatureError


@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue and its vector.

    Attributes:
        value: the eigenvalue.
        vector: (n,), of length 1, on the device of the products.
        products: how many matrix-vector products were computed.
        residual: ‖A v − λ v‖ / |λ|; some eigenvalue lies within this share of `value`.
    """

    value: float
    vector: Tensor
    products: int
    residual: float


def largest_eigenpair(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    *,
    tolerance: float = 1e-2,
    subspace: int = 10,
    restarts: int = 30,
    seed: int = 0,
) -> Eigenpair:
    """The algebraically largest eigenvalue of a symmetric matrix A.

    Implicitly restarted Lanczos (Sorensen 1992) from a random vector of its own seed, so that no other random number
    changes.

    Args:
        product: v → A v for vectors (n,).
        like: (n,), n ≥ 2: the device and type of the vectors, float32 or float64.
        tolerance: of the residual; the error of the eigenvalue is usually far smaller.
        subspace: Lanczos vectors kept, and products before the first look at the residual.
        restarts: at most; each takes up to `subspace` products.
        seed: of the vector to start from.

    Raises:
        CurvatureError: if the tolerance is not reached, or the matrix has fewer than two rows.
    """
    with extra("sharpness"):
        from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    n = like.numel()
    if n < 2:
        raise CurvatureError(f"the matrix has {n} rows; allowed: at least 2.")
    dtype = np.dtype(str(like.dtype).removeprefix("torch."))
    random = np.random.default_rng(seed)
    start = random.standard_normal(n).astype(dtype)
    count, vanishes = 0, True

    def to_device(vector: np.ndarray) -> Tensor:
        # ARPACK goes on to write into its vectors.
        return torch.from_numpy(np.array(vector, dtype=dtype).reshape(-1)).to(like)

    def matvec(vector: np.ndarray) -> np.ndarray:
        nonlocal count, vanishes
        count += 1
        result = product(to_device(vector)).cpu().numpy()
        vanishes = vanishes and not result.any()
        return result

    try:
        values, vectors = eigsh(
            LinearOperator((n, n), matvec=matvec, dtype=dtype),
            k=1,
            which="LA",
            v0=start,
            ncv=min(n, max(2, subspace)),
            maxiter=restarts,
            tol=tolerance,
            rng=random,
        )
    except ArpackError as error:
        if vanishes:
            return Eigenpair(0.0, to_device(start / np.linalg.norm(start)), count, 0.0)
        raise CurvatureError(
            f"Lanczos did not reach a residual of {tolerance:g} in {count} products; allow a larger tolerance."
        ) from error
    value, vector = float(values[0]), to_device(vectors[:, 0])
    residual = float((product(vector) - value * vector).norm()) / abs(value) if value else 0.0
    return Eigenpair(value, vector, count + 1, residual)
