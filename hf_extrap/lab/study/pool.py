"""Where the runs of a study happen: in this process, or in several that each do many."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from hf_extrap.lab.study.execution import Job, OutOfTime, execute
from hf_extrap.lab.study.plan import Row

Done = tuple[Job, Row, list[dict[str, Any]]]


class Pool(Protocol):
    """Takes jobs while it is free, and gives their rows back."""

    @property
    def is_free(self) -> bool:
        """Whether it can take a job now."""
        ...

    @property
    def jobs(self) -> list[Job]:
        """Those that it has taken and not given back."""
        ...

    def submit(self, job: Job) -> None:
        """Take a job; only while free."""
        ...

    def collect(self, deadline: float | None) -> list[Done]:
        """Wait until jobs are done, and give them back.

        Args:
            deadline: seconds since the epoch.

        Raises:
            OutOfTime: the deadline passed.
        """
        ...

    def stop(self) -> None:
        """End everything at once."""
        ...


class ThisProcess:
    """One run after the other, here."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    @property
    def is_free(self) -> bool:
        return not self.jobs

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def collect(self, deadline: float | None) -> list[Done]:
        job = self.jobs.pop()
        return [(job, *execute(job, deadline))]

    def stop(self) -> None:
        self.jobs.clear()


class Processes:
    """Several processes with one thread each, that import everything once."""

    def __init__(self, count: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._start() for _ in range(count)]

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        with _inherited():
            process = self._context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
        theirs.close()
        return _Worker(process, ours)

    @property
    def is_free(self) -> bool:
        return any(worker.job is None for worker in self._workers)

    @property
    def jobs(self) -> list[Job]:
        return [worker.job for worker in self._workers if worker.job is not None]

    def submit(self, job: Job) -> None:
        worker = next(worker for worker in self._workers if worker.job is None)
        worker.job = job
        worker.pipe.send(job)

    def collect(self, deadline: float | None) -> list[Done]:
        busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
        timeout = None if deadline is None else max(0.0, deadline - time.time())
        ready = wait(list(busy), timeout)
        if not ready:
            raise OutOfTime
        return [self._receive(busy[pipe]) for pipe in ready if isinstance(pipe, Connection)]

    def _receive(self, worker: _Worker) -> Done:
        job, worker.job = worker.job, None
        assert job is not None
        try:
            row, history = worker.pipe.recv()
        except EOFError:
            # Killed from outside, for its memory as a rule: its run failed, the others go on.
            worker.process.join()
            row, history = lost(job, f"its process died with exit code {worker.process.exitcode}"), []
            self._workers[self._workers.index(worker)] = self._start()
        return job, row, history

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()


class _Worker:
    def __init__(self, process: Any, pipe: Connection) -> None:
        self.process, self.pipe = process, pipe
        self.job: Job | None = None


def lost(job: Job, message: str) -> Row:
    """The row of a run whose process told nothing."""
    return job.identity | {
        "status": "failed",
        "message": message,
        "wall_clock_seconds": 0.0,
        "configuration": {},
    }


def quiet() -> None:
    """Show the study's own bar alone."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _work(pipe: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    quiet()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(execute(job))


def _end_with_parent() -> None:
    """End at once where the starting process was killed: another one may already do the same run again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _inherited() -> Iterator[None]:
    """What a process that is started inside has from its first import on: one thread, and no ear for Ctrl-C.

    Ctrl-C is for the process that started it, which ends it.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    listening = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, listening)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
