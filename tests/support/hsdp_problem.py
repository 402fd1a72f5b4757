"""Jobs of HSDP, two replicas of two shards each, and of the same workers in one process."""

from __future__ import annotations

from tests.support.fsdp_problem import Job, Network, batch_of_worker, train
from tests.support.plain_loop import BASES, Run

JOBS = [
    *(Job(scheme, base) for scheme in ("extrap-past", "optimistic") for base in BASES),
    *(Job(scheme, "adamw") for scheme in ("none", "extrap", "extrap-past, a layer's step", "gaussian, shared")),
    *(Job(scheme, "sgd") for scheme in ("extrap, a layer's step", "extrap-auto", "past-update", "gaussian")),
    Job("extrap-past", max_grad_norm=0.05),
    *(Job(scheme, virtual_workers=2) for scheme in ("extrap", "extrap-past", "extrap-past, on the host", "gaussian")),
    *(Job("extrap-past", accumulation=2, reduced=r) for r in ("at the end", "all", "all, averaged at the end")),
    Job("extrap", "adamw", accumulation=2, reduced="all, averaged at the end"),
]


def in_one_process(job: Job) -> Run:
    """All workers as virtual ones."""
    return train(Network(), job, range(2 * job.virtual_workers), batch_of_worker)[0]
