"""The study: measure the throughput, plan what fits, train several runs at a time, write each row when it is known."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_extrap.recipes.run_folder import plain, write_json

from .data import Images, load
from .plan import RATES, first_stage, how_long, how_many, second_stage
from .report import read_rows, write_report
from .slot import Slot
from .training import Run, Setting, train

PLANNED_RATE = 100_000.0
"""Images a second that a rehearsal plans with."""
SLOTS = (1, 2, 3, 4, 6)
"""Numbers of concurrent runs that the throughput is measured at."""
PROBE_SECONDS = 2.0
MARGIN = 6.0
"""Seconds kept for the end: the last evaluations, table and figure."""

Active = tuple[Run, Generator[int, None, dict[str, Any]], float]


class Study:
    """Runs in the slots of one device, one row of `rows.jsonl` each.

    Args:
        folder: to write to.
        images: on the device.
        setting: what all runs share.
        slots: concurrent runs, at most.
        end: on the clock of `time.monotonic`; no run is begun that would end later, and what is under way is given up.
    """

    def __init__(self, folder: Path, images: Images, setting: Setting, slots: Sequence[Slot], end: float) -> None:
        self.folder, self.images, self.setting, self.slots, self.end = folder, images, setting, slots, end
        self.rate = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def probe(self) -> int:
        """Images a second of the costliest kind of run, into `rate`; returns how many concurrent runs that took."""
        measured: dict[int, float] = {}
        probes = [run for run in first_stage(self.setting) if run.method.name == "extrap-past, share 0.5"]
        for count in (n for n in SLOTS if n <= len(self.slots)):
            slots = self.slots[:count]
            active = {s: train(probes[i % len(RATES)], s, self.images, self.setting) for i, s in enumerate(slots)}
            self._advance(active, PROBE_SECONDS / 4)
            done, seconds = self._advance(active, PROBE_SECONDS)
            measured[count] = done / seconds
            print(f"{count} concurrent runs: {measured[count]:,.0f} images/s", flush=True)
        best = max(measured.values())
        count = min(n for n, rate in measured.items() if rate >= 0.97 * best)
        self.rate = measured[count]
        return count

    def _advance(self, active: dict[Slot, Generator[int, None, dict[str, Any]]], seconds: float) -> tuple[int, float]:
        self._wait()
        started, done = time.monotonic(), 0
        while active and time.monotonic() < started + seconds:
            for slot, training in list(active.items()):
                with slot.active():
                    try:
                        done += next(training)
                    except StopIteration:
                        del active[slot]
        self._wait()
        return max(done, 1), time.monotonic() - started

    def run(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """Train what fits, in this order, and measure `rate` anew; returns the rows of this call."""
        waiting, rows = deque(runs), []
        since, done = time.monotonic(), 0
        active: dict[Slot, Active] = {}
        while time.monotonic() < self.end:
            for slot in self.slots:
                if slot not in active:
                    begun = self._begin(waiting, slot)
                    if begun is None:
                        continue
                    active[slot] = begun
                run, training, started = active[slot]
                with slot.active():
                    try:
                        done += next(training)
                    except StopIteration as ended:
                        del active[slot]
                        rows.append(self._keep(run, {**ended.value, "seconds": time.monotonic() - started}))
            if not active and not waiting:
                if rows:
                    self.rate = done / (time.monotonic() - since)
                return rows
        for run, training, _ in active.values():
            training.close()
            print(f"given up: {run.name}, rate {run.rate:g}", flush=True)
        self._wait()
        return rows

    def _begin(self, waiting: deque[Run], slot: Slot) -> Active | None:
        """The first run that would end in time; the others before it are dropped."""
        now = time.monotonic()
        while waiting:
            run = waiting.popleft()
            seconds = run.epochs * len(self.images.train.labels) * len(self.slots) / self.rate
            if now + 1.05 * seconds <= self.end:
                return run, train(run, slot, self.images, self.setting), now
        return None

    def _keep(self, run: Run, row: dict[str, Any]) -> dict[str, Any]:
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(row)) + "\n")
        print(
            f"{run.stage} {run.name}, rate {run.rate:g}, seed {run.seed}: validation {row['validation']:.2f}, "
            f"test {row['test']:.2f}, {row['seconds']:.1f} s{', diverged' if row['diverged'] else ''}",
            flush=True,
        )
        return row

    def _wait(self) -> None:
        if self.slots[0].device.type == "cuda":
            torch.cuda.synchronize(self.slots[0].device)


def gpu_study(
    data: Path,
    folder: Path,
    minutes: float,
    *,
    device: torch.device,
    fraction: float = 1.0,
    fake_gpu_minutes: float | None = None,
    slots: int = SLOTS[-1],
    graphs: bool = True,
    setting: Setting | None = None,
) -> str:
    """Both stages within so many minutes, everything included; returns the report in Markdown.

    Args:
        data: folder with CIFAR-10 as parquet files.
        folder: to write `rows.jsonl`, `plan.json`, `study.md` and `study.png` to.
        minutes: of wall-clock time.
        device: where it runs.
        fraction: of the images, and of a worker's batch, so that the steps stay as many.
        fake_gpu_minutes: plan the runs as for a GPU with so many minutes, at `PLANNED_RATE`: a rehearsal.
        slots: concurrent runs, at most.
        graphs: see `Slot`.
        setting: what all runs share.
    """
    begun = time.monotonic()
    end = begun + 60 * minutes - (MARGIN if device.type == "cuda" else 0.0)
    given = setting or Setting()
    setting = Setting(**{**vars(given), "worker_batch": max(2, round(fraction * given.worker_batch))})
    images = load(data, device, fraction)
    made = [Slot(setting.worker_batch, device, setting.depth, setting.width, graphs) for _ in range(slots)]
    print(f"data and {slots} slots after {time.monotonic() - begun:.1f} s", flush=True)
    study = Study(folder, images, setting, made, end)
    count = study.probe()
    study.slots = made[:count]
    available = len(images.train.labels)
    whole, faked = round(available / fraction), 60 * (fake_gpu_minutes or 0.0)
    if fake_gpu_minutes is None:
        short = how_many(end - time.monotonic(), study.rate, available, setting)
    else:
        short = how_many(faked, PLANNED_RATE, whole, setting)
    plan = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        **{"torch": torch.__version__, "slots": count, "images_per_second": study.rate, "minutes": minutes},
        **{"runs_of_stage_a": short, "epochs": setting.epochs, "long_epochs": 0, "fraction": fraction},
        **{"training_images": available, "workers": setting.workers, "worker_batch": setting.worker_batch},
    }
    write_json(folder / "plan.json", plan)
    print(f"plan after {time.monotonic() - begun:.1f} s: {plan}", flush=True)
    study.run(first_stage(setting)[:short])
    if fake_gpu_minutes is None:
        long_epochs = how_long(end - time.monotonic(), study.rate, available, setting)
    else:
        long_epochs = how_long(0.4 * faked, PLANNED_RATE, whole, setting)
    write_json(folder / "plan.json", {**plan, "long_epochs": long_epochs, "images_per_second": study.rate})
    print(f"second stage: {long_epochs} epochs, at {study.rate:,.0f} images/s so far", flush=True)
    study.run(second_stage(read_rows(folder / "rows.jsonl"), long_epochs, setting))
    text = write_report(folder)
    print(f"done after {time.monotonic() - begun:.1f} s of {60 * minutes:.0f} s", flush=True)
    return text
