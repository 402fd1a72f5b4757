"""Memory of directions, local gradients, extrapolated points and copies of x; a reader of the method can skip it.

The contract:

1. `pool.take(i, like)` gives a tensor of any content, laid out as `like`; `pool.give(i, t)` returns one that is free.
2. A store maps a worker to its buffers, one per parameter, None where there is none. Buffers that have been read may be
   written to, and stay valid until another worker's are read.
3. `store.start(worker, size)` gives buffers that are to be written in full; `store.drop(worker)` frees them.
4. `store.spend(worker, gradients)` leaves the tensors to the caller; `gradients` is the store that fills next.
5. `store.adopt(worker, other)` takes the worker's buffers from another store without a copy.
"""

from __future__ import annotations

from .offload import OffloadedStore, Transfers
from .pool import BufferPool, StorageOwners, fits, owns_storage
from .store import Buffers, BufferStore, padded

__all__ = ["BufferPool", "BufferStore", "Buffers", "StorageOwners", "fits", "make_stores", "owns_storage", "padded"]


def make_stores(offload: bool) -> tuple[BufferPool, BufferStore, BufferStore]:
    """A pool, and the stores of directions and of local gradients that share it.

    Without offload, K workers with past directions need K + 1 tensors per parameter. With offload, the host holds K and
    the device three: x or y, the gradient of the current worker, and that of the worker before it, which is copied to
    the host meanwhile and makes room for the next worker's direction.

    Args:
        offload: keep the buffers in host memory.
    """
    pool = BufferPool()
    if not offload:
        return pool, BufferStore(pool), BufferStore(pool)
    leaving, transfers = BufferPool(), Transfers()
    return pool, OffloadedStore(pool, leaving, transfers), OffloadedStore(pool, leaving, transfers)
