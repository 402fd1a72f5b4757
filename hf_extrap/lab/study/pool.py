"""Executors for the runs of a study: this process, or several processes with one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any


class ThisProcess(Executor):
    """Calls a function where it is submitted."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Call the function; its result or exception is in the future. Ctrl-C is raised here."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def start(jobs: int) -> Executor:
    """An executor of so many processes that import everything once; of this process if `jobs` is 1."""
    if jobs == 1:
        return ThisProcess()
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_prepare)


def stop(executor: Executor) -> None:
    """End its processes at once, whatever they do."""
    # First, so that another Ctrl-C finds nothing that the program would wait for.
    if isinstance(executor, ProcessPoolExecutor):
        for process in multiprocessing.active_children():
            process.kill()
    executor.shutdown(wait=False, cancel_futures=True)


def quiet() -> None:
    """Disable the progress bars of the libraries: the study shows its own."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _prepare() -> None:
    """Prepare a process: one thread, no Ctrl-C, which is for the parent, and no life after the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # For the libraries that read it when they are imported.
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    quiet()


def _exit_with_parent() -> None:
    """Exit where the parent was killed: another program may already do the same run again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
