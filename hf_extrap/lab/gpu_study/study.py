"""The study: measure the throughput, plan what fits, train several runs concurrently, write each row at once."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_extrap.recipes.run_folder import plain, read_json, write_json

from .data import Images, load
from .methods import BY_NAME, FAMILIES, METHODS, Method
from .report import read_rows, write_report
from .slot import Slot
from .training import Run, Setting, Training, train

PLANNED_THROUGHPUT = 100_000.0
"""Images per second of a rehearsal's plan."""
SLOTS = (1, 2, 3, 4, 6)
"""Numbers of concurrent runs at which the throughput is measured."""
MARGIN = 6.0
"""Seconds kept for the last evaluations, the table and the figure."""
FIRST_STAGE = 0.55
"""Fraction of the time for the first stage."""
FEWEST_LONG = 12
"""Runs of the second stage that must fit at a number of epochs: two seeds of each."""
SMALL_BATCH_RATE = 0.2
"""For a batch of one worker: 0.1 at 128 images (He et al. 2016), scaled linearly."""


def first_stage(setting: Setting) -> list[Run]:
    """Every method at one learning rate after another, so that a study that is cut short has a result."""
    pairs = [(method, rate * method.rate_scale) for rate in setting.rates for method in METHODS]
    return [Run("a", method, rate, 0, setting.epochs, setting.workers) for method, rate in pairs]


def second_stage(rows: Sequence[Mapping[str, Any]], epochs: int, setting: Setting) -> list[Run]:
    """The best of each family, ours also with post-local SGD, and the small batch, with other seeds."""
    best = {family: found for family in FAMILIES if (found := best_of(rows, family))}
    runs = []
    for seed in setting.seeds:
        runs += [Run("b", *found, seed, epochs, setting.workers) for found in best.values()]
        if "ours" in best:
            runs.append(Run("b", *best["ours"], seed, epochs, setting.workers, post_local=True))
        runs.append(Run("b", BY_NAME["Nesterov"], SMALL_BATCH_RATE, seed, epochs, 1))
    return runs


def best_of(rows: Sequence[Mapping[str, Any]], family: str) -> tuple[Method, float] | None:
    """Method and rate with the highest validation accuracy of a family in the first stage."""
    tuned = [r for r in rows if r["stage"] == "a" and BY_NAME[r["name"]].family == family and not r["diverged"]]
    best = max(tuned, key=lambda row: row["validation"], default=None)
    return None if best is None else (BY_NAME[best["name"]], best["rate"])


class Study:
    """Runs in the slots of one device, one row of `rows.jsonl` each.

    Args:
        folder: output folder.
        images: on the device.
        setting: what all runs share.
        slots: one for each concurrent run; `probe` keeps as many as pay.
        end: on the clock of `time.monotonic`; no run begins that would end later, and unfinished runs are stopped.
    """

    def __init__(self, folder: Path, images: Images, setting: Setting, slots: Sequence[Slot], end: float) -> None:
        self.folder, self.images, self.setting, self.slots, self.end = folder, images, setting, slots, end
        self.throughput = 0.0

    def probe(self, seconds: float) -> None:
        """Measure images per second with the costliest method, and choose the number of concurrent runs."""
        run = Run("a", BY_NAME["extrap-past, share 0.5"], 0.1, 0, self.setting.epochs, self.setting.workers)
        measured: dict[int, float] = {}
        for count in (n for n in SLOTS if n <= len(self.slots)):
            active = {slot: train(run, slot, self.images, self.setting) for slot in self.slots[:count]}
            for duration in (seconds / 4, seconds):
                started, done = self._now(), 0
                while active and time.monotonic() < started + duration:
                    done += self._advance(active)[0]
                measured[count] = max(done, 1) / (self._now() - started)
            print(f"{count} concurrent runs: {measured[count]:,.0f} images/s", flush=True)
        count = min(n for n, found in measured.items() if found >= 0.97 * max(measured.values()))
        self.slots, self.throughput = self.slots[:count], measured[count]

    def run(self, runs: Iterable[Run]) -> None:
        """Train the runs that fit, in this order, and update `throughput`."""
        waiting, started, done = deque(runs), time.monotonic(), 0
        active: dict[Slot, Training] = {}
        begun: dict[Slot, tuple[Run, float]] = {}
        while time.monotonic() < self.end:
            for slot in self.slots:
                if slot not in active and (run := self._next(waiting)):
                    active[slot], begun[slot] = train(run, slot, self.images, self.setting), (run, time.monotonic())
            if not active:
                break
            images, ended = self._advance(active)
            done += images
            for slot, row in ended.items():
                self._write(begun[slot][0], {**row, "seconds": time.monotonic() - begun[slot][1]})
        for slot, training in active.items():
            training.close()
            print(f"stopped: {begun[slot][0].name}, rate {begun[slot][0].rate:g}", flush=True)
        if done:
            self.throughput = done / (self._now() - started)

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """The runs that have no row yet."""
        found = {(row["stage"], row["name"], row["rate"], row["seed"]) for row in self.rows()}
        return [run for run in runs if (run.stage, run.name, run.rate, run.seed) not in found]

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the folder."""
        return read_rows(self.folder / "rows.jsonl")

    def _next(self, waiting: deque[Run]) -> Run | None:
        """The first run that would end in time; those before it are dropped."""
        while waiting:
            run = waiting.popleft()
            seconds = run.epochs * len(self.images.train.labels) * len(self.slots) / self.throughput
            if time.monotonic() + 1.05 * seconds <= self.end:
                return run
        return None

    def _advance(self, active: dict[Slot, Training]) -> tuple[int, dict[Slot, dict[str, Any]]]:
        """One micro-batch in every slot: images processed, and the rows of the runs that have ended."""
        images, ended = 0, {}
        for slot, training in list(active.items()):
            with slot.active():
                try:
                    images += next(training)
                except StopIteration as stop:
                    ended[slot] = stop.value
                    del active[slot]
        return images, ended

    def _write(self, run: Run, row: dict[str, Any]) -> None:
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(row)) + "\n")
        accuracies = f"validation {row['validation']:.2f}, test {row['test']:.2f}, {row['seconds']:.1f} s"
        print(f"{run.stage} {run.name}, rate {run.rate:g}, seed {run.seed}: {accuracies}", flush=True)

    def _now(self) -> float:
        """The time when the device has finished its work."""
        if self.slots[0].device.type == "cuda":
            torch.cuda.synchronize(self.slots[0].device)
        return time.monotonic()


def gpu_study(
    data: Path,
    output_dir: Path,
    minutes: float,
    *,
    fraction: float = 1.0,
    fake_gpu_minutes: float | None = None,
    slots: int = SLOTS[-1],
    setting: Setting | None = None,
    probe_seconds: float = 2.0,
) -> str:
    """Run both stages, or what an earlier call has left of them; returns the report in Markdown.

    Args:
        data: folder with CIFAR-10 as parquet files.
        output_dir: folder of `rows.jsonl`, `plan.json`, `report.md` and `figure.png`.
        minutes: of wall-clock time, everything included.
        fraction: of the images, and of a worker's batch, so that the number of steps stays the same.
        fake_gpu_minutes: rehearsal: plan as for a GPU with so many minutes, at `PLANNED_THROUGHPUT`.
        slots: maximum number of concurrent runs.
        setting: what all runs share; `worker_batch` is that of all images.
        probe_seconds: of each measurement of the throughput.

    Raises:
        ValueError: if the folder has rows of another setting.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end = time.monotonic() + 60 * minutes - (MARGIN if device.type == "cuda" else 0.0)
    given = setting or Setting()
    setting = Setting(**{**vars(given), "worker_batch": max(2, round(fraction * given.worker_batch))})
    images = load(data, device, fraction)
    available = len(images.train.labels)
    fixed = {name: getattr(setting, name) for name in ("epochs", "workers", "worker_batch", "depth")}
    plan: dict[str, Any] = {"fraction": fraction, "training_images": available, **fixed}
    earlier = read_json(output_dir / "plan.json") if (output_dir / "plan.json").exists() else {}
    for name, value in plan.items():
        if earlier.get(name, value) != value:
            raise ValueError(f"{name} is {value}; allowed with the rows of {output_dir}: {earlier[name]}.")
    made = [Slot(setting.worker_batch, device, setting.depth) for _ in range(slots)]
    study = Study(output_dir, images, setting, made, end)
    study.probe(probe_seconds)

    def affordable(share: float) -> float:
        """Images in the time that is left; of a rehearsal, in a share of its time."""
        if fake_gpu_minutes is None:
            return (end - time.monotonic()) * study.throughput
        return share * 60 * fake_gpu_minutes * PLANNED_THROUGHPUT * fraction

    plan["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    plan |= {"torch": torch.__version__, "slots": len(study.slots), "minutes": minutes}
    count = max(1, int(FIRST_STAGE * affordable(1.0) / (setting.epochs * available)))
    write_json(output_dir / "plan.json", {**plan, "long_epochs": 0, "images_per_second": study.throughput})
    study.run(study.missing(first_stage(setting))[:count])
    long_epochs = earlier.get("long_epochs") or next(
        (n for n in setting.long_epochs if FEWEST_LONG * n * available <= affordable(1 - FIRST_STAGE)),
        setting.long_epochs[-1],
    )
    write_json(output_dir / "plan.json", {**plan, "long_epochs": long_epochs, "images_per_second": study.throughput})
    study.run(study.missing(second_stage(study.rows(), long_epochs, setting)))
    return write_report(output_dir)
