"""A tiny GPU study, end to end on the CPU, and the pieces that a GPU would run otherwise."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.nn import functional

from hf_extrap.lab.gpu_study.data import Images, Split, load, micro_batches
from hf_extrap.lab.gpu_study.methods import METHODS
from hf_extrap.lab.gpu_study.plan import RATES, best_of, first_stage, how_long, how_many, second_stage
from hf_extrap.lab.gpu_study.report import read_rows
from hf_extrap.lab.gpu_study.slot import Slot
from hf_extrap.lab.gpu_study.study import gpu_study
from hf_extrap.lab.gpu_study.training import Run, Setting, train

CPU = torch.device("cpu")
BY_NAME = {method.name: method for method in METHODS}


def _images(count: int, seed: int = 0) -> Split:
    """Images whose brightness tells their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    noise = torch.randint(20, (count, 3, 32, 32), generator=generator)
    return Split((noise + 22 * labels[:, None, None, None]).to(torch.uint8), labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's parquet files with few images."""
    path = tmp_path_factory.mktemp("cifar10")
    for name, count in (("train", 120), ("test", 40)):
        images, labels = _images(count)
        encoded = []
        for pixels in images.permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
            encoded.append({"bytes": file.getvalue(), "path": None})
        pyarrow.parquet.write_table(pyarrow.table({"img": encoded, "label": labels.numpy()}), path / f"{name}.parquet")
    return path


def test_splits_are_disjoint_and_whole(folder: Path) -> None:
    images = load(folder, CPU)
    assert [len(split.labels) for split in images] == [108, 12, 40]
    seen = torch.cat([images.train.images, images.validation.images]).flatten(1)
    assert len(seen.unique(dim=0)) == 120
    # The brightness of each image still tells its label.
    brightness = images.validation.images.float().mean((1, 2, 3))
    assert torch.equal(brightness.sub(9.5).div(22).round().long(), images.validation.labels)


def test_micro_batches_pass_over_all_images_and_shift_them_by_four_at_most() -> None:
    split = _images(24)
    stream = micro_batches(split, 4, 3, seed=1)
    first_pass = [next(stream) for _ in range(6)]
    assert torch.equal(torch.cat([b.labels for b in first_pass]).bincount(), split.labels.bincount())
    again = next(micro_batches(split, 4, 3, seed=1))
    assert torch.equal(again.images, first_pass[0].images)
    # The middle 24 × 24 of a crop, flipped back or not, is a window of its original.
    crop = first_pass[0].images[0, :, 4:28, 4:28]
    windows = split.images.unfold(2, 24, 1).unfold(3, 24, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 24, 24)
    assert any((windows == candidate).flatten(1).all(1).any() for candidate in (crop, crop.flip(-1)))


def test_a_slot_has_the_gradient_of_its_model() -> None:
    slot = Slot(6, CPU, 8)
    batch = Split(*(t[:6] for t in _images(8)))
    slot.reset(3)
    slot.backward(batch, 0.5)
    loss = functional.cross_entropy(slot.model(pixel_values=batch.images).logits, batch.labels)
    loss.backward()
    expected = slot.layers_of(slot.flat.grad)
    for parameter, half in zip(slot.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * half, rtol=1e-4, atol=1e-6)
    assert math.isclose(slot.loss_sum.item(), loss.item(), rel_tol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose passes are captured")
def test_a_captured_pass_follows_the_parameters() -> None:
    device = torch.device("cuda")
    slot = Slot(64, device)
    batches = [Split(*(t.to(device) for t in _images(64, seed))) for seed in (0, 1)]
    with slot.active():
        for batch in batches:
            slot.reset(1)
            with torch.no_grad():
                slot.flat.mul_(1.1)
            slot.backward(batch, 1.0)
            captured, slot.flat.grad = slot.flat.grad, None
            slot.backward(batch, 0.5)
            slot.backward(batch, 0.5)
            assert (slot.flat.grad - captured).norm() < 0.02 * captured.norm()
            with torch.autocast("cuda", torch.bfloat16):
                loss = functional.cross_entropy(slot.model(pixel_values=batch.images).logits, batch.labels)
            eager = torch.autograd.grad(loss, list(slot.model.parameters()))
            found = torch.cat([g.reshape(-1) for g in slot.layers_of(captured)])
            expected = torch.cat([g.reshape(-1) for g in eager])
            assert (found - expected).norm() < 0.05 * expected.norm()
    torch.cuda.synchronize()


def test_lars_gives_each_weight_the_same_relative_step() -> None:
    slot = Slot(6, CPU, 8)
    slot.reset(0)
    slot.backward(Split(*(t[:6] for t in _images(6))), 1.0)
    before = [w.clone() for w in slot.layers]
    BY_NAME["LARS"].optimizer(slot, 2.0).step()
    ratios = [((w - b).norm() / b.norm()).item() for w, b in zip(slot.layers, before, strict=True) if w.dim() > 1]
    assert ratios == pytest.approx([2e-3] * len(ratios), rel=0.02)


@pytest.mark.parametrize("name", ["LARS", "extrap-past, share 0.5", "Gaussian, share 0.5", "msam, rho 1"])
def test_a_method_trains(name: str) -> None:
    images = Images(_images(96), _images(16, 1), _images(16, 2))
    slot = Slot(8, CPU, 8)
    rate = 2.0 if name == "LARS" else 0.1
    run = Run("a", BY_NAME[name], rate, 0, epochs=6, workers=2)
    row = _finish(train(run, slot, images, Setting(workers=2, worker_batch=8, warm_up=1, depth=8)))
    assert row["steps"] == 36 and not row["diverged"]
    assert row["loss_at_y"][-1] < 0.8 * row["loss_at_y"][0]


def test_schemes_move_the_parameters_and_differ_from_the_base() -> None:
    images = Images(_images(64), _images(16, 1), _images(16, 2))
    slot, setting = Slot(4, CPU, 8), Setting(workers=2, worker_batch=4, warm_up=1, depth=8)
    ends = {}
    for name in ("Nesterov", "extrap-past, share 0.5", "optimistic, ratio 0.127", "past-update, ratio 0.5"):
        _finish(train(Run("a", BY_NAME[name], 0.05, 0, 1, 2), slot, images, setting))
        ends[name] = slot.flat.detach().clone()
    base = ends.pop("Nesterov")
    assert all((end - base).norm() > 1e-4 * base.norm() for end in ends.values())


def test_post_local_sgd_ends_with_equal_workers() -> None:
    images = Images(_images(64), _images(16, 1), _images(16, 2))
    run = Run("b", BY_NAME["extrap-past, ratio 0.127"], 0.05, 1, epochs=2, workers=2, post_local=True)
    row = _finish(train(run, Slot(4, CPU, 8), images, Setting(workers=2, worker_batch=4, warm_up=1, depth=8)))
    assert row["name"].endswith("then post-local SGD") and math.isfinite(row["loss_at_y"][-1])


def test_the_plan_fits_the_time_and_starts_with_every_method_at_a_middle_rate() -> None:
    setting = Setting()
    runs = first_stage(setting)
    assert [run.method.name for run in runs[: len(METHODS)]] == [method.name for method in METHODS]
    assert len({(run.method.name, run.rate) for run in runs}) == len(runs)
    assert sum(run.method in METHODS for run in runs) == 48 and {run.rate for run in runs} == set(RATES)
    for rate in (50_000.0, 100_000.0, 250_000.0):
        assert 0.5 * 300 * rate < 45_000 * setting.epochs * how_many(300, rate, 45_000, setting) < 0.56 * 300 * rate
    assert how_many(300, 100_000, 45_000, setting) == 24
    assert [how_long(s, 100_000, 45_000, setting) for s in (271, 269, 136, 134, 1)] == [60, 30, 30, 15, 15]


def test_the_second_stage_takes_the_best_by_validation() -> None:
    rows = [
        {"stage": "a", "name": name, "family": BY_NAME[name].family, "rate": rate, "validation": v, "diverged": False}
        for name, rate, v in (("heavy ball", 3.2, 80.0), ("Nesterov", 6.4, 81.0), ("extrap-past, ratio 0.5", 3.2, 82.0))
    ]
    assert best_of(rows, "baseline") == (BY_NAME["Nesterov"], 6.4)
    runs = second_stage(rows, 30, Setting())
    assert [(run.name, run.rate, run.workers) for run in runs[:4]] == [
        ("Nesterov", 6.4, 32),
        ("extrap-past, ratio 0.5", 3.2, 32),
        ("extrap-past, ratio 0.5, then post-local SGD", 3.2, 32),
        ("Nesterov, batch of one worker", 0.2, 1),
    ]
    assert min(run.seed for run in runs) == 1


def test_a_study_from_end_to_end(folder: Path, tmp_path: Path) -> None:
    setting = Setting(workers=2, worker_batch=8, warm_up=1, depth=8, epochs=1, long_epochs=(1,), seeds=(1,))
    text = gpu_study(folder, tmp_path, 3, device=CPU, fake_gpu_minutes=0.0005, fraction=0.25, slots=2, setting=setting)
    rows = read_rows(tmp_path / "rows.jsonl")
    stages = [row["stage"] for row in rows]
    assert stages.count("a") >= 10 and stages.count("b") >= 1
    assert {row["batch"] for row in rows} == {2, 4}
    assert all(0 <= row["validation"] <= 100 and row["seconds"] > 0 for row in rows)
    assert "| heavy ball" in text and (tmp_path / "study.png").stat().st_size > 10_000


def _finish(training: object) -> dict[str, object]:
    while True:
        try:
            next(training)  # type: ignore[call-overload]
        except StopIteration as done:
            return done.value
