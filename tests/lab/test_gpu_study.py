"""The GPU study on the CPU: its parts, and both stages from end to end at a tiny size."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.nn import functional

from hf_extrap.lab.gpu_study.data import Images, Split, load, micro_batches
from hf_extrap.lab.gpu_study.methods import BY_NAME
from hf_extrap.lab.gpu_study.report import read_rows
from hf_extrap.lab.gpu_study.slot import Slot
from hf_extrap.lab.gpu_study.study import best_of, first_stage, gpu_study, second_stage
from hf_extrap.lab.gpu_study.training import Run, Setting, Training, train

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"workers": 2, "worker_batch": 2, "warm_up": 1, "depth": 8}


def _images(count: int, seed: int = 0) -> Split:
    """Images whose brightness tells their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    noise = torch.randint(20, (count, 3, 32, 32), generator=generator)
    return Split((noise + 22 * labels[:, None, None, None]).to(torch.uint8), labels)


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(_images(16), _images(4, 1), _images(4, 2))


@pytest.fixture(scope="module")
def slot() -> Slot:
    return Slot(2, CPU, 8)


def _finish(training: Training) -> dict[str, Any]:
    while True:
        try:
            next(training)
        except StopIteration as stop:
            return stop.value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's parquet files with few images."""
    path = tmp_path_factory.mktemp("cifar10")
    for name, count in (("train", 20), ("test", 4)):
        images, labels = _images(count)
        encoded = []
        for pixels in images.permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            encoded.append({"bytes": file.getvalue(), "path": None})
        table = pyarrow.table({"img": encoded, "label": labels.numpy()})
        pyarrow.parquet.write_table(table, path / f"{name}.parquet")
    return path


def test_splits_are_those_of_the_files(folder: Path) -> None:
    loaded = load(folder, CPU)
    assert [len(split.labels) for split in loaded] == [18, 2, 4]
    images, labels = _images(20)
    both = [torch.cat(parts) for parts in zip(loaded.validation, loaded.train, strict=True)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(both, [images[order], labels[order]], rtol=0, atol=0)


def test_a_pass_of_micro_batches_has_every_image_once() -> None:
    split = _images(24)
    first = [batch for batch, _ in zip(micro_batches(split, 4, 3, 5), range(6), strict=False)]
    again = next(micro_batches(split, 4, 3, 5))
    assert sorted(torch.cat([b.labels for b in first]).tolist()) == sorted(split.labels.tolist())
    assert torch.equal(first[0].images, again.images) and first[0].images.dtype == torch.uint8
    # The middle of a crop, flipped back or not, is a window of its original.
    crop = first[0].images[0, :, 4:28, 4:28]
    windows = split.images.unfold(2, 24, 1).unfold(3, 24, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)
    assert any((windows == candidate.reshape(3, -1).flatten()).all(-1).any() for candidate in (crop, crop.flip(-1)))


def test_a_slot_has_the_gradient_of_its_model(slot: Slot) -> None:
    batch = Split(*(t[:2] for t in _images(8)))
    slot.reset(3)
    slot.backward(batch, 0.5)
    loss = functional.cross_entropy(slot.model(pixel_values=batch.images).logits, batch.labels)
    loss.backward()
    assert slot.flat.grad is not None
    for parameter, half in zip(slot.model.parameters(), slot.layers_of(slot.flat.grad), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * half, rtol=1e-4, atol=1e-6)
    assert math.isclose(slot.loss_sum.item(), loss.item(), rel_tol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_pass_follows_the_parameters() -> None:
    device = torch.device("cuda")
    slot = Slot(64, device)
    with slot.active():
        for seed in (0, 1):
            batch = Split(*(t.to(device) for t in _images(64, seed)))
            slot.reset(1)
            with torch.no_grad():
                slot.flat.mul_(1.1)
            slot.backward(batch, 1.0)
            with torch.autocast("cuda", torch.bfloat16):
                loss = functional.cross_entropy(slot.model(pixel_values=batch.images).logits, batch.labels)
            eager = torch.autograd.grad(loss, list(slot.model.parameters()))
            assert slot.flat.grad is not None
            found = torch.cat([g.reshape(-1) for g in slot.layers_of(slot.flat.grad)])
            expected = torch.cat([g.reshape(-1) for g in eager])
            assert (found - expected).norm() < 0.05 * expected.norm()
    torch.cuda.synchronize()


def test_lars_gives_each_weight_the_same_relative_step(slot: Slot) -> None:
    slot.reset(0)
    slot.backward(Split(*(t[:2] for t in _images(4))), 1.0)
    before = [w.clone() for w in slot.layers_of(slot.flat.detach())]
    BY_NAME["LARS"].optimizer(slot, 2.0).step()
    pairs = zip(slot.layers_of(slot.flat.detach()), before, strict=True)
    ratios = [((w - b).norm() / b.norm()).item() for w, b in pairs if w.dim() > 1]
    assert ratios == pytest.approx([2e-3] * len(ratios), rel=0.02)


def test_schemes_move_the_parameters_and_differ_from_their_base(slot: Slot, images: Images) -> None:
    names = ("extrap-past, share 0.5", "optimistic, ratio 0.127", "Gaussian, share 0.5", "past-update, ratio 0.5")
    ends = {}
    for name in ("heavy ball", "Nesterov", *names, "msam, rho 1"):
        row = _finish(train(Run("a", BY_NAME[name], 0.05, 0, 1, 2), slot, images, Setting(**TINY)))
        assert row["steps"] == 4 and not row["diverged"]
        ends[name] = slot.flat.detach().clone()
    for name in (*names, "msam, rho 1"):
        base = ends["heavy ball" if BY_NAME[name].base == "heavy-ball" else "Nesterov"]
        assert (ends[name] - base).norm() > 1e-4 * base.norm(), name


def test_a_method_trains(slot: Slot, images: Images) -> None:
    run = Run("a", BY_NAME["extrap-past, share 0.5"], 0.1, 0, epochs=12, workers=2)
    row = _finish(train(run, slot, images, Setting(**TINY)))
    assert row["loss_at_y"][-1] < 0.8 * row["loss_at_y"][0]


def test_post_local_sgd_averages_the_workers(slot: Slot, images: Images) -> None:
    method, losses = BY_NAME["extrap-past, ratio 0.127"], []
    for post_local in (False, True):
        run = Run("b", method, 0.05, 1, epochs=2, workers=2, post_local=post_local)
        losses.append(_finish(train(run, slot, images, Setting(**TINY)))["loss_at_y"])
    assert losses[0][:2] == losses[1][:2] and losses[0][3] != losses[1][3] and math.isfinite(losses[1][3])


def test_the_second_stage_takes_the_best_of_each_family_by_validation() -> None:
    tuned = (
        ("heavy ball", 3.2, 80.0),
        ("Nesterov", 6.4, 81.0),
        ("LARS", 9.6, 70.0),
        ("optimistic, ratio 0.127", 1, 60),
    )
    rows = [{"stage": "a", "name": n, "rate": rate, "validation": v, "diverged": False} for n, rate, v in tuned]
    assert best_of(rows, "baseline") == (BY_NAME["Nesterov"], 6.4) and best_of(rows, "msam") is None
    assert [(run.name, run.rate, run.workers, run.seed) for run in second_stage(rows, 30, Setting())[:5]] == [
        ("Nesterov", 6.4, 32, 1),
        ("LARS", 9.6, 32, 1),
        ("optimistic, ratio 0.127", 1, 32, 1),
        ("optimistic, ratio 0.127, then post-local SGD", 1, 32, 1),
        ("Nesterov, batch of one worker", 0.2, 1, 1),
    ]


def test_a_study_from_end_to_end_and_what_is_left_of_it(folder: Path, tmp_path: Path) -> None:
    setting = Setting(**TINY, epochs=1, rates=(0.1, 0.2), long_epochs=(1,), seeds=(1,))
    # 18 images a run: 55 % of the time is enough for 3 runs of the first stage.
    options: dict[str, Any] = {"slots": 2, "setting": setting, "probe_seconds": 0.05}
    options["fake_gpu_minutes"] = 3.5 * 18 / 0.55 / 100_000 / 60
    text = gpu_study(folder, tmp_path, 3, **options)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["name"] for row in rows if row["stage"] == "a"] == [run.method.name for run in first_stage(setting)[:3]]
    assert [row["batch"] for row in rows if row["stage"] == "b"] == [4, 4, 2]
    assert {row["rate"] for row in rows if row["name"] == "LARS"} == {0.8}
    assert all(0 <= row["validation"] <= 100 and row["seconds"] > 0 for row in rows)
    assert "| heavy ball" in text and (tmp_path / "figure.png").stat().st_size > 10_000
    gpu_study(folder, tmp_path, 3, **options)
    more = read_rows(tmp_path / "rows.jsonl")
    assert more[: len(rows)] == rows and sum(row["stage"] == "a" for row in more) == 6
    assert len({(row["stage"], row["name"], row["rate"], row["seed"]) for row in more}) == len(more)
    with pytest.raises(ValueError, match="epochs is 2; allowed with the rows of .*: 1"):
        gpu_study(folder, tmp_path, 3, **{**options, "setting": Setting(**{**vars(setting), "epochs": 2})})
