"""Run by torchrun: four processes do the jobs of `hsdp_problem`; a process leaves hsdp_R.pt in the folder given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_extrap.optim.extrapolated import Extrapolated
from tests.support.fsdp_problem import SCHEMES, Job, Network, batch_of_process, local, train, what_ran
from tests.support.hsdp_problem import JOBS
from tests.support.leaving import save_and_leave
from tests.support.plain_loop import BASES


def sharded(mesh: DeviceMesh) -> Network:
    """One layer is a module of its own, and the root holds what is left."""
    model = Network()
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def run_job(job: Job, mesh: DeviceMesh) -> dict[str, Any]:
    """What this process saw."""
    model = sharded(mesh)
    replica, process = mesh.get_local_rank(0), mesh.get_local_rank(1)
    workers = [v * 2 + replica for v in range(job.virtual_workers)]
    run, optimizer = train(model, job, workers, lambda *which: batch_of_process(*which, process))
    return what_ran(model, optimizer, run)


def backward(model: Network, mesh: DeviceMesh) -> None:
    inputs, labels = batch_of_process(0, mesh.get_local_rank(0), 0, mesh.get_local_rank(1))
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()


class OwnReduceScatter:
    """One that a user might set."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False) -> Any:
        return dist.reduce_scatter_single(
            output=output_tensor, input=input_tensor, group=group, op=op, async_op=async_op
        )


def error_of(what: str, mesh: DeviceMesh) -> str:
    """What is said to a loop in which a replica group's own gradient is not to be seen."""
    model = sharded(mesh)
    scheme = SCHEMES["extrap" if what == "probe" else "extrap-past"]
    optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), scheme, virtual_workers=2)
    optimizer.connect(model)
    try:
        if what == "divided":
            model.set_gradient_divide_factor(3.0)
        model.set_requires_gradient_sync(what not in ("unreduced", "probe"))
        if what == "probe":
            model.set_requires_gradient_sync(True)
            with optimizer.probing(worker=0):
                backward(model, mesh)
            model.set_requires_gradient_sync(False)
        optimizer.train(worker=0)
        if what == "replaced":
            model.set_custom_reduce_scatter(OwnReduceScatter())
        backward(model, mesh)
        if what == "probe":
            with optimizer.probing(worker=1):
                pass
        optimizer.train(worker=1)
    except RuntimeError as error:
        return str(error)
    return ""


def started_apart(mesh: DeviceMesh) -> list[torch.Tensor]:
    """The shards after `connect` of a model whose replicas start from different weights."""
    model = sharded(mesh)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(dist.get_rank() // 2)
    Extrapolated(BASES["sgd"](list(model.parameters())), SCHEMES["extrap-past"]).connect(model)
    return local(list(model.parameters()))


def statistics(mesh: DeviceMesh) -> dict[str, float]:
    """Of one step of a replica group."""
    model = sharded(mesh)
    optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), SCHEMES["extrap"])
    optimizer.connect(model)
    optimizer.collect_statistics = True
    with optimizer.probing():
        backward(model, mesh)
    optimizer.train()
    backward(model, mesh)
    optimizer.step()
    return optimizer.statistics


def saved(mesh: DeviceMesh) -> dict[str, Any]:
    """A replica group's own directions, as they are saved, and as another optimizer has loaded them."""
    states = []
    for _ in range(2):
        model = sharded(mesh)
        optimizer = Extrapolated(BASES["sgd"](list(model.parameters())), SCHEMES["extrap-past"])
        optimizer.connect(model)
        if not states:
            optimizer.train()
            backward(model, mesh)
            optimizer.step()
        else:
            optimizer.load_local_state_dict(states[0])
        states.append(optimizer.local_state_dict())
    return {"saved": states[0]["directions"], "loaded": states[1]["directions"]}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    seen: dict[str, Any] = {str(job): run_job(job, mesh) for job in JOBS}
    seen["errors"] = {what: error_of(what, mesh) for what in ("unreduced", "probe", "divided", "replaced")}
    seen |= {"started apart": started_apart(mesh), "statistics": statistics(mesh), "saved": saved(mesh)}
    save_and_leave(seen, folder, "hsdp")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
