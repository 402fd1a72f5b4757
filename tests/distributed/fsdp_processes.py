"""Run by torchrun: two processes train under FSDP2, raw and through accelerate; each leaves fsdp_R.pt in the folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.fsdp_problem import SCHEMES, Job, Network, batch_of_process, local, run_loop, train, what_ran
from tests.support.leaving import save_and_leave
from tests.support.plain_loop import BASES

JOBS = [
    *(Job(scheme, "adamw") for scheme in ("none", "extragradient", "optimistic", "past-update", "gaussian, shared")),
    *(Job(scheme, accumulation=2) for scheme in ("extragradient", "optimistic", "past-update")),
    Job("extragradient-auto", max_grad_norm=0.05),
    Job("optimistic", max_grad_norm=0.05),
    Job("optimistic", virtual_workers=2),
    Job("gaussian, unscaled"),
    *(Job(scheme, "adamw", offload=True) for scheme in ("extragradient", "past-update")),
]


def sharded(mp_policy: MixedPrecisionPolicy | None = None, offload: bool = False) -> Network:
    """One layer is a module of its own, and the root holds what is left."""
    model = Network()
    policies: dict[str, Any] = {
        "mp_policy": mp_policy or MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy(),
    }
    fully_shard(model.first, **policies)
    fully_shard(model, **policies)
    return model


def run_job(job: Job) -> dict[str, Any]:
    """What this process saw."""
    model = sharded(offload=job.offload)
    workers = list(range(job.virtual_workers))
    run, optimizer = train(model, job, workers, batch_of_rank)
    return what_ran(model, optimizer, run)


def batch_of_rank(step: int, worker: int, index: int) -> tuple[Tensor, Tensor]:
    """This process's half of what the two of them see as one."""
    return batch_of_process(step, worker, index, dist.get_rank())


def backward(model: nn.Module, step: int = 0) -> None:
    inputs, labels = batch_of_process(step, 0, 0, dist.get_rank())
    nn.functional.cross_entropy(model(inputs).float(), labels).backward()


def connected(model: nn.Module, scheme: str) -> Extrapolated:
    optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), SCHEMES[scheme])
    optimizer.connect(model)
    return optimizer


def used_in_forward(mp_policy: MixedPrecisionPolicy | None, follows: bool = True) -> dict[str, Any]:
    """Weights held and used at a step's y after an evaluation; without `follows` the engine does not hear of moves."""
    model = sharded(mp_policy)
    optimizer = connected(model, "gaussian, shared")
    params: dict[str, Any] = dict(model.named_parameters())
    if not follows:
        optimizer.engine.moved = lambda: None  # type: ignore[method-assign]
    with torch.no_grad():
        model(torch.ones(2, 5))
    x = {"last": model.seen["last"].clone(), "scale": model.seen["scale"].clone()}
    optimizer.train()
    y = {name: params[full].full_tensor().detach() for name, full in (("last", "last.weight"), ("scale", "scale"))}
    backward(model)
    used = {name: value.clone() for name, value in model.seen.items()}
    dtypes = [str(p.dtype) for p in params.values()]
    optimizer.step()
    return {"x": x, "y": y, "used": used, "dtypes": dtypes}


def errors() -> dict[str, str]:
    """What is said to a scheme or a loop that FSDP2 cannot carry out."""
    said = {}
    model = sharded()
    for name, act in {
        "local": lambda: Extrapolated(BASES["sgd"](list(model.parameters())), SCHEMES["extrap"]),
        "unconnected": lambda: Extrapolated(
            BASES["sgd"](list(model.parameters())), SCHEMES["gaussian, shared"]
        ).train(),
        "kept": lambda: probe_without_reduction(model),
    }.items():
        try:
            act()
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)
    return said


def probe_without_reduction(model: Network) -> None:
    optimizer = connected(model, "extragradient")
    model.set_requires_gradient_sync(False)
    with optimizer.probing():
        backward(model)


def given_up() -> dict[str, Any]:
    """A step whose gradients are cleared is counted, and leaves x."""
    model = sharded()
    optimizer = connected(model, "optimistic")
    optimizer.train()
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    x = local(list(model.parameters()))
    optimizer.train()
    y = local(list(model.parameters()))
    backward(model, 1)
    optimizer.zero_grad()
    optimizer.restore()
    after = local(list(model.parameters()))
    return {"x": x, "y": y, "after": after, "skipped": optimizer.skipped_steps, "steps": optimizer.step_count}


def through_accelerate() -> dict[str, Any]:
    """A plain loop of accelerate with FSDP2, which on a CPU it runs only when its state is told so."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    seen: dict[str, Any] = {}
    for scheme in ("extragradient", "optimistic", "past-update", "gaussian, shared"):
        AcceleratorState._reset_state()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=40, cpu_ram_efficient_loading=False
        )
        accelerator = Accelerator(cpu=True)
        accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        model = Network()
        base = BASES["adamw"](list(model.parameters()))
        model, prepared = accelerator.prepare(model, Extrapolated(base, SCHEMES[scheme]))
        optimizer = prepared.optimizer
        optimizer.connect(model)
        job = Job(scheme, "adamw")
        run = run_loop(model, optimizer, prepared, job, [0], batch_of_rank, accelerator.backward)
        seen[scheme] = {**what_ran(model, optimizer, run), "wrapper": type(prepared).__name__}
    return seen


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen: dict[str, Any] = {str(job): run_job(job) for job in JOBS}
    seen |= {
        "followed": used_in_forward(None),
        "unfollowed": used_in_forward(None, follows=False),
        "bf16": used_in_forward(bf16),
        "errors": errors(),
        "given up": given_up(),
        "accelerate": through_accelerate(),
    }
    save_and_leave(seen, folder, "fsdp")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
