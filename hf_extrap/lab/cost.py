"""Bytes that a step sends and that a process holds, by formulas of the engine and the preset."""

from __future__ import annotations

from typing import NamedTuple

from hf_extrap.optim.config import ExtrapConfig

ENGINES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3, FSDP2", "hsdp": "HSDP"}
"""DistributedDataParallel, DeepSpeed's ZeRO stages 1 to 3 (FSDP2 equals ZeRO-3), and FSDP2 over replicas and shards."""

PRESETS = ("none", "extrap-past", "past-update", "gaussian", "optimistic", "extrap", "extragradient")


def preset_like(config: ExtrapConfig) -> str:
    """The one of `PRESETS` that sends and holds what a scheme sends and holds."""
    if not config.moves:
        return "none"
    if config.is_noise:
        return "gaussian"
    if config.direction == "past_update":
        return "past-update"
    if config.is_past:
        return "extrap-past" if config.is_local else "optimistic"
    return "extrap" if config.is_local else "extragradient"


class Precision(NamedTuple):
    """Bytes per element; the defaults are bf16 mixed precision with AdamW, 16 bytes per parameter in all.

    Attributes:
        weights: of the weights of the forward pass, and of their all-gathers.
        gradients: of the gradients, their averaging, and the directions copied from them.
        master: of a second copy of the weights that the optimizer steps; 0 for none.
        moments: of the optimizer's state.
    """

    weights: int = 2
    gradients: int = 2
    master: int = 4
    moments: int = 8


BF16, FLOAT32 = Precision(), Precision(weights=4, gradients=4, master=0, moments=8)


class Collective(NamedTuple):
    """A collective: `all_reduce`, `reduce_scatter` or `all_gather`, bytes of the whole tensor, number of processes."""

    kind: str
    size: float
    group: int


def sent(collectives: list[Collective]) -> float:
    """Bytes that each process sends with ring algorithms: n (K − 1) / K per tensor of n bytes, twice for an all-reduce.

    Source: Rajbhandari et al., "ZeRO", SC 2020, section 7.
    """
    return sum((2 if c.kind == "all_reduce" else 1) * c.size * (c.group - 1) / c.group for c in collectives)


def communication(
    engine: str, preset: str, parameters: int, ranks: int, precision: Precision = BF16, node: int = 8
) -> tuple[list[Collective], list[Collective]]:
    """The collectives of one step: those of the engine alone, and those that the preset adds.

    Scalars are left out, such as one norm per tensor where a scaling needs norms of sharded tensors.

    Args:
        engine: one of `ENGINES`.
        preset: one of `PRESETS`; noise has global scope where the engine supports no other.
        parameters: number of parameters of the model.
        ranks: K, the number of processes.
        precision: bytes per element.
        node: number of processes that hold one copy of the weights, for `hsdp`.

    Raises:
        ValueError: for an unknown name, a number of ranks that is no multiple of `node`, or a local direction on an
            engine whose ranks share one copy of the weights.
    """
    p = precision
    _check(engine, preset, ranks, node)
    gradients, weights = parameters * p.gradients, parameters * p.weights
    reduce = Collective("all_reduce", gradients, ranks)
    if engine == "ddp":
        one_pass = step = [reduce]
    elif engine in ("zero1", "zero2"):
        # A fresh direction is averaged by an all-reduce, because every rank moves all of its weights.
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
    precision: Precision = BF16,
    node: int = 8,
    virtual_workers: int = 1,
    swap: bool = False,
) -> dict[str, float]:
    """Bytes that a process holds during the backward pass at y, without activations and communication buffers.

    Args:
        engine, preset, parameters, ranks, precision, node: as for `communication`.
        virtual_workers: of each process; in local scope each has its own direction.
        swap: whether parameters point to y, which then overwrites its direction (`ExtrapConfig.swap`).

    Returns:
        `weights`, `gradients` and `optimizer` of the engine alone; `x`, kept while the weights hold y, and
        `directions`, which the preset adds, in the precision of the gradients (float32 for a past update).

    Raises:
        ValueError: as `communication` does.
    """
    p = precision
    _check(engine, preset, ranks, node)
    shards = {"zero3": ranks, "hsdp": node}.get(engine, 1)
    held = p.gradients
    if preset in ("none", "gaussian") or (swap and preset != "extrap-past"):
        held = 0
    elif preset == "extrap-past":
        # The gradients of this step, the directions of the next one, reuse the memory of the spent directions.
        held = virtual_workers * p.gradients
    elif preset == "past-update":
        held = 4
    elif preset == "optimistic" and engine.startswith("zero"):
        # DeepSpeed's flat gradient has the precision of the master weights.
        held = p.master or p.gradients
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
