"""Bytes that a process sends and holds in one step, by engine and preset: formulas, nothing is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

ENGINES = ("ddp", "zero1", "zero2", "zero3", "hsdp")
"""DistributedDataParallel, DeepSpeed's ZeRO stages 1 to 3 (FSDP2 is as ZeRO-3), and FSDP2 over replicas and shards."""

PRESETS = ("none", "extrap-past", "past-update", "gaussian", "optimistic", "extrap", "extragradient")


@dataclass(frozen=True)
class Precision:
    """Bytes an element; the defaults are bf16 mixed precision with AdamW, 16 bytes a parameter in all.

    Attributes:
        weights: of the weights that are passed through, and of their all-gathers.
        gradients: of the gradients, their averaging, and the directions copied from them.
        master: of a second copy of the weights that the optimizer steps; 0 for none.
        moments: of the optimizer's state.
    """

    weights: int = 2
    gradients: int = 2
    master: int = 4
    moments: int = 8


FLOAT32 = Precision(weights=4, gradients=4, master=0, moments=8)


class Collective(NamedTuple):
    """One operation over a group.

    Attributes:
        kind: `all_reduce`, `reduce_scatter` or `all_gather`.
        size: bytes of the whole tensor, that all parts make up together.
        group: processes that take part.
    """

    kind: str
    size: float
    group: int


def sent(collectives: list[Collective]) -> float:
    """Bytes that each process sends with ring algorithms: n (K − 1) / K a tensor of n bytes, twice for an all-reduce.

    Source: Rajbhandari et al., "ZeRO", SC 2020, section 7.
    """
    return sum((2 if c.kind == "all_reduce" else 1) * c.size * (c.group - 1) / c.group for c in collectives)


def communication(
    engine: str, preset: str, parameters: int, ranks: int, precision: Precision | None = None, node: int = 8
) -> tuple[list[Collective], list[Collective]]:
    """What one step communicates.

    Args:
        engine: one of `ENGINES`.
        preset: one of `PRESETS`; noise is that of all workers where the engine has no other.
        parameters: of the model.
        ranks: K, all processes.
        precision: bytes an element.
        node: processes that hold one copy of the weights, of `hsdp`.

    Returns:
        The collectives of the engine alone, and those that the preset adds to them. Left out: scalars, such as one norm
        a tensor where a scaling needs norms of sharded tensors.

    Raises:
        ValueError: for an unknown name, a number of ranks that the node size does not divide, or a local direction
            where the ranks share one copy of the weights.
    """
    p = precision or Precision()
    _check(engine, preset, ranks, node)
    gradients, weights = parameters * p.gradients, parameters * p.weights
    reduce = Collective("all_reduce", gradients, ranks)
    if engine == "ddp":
        one_pass = step = [reduce]
    elif engine in ("zero1", "zero2"):
        # The averaging of a fresh direction is an all-reduce: every rank moves all of its weights.
        one_pass = [reduce]
        step = [Collective("reduce_scatter", gradients, ranks), Collective("all_gather", weights, ranks)]
    else:
        group = ranks if engine == "zero3" else node
        gather = Collective("all_gather", weights, group)
        one_pass = step = [gather, gather, Collective("reduce_scatter", gradients, group)]
        if engine == "hsdp":
            one_pass = step = [*step, Collective("all_reduce", gradients / node, ranks // node)]
    if preset == "extragradient" or (preset == "extrap" and engine == "hsdp"):
        return step, one_pass
    if preset == "optimistic" and engine in ("zero1", "zero2"):
        return step, [Collective("all_gather", parameters * (p.master or p.gradients), ranks)]
    return step, []


def memory(
    engine: str,
    preset: str,
    parameters: int,
    ranks: int,
    precision: Precision | None = None,
    node: int = 8,
    virtual_workers: int = 1,
    swap: bool = False,
) -> dict[str, float]:
    """Bytes that a process holds while the gradient at y is taken, activations and buffers left out.

    Args:
        engine: one of `ENGINES`.
        preset: one of `PRESETS`.
        parameters: of the model.
        ranks: K, all processes.
        precision: bytes an element.
        node: processes that hold one copy of the weights, of `hsdp`.
        virtual_workers: of each process, which have a direction each in local scope.
        swap: whether weights point to y, which then lies over its direction (`ExtrapConfig.swap`).

    Returns:
        `weights`, `gradients` and `optimizer` of the engine alone; `x`, kept while the weights hold y, and
        `directions`, which the preset adds, in the precision of the gradients (float32 for a past update) if no
        direction_dtype is given.

    Raises:
        ValueError: as `communication` does.
    """
    p = precision or Precision()
    _check(engine, preset, ranks, node)
    shards = {"zero3": ranks, "hsdp": node}.get(engine, 1)
    directions = {
        # DeepSpeed's flat gradient has the precision of the master weights.
        "optimistic": (p.master or p.gradients) if engine.startswith("zero") else p.gradients,
        "past-update": 4,
        "extrap": p.gradients,
        "extragradient": p.gradients,
    }
    # This step's gradients, which will be the next one's directions, take the memory of those that are spent.
    held = virtual_workers * p.gradients if preset == "extrap-past" else 0 if swap else directions.get(preset, 0)
    return {
        "weights": parameters * p.weights / shards,
        "gradients": parameters * p.gradients / (ranks if engine == "zero2" else shards),
        "optimizer": parameters * (p.master + p.moments) / (ranks if engine in ("zero1", "zero2") else shards),
        "x": 0.0 if preset == "none" else parameters * p.weights / shards,
        "directions": parameters * held / shards,
    }


def _check(engine: str, preset: str, ranks: int, node: int) -> None:
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; allowed: {', '.join(ENGINES)}.")
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; allowed: {', '.join(PRESETS)}.")
    if engine == "hsdp" and (ranks < 1 or ranks % node):
        raise ValueError(f"ranks is {ranks} and node is {node}; allowed: a multiple of node, for hsdp.")
    if engine == "zero3" and preset in ("extrap", "extrap-past"):
        raise ValueError(
            f"preset is {preset!r}, whose directions are local, and engine is 'zero3', whose ranks share one copy of "
            "the weights; allowed: optimistic, extragradient, past-update, gaussian, or hsdp."
        )
