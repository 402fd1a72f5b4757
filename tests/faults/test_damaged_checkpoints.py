"""A damaged checkpoint is never trained on: a given one is refused, and the newest whole one is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_extrap.training.checkpoints.finding import find_checkpoint
from hf_extrap.training.checkpoints.folders import MANIFEST_FILE
from tests.support.damage import DAMAGES, PICKLED, copy
from tests.support.soak import count
from tests.support.tiny_trainer import gpt2, train, weights

FIELDS: dict[str, Any] = {
    "extrap": "extrap-past",
    "extrap_virtual_workers": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
}
FILES = (
    *("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    *("training_args.bin", "extrap_rank_0.safetensors", "generation_config.json"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The folder of a run of 6 steps with checkpoints 2, 4 and 6, and its weights at the end."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, weights(train(folder, model=gpt2(dropout=0.1), **FIELDS)).clone()


def damaged(whole: Path, folder: Path, name: str, damage: str) -> Path:
    """A copy of the run up to step 4, whose last checkpoint has one damaged file."""
    for step in (2, 4):
        copy(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    DAMAGES[damage](folder / "checkpoint-4" / name, folder / "checkpoint-2" / name)
    return folder / "checkpoint-4"


def test_the_manifest_lists_every_file(whole: tuple[Path, torch.Tensor]) -> None:
    checkpoint = whole[0] / "checkpoint-4"
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    assert {*manifest["files"], MANIFEST_FILE} == {path.name for path in checkpoint.iterdir()}
    assert set(FILES) == set(manifest["files"])
    assert (manifest["step"], manifest["processes"]) == (4, 1)
    assert manifest["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_every_file_is_named(
    whole: tuple[Path, torch.Tensor], tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (*FILES, MANIFEST_FILE):
        checkpoint = damaged(whole[0], tmp_path, name, damage)
        # A manifest that is not there is that of a stock Trainer, and one that links elsewhere can still be read.
        if name == MANIFEST_FILE and damage in ("delete", "dangle", "make_folder", "leave"):
            continue
        with pytest.raises(ValueError, match=rf"checkpoint-4 is damaged: ({name}|it is a copy of)"):
            find_checkpoint(checkpoint, tmp_path, "strict")
        assert find_checkpoint(True, tmp_path, "strict") == tmp_path / "checkpoint-2"
        assert f"{checkpoint} is damaged" in caplog.text and "passed over" in caplog.text
        assert find_checkpoint("true", tmp_path, "warn") == checkpoint
        assert find_checkpoint(checkpoint, tmp_path, "off") == checkpoint


@pytest.mark.parametrize("name", FILES[: count(quick=3, soak=len(FILES))])
@pytest.mark.parametrize("damage", ["delete", "flip", "swap"][: count(quick=2, soak=3)])
def test_the_run_goes_on_from_the_whole_checkpoint_before(
    whole: tuple[Path, torch.Tensor], tmp_path: Path, name: str, damage: str
) -> None:
    damaged(whole[0], tmp_path, name, damage)
    resumed = train(tmp_path, model=gpt2(dropout=0.1), resume=True, **FIELDS)
    assert resumed.resumed_from == tmp_path / "checkpoint-2"
    assert torch.equal(weights(resumed), whole[1])
    # The damaged one has been replaced.
    assert find_checkpoint(tmp_path / "checkpoint-4", tmp_path, "strict") is not None
    assert not (tmp_path / "_incomplete").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "extrap_rank_0.safetensors"])
def test_a_planted_pickle_is_not_loaded_even_without_verification(
    whole: tuple[Path, torch.Tensor], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = damaged(whole[0], tmp_path, name, "plant")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=r"[Ww]eights|damaged"):
        train(tmp_path / "new", resume=str(checkpoint), **{**FIELDS, "checkpoint_integrity": "off"})
    assert not Path(PICKLED).exists()


def test_a_stock_checkpoint_is_used_with_a_warning_and_a_torn_one_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, kind=Trainer, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "checkpoint-4"
    assert find_checkpoint(checkpoint, tmp_path, "strict") == checkpoint
    assert "checkpoint-4 has no checkpoint_manifest.json" in caplog.text
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (checkpoint / name).rename(tmp_path / name)
        with pytest.raises(ValueError, match=r"is damaged: \S+ .*is (missing|unreadable)"):
            find_checkpoint(checkpoint, tmp_path, "strict")
        assert find_checkpoint(True, tmp_path, "strict") == tmp_path / "checkpoint-6"
        (tmp_path / name).rename(checkpoint / name)


def test_no_whole_checkpoint_is_an_error_that_names_each(whole: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to resume from"):
        find_checkpoint(True, tmp_path, "strict")
    for step in (2, 4):
        copy(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no whole checkpoint \(checkpoint-4: optimizer\.pt is missing; checkpoint-2: "
    ):
        find_checkpoint(True, tmp_path, "strict")


def test_a_copy_of_an_older_checkpoint_is_damaged(whole: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    copy(whole[0] / "checkpoint-2", tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="it is a copy of checkpoint-2"):
        find_checkpoint(tmp_path / "checkpoint-4", tmp_path, "strict")
    # Under a name without a number it may stand anywhere.
    copy(whole[0] / "checkpoint-2", tmp_path / "kept")
    assert find_checkpoint(tmp_path / "kept", tmp_path, "strict") == tmp_path / "kept"


def test_the_best_checkpoint_is_verified_before_it_is_loaded(tmp_path: Path) -> None:
    fields = {**FIELDS, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = train(tmp_path, **fields, save_total_limit=2)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    DAMAGES["flip"](best / "model.safetensors", best)
    with pytest.raises(ValueError, match=r"is damaged: model\.safetensors has another checksum"):
        trainer._load_best_model()


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    fields = {**FIELDS, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "max_steps": 8}
    # The loss falls, so that the first evaluation is the best.
    trainer = train(tmp_path, **fields, save_total_limit=2, greater_is_better=True)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        Path(trainer.state.best_model_checkpoint).name,
        "checkpoint-8",
    }
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_extrap.training import trainer as module

    saved = []

    def save_rank_state(*args: Any) -> None:
        saved.append(args)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        original(*args)

    original = module.save_rank_state
    monkeypatch.setattr(module, "save_rank_state", save_rank_state)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, **FIELDS)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert find_checkpoint(True, tmp_path, "strict") == tmp_path / "checkpoint-2"


def test_a_checkpoint_that_was_not_renamed_yet_is_recovered(whole: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    copy(whole[0] / "checkpoint-4", tmp_path / "_incomplete" / "checkpoint-4")
    assert find_checkpoint(True, tmp_path, "strict") == tmp_path / "checkpoint-4"
    # Without its manifest, the last file, it is not whole.
    torn = copy(whole[0] / "checkpoint-4", tmp_path / "_incomplete" / "checkpoint-6")
    (torn / MANIFEST_FILE).unlink()
    assert find_checkpoint(True, tmp_path, "strict") == tmp_path / "checkpoint-4"
