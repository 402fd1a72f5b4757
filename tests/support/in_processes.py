"""Processes of one job, forked from a server that has imported the package once: torchrun would import it in each."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist


def start(
    work: Callable[..., Any], folder: Path, processes: int, *words: Any, timeout: float = 300
) -> list[int | None]:
    """Call `work(folder, rank, *words)` in new processes that can form a process group.

    Returns:
        Their exit codes, None for one that hangs. What they print is in FOLDER/rank_R.log.
    """
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.tiny_trainer"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
        process = context.Process(target=_run, args=(work, folder, rank, words, environment))
        process.start()
        begun.append(process)
    for process in begun:
        process.join(timeout)
    codes = [process.exitcode for process in begun]
    for process in begun:
        process.kill()
    return codes


def results(module: str, folder: Path, words: tuple[Any, ...], processes: int) -> list[Any]:
    """What `in_processes(folder, *words)` of a module returns in each process."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = start(_keep_result, folder, processes, module, *words)
    logs = "".join(f"rank {rank}:\n{(folder / f'rank_{rank}.log').read_text()[-4000:]}" for rank in range(processes))
    assert codes == [0] * processes, f"exit codes {codes}\n{logs}"
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(processes)]


def program(folder: Path, rank: int, *words: str) -> None:
    """`python WORDS`, with a script or `-m MODULE`; for `start`."""
    sys.argv = list(words[1:] if words[0] == "-m" else words)
    run = runpy.run_module if words[0] == "-m" else runpy.run_path
    try:
        run(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)


def leave() -> NoReturn:
    """End the process once all processes have called this, without running the interpreter's cleanup.

    During that cleanup gloo sometimes hangs, when models wrapped for DDP are freed after the process group, or aborts
    ("terminate called without an active exception").
    """
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def _run(
    work: Callable[..., Any], folder: Path, rank: int, words: tuple[Any, ...], environment: dict[str, Any]
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    # What is imported is not collected: see conftest.py.
    gc.freeze()
    _print_to(folder / f"rank_{rank}.log")
    work(folder, rank, *words)
    leave()


def _keep_result(folder: Path, rank: int, module: str, *words: Any) -> None:
    torch.save(importlib.import_module(module).in_processes(folder, *words), folder / f"rank_{rank}.pt")


def _print_to(path: Path) -> None:
    """Also what libraries in C++ print."""
    with path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
