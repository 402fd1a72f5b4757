"""Uploads to a fake Hub: weights at x, card and figure; what is left out; and resuming from an uploaded checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load
from transformers import Trainer

from hf_extrap import ExtrapConfig, ExtrapTrainer
from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM
from tests.support.fake_hub import FakeHub, connect, fake_hub
from tests.support.tiny_trainer import VOCABULARY, make, train, weights

#: Files of training that the upload of a model must not hold.
OF_TRAINING = ("extrap_rank_", "optimizer", "scheduler", "rng_state", "trainer_state", "checkpoint_manifest", "_")
CARD = {"README.md", "curves.png"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as found:
        yield found


def pushed(folder: Path, strategy: str, **fields: Any) -> Trainer:
    """Train six steps with a save after three and six."""
    fields = {"extrap": "extrap-past", "save_strategy": "steps", "save_steps": 3, **fields}
    options = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True, "hub_model_id": "me/model"}
    trainer = train(folder, **options, **fields)
    trainer._finish_current_push()
    return trainer


def stored(hub: FakeHub) -> torch.Tensor:
    """The embeddings in the uploaded weights."""
    return load(hub.only()["model.safetensors"])["transformer.wte.weight"]


def test_the_upload_holds_x_card_and_figure(hub: FakeHub, tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", extrap="extrap-past", save_strategy="steps", save_steps=3)
    optimizer = trainer.extrapolated  # type: ignore[attr-defined]
    x = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    # As after an interruption in a pass at y.
    optimizer.train()
    assert not torch.equal(trainer.model.state_dict()["transformer.wte.weight"], x["transformer.wte.weight"])
    trainer.push_to_hub()
    uploaded = load(hub.only()["model.safetensors"])
    assert uploaded and all(torch.equal(tensor, x[name]) for name, tensor in uploaded.items())
    assert set(hub.files) == {"user/run"} and hub.messages == ["End of training"]
    assert hub.only().keys() >= {"config.json", *CARD}
    assert not [path for path in hub.only() if path.startswith(OF_TRAINING) or "/" in path]
    card = ModelCard(hub.only()["README.md"].decode())
    assert "![Training curves](curves.png)" in card.text and hub.only()["curves.png"].startswith(b"\x89PNG")
    assert {"hf_extrap", "extrap:extrap-past", "arxiv:2006.05720"} <= set(card.data.tags)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_strategies(hub: FakeHub, tmp_path: Path, strategy: str) -> None:
    trainer = pushed(tmp_path / "run", strategy)
    files = hub.only()
    if strategy == "end":
        assert files == {} and hub.messages == []
        trainer.save_model()
        assert hub.messages == ["Model save"]
    root = {path for path in files if "/" not in path}
    assert root >= {"model.safetensors", "config.json", *CARD}
    assert not [path for path in root if path.startswith(OF_TRAINING)]
    assert torch.equal(stored(hub), trainer.model.state_dict()["transformer.wte.weight"])
    expected = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-3", "checkpoint-6"]}
    folders = sorted({path.split("/")[0] for path in files if "/" in path})
    assert folders == expected.get(strategy, [])
    for folder in folders:
        local = tmp_path / "run" / ("checkpoint-6" if folder == "last-checkpoint" else folder)
        uploaded = {path.removeprefix(f"{folder}/") for path in files if path.startswith(f"{folder}/")}
        # A resume needs all of them.
        assert uploaded == {path.name for path in local.iterdir()}
        assert {"extrap_rank_0.safetensors", "optimizer.pt", "checkpoint_manifest.json"} <= uploaded


def in_processes(folder: Path, endpoint: str) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, endpoint)
        trainer = pushed(folder / "run", "checkpoint", max_steps=3)
        trainer.push_to_hub()
    return {"x": trainer.model.state_dict()["transformer.wte.weight"]}


@pytest.mark.distributed
def test_files_of_each_process_are_uploaded_with_a_checkpoint_alone(
    hub: FakeHub, tmp_path: Path, run_processes: Callable[..., list[Any]]
) -> None:
    results = run_processes("tests.training.test_hub", tmp_path, hub.endpoint)
    assert torch.equal(results[0]["x"], results[1]["x"]) and torch.equal(results[0]["x"], stored(hub))
    root = {path for path in hub.only() if "/" not in path}
    assert root >= {"model.safetensors", *CARD} and not [path for path in root if path.startswith(OF_TRAINING)]
    uploaded = {path.removeprefix("last-checkpoint/") for path in hub.only() if "/" in path}
    assert uploaded == {path.name for path in (tmp_path / "run" / "checkpoint-3").iterdir()}
    each = ("extrap_rank_{0}.safetensors", "rng_state_{0}.pth")
    assert {name.format(rank) for name in each for rank in (0, 1)} <= uploaded


def test_an_uploaded_checkpoint_resumes_bit_for_bit(hub: FakeHub, tmp_path: Path) -> None:
    whole = pushed(tmp_path / "run", "all_checkpoints")
    place = hub.download("checkpoint-3", tmp_path / "last-checkpoint")
    resumed = train(tmp_path / "resumed", extrap="extrap-past", resume=str(place))
    assert resumed.resumed_from == place  # type: ignore[attr-defined]
    assert torch.equal(weights(resumed), weights(whole))
    # Without one of its files it is refused.
    (place / "extrap_rank_0.safetensors").unlink()
    with pytest.raises(ValueError, match="extrap_rank_0.safetensors"):
        train(tmp_path / "refused", extrap="extrap-past", resume=str(place))


def test_every_save_uploads_the_code_of_the_model(hub: FakeHub, tmp_path: Path) -> None:
    shape = {"vocab_size": VOCABULARY, "embedding_size": 4, "hidden_size": 4, "num_hidden_layers": 1}
    model = ExtrapLstmForCausalLM(ExtrapLstmConfig(**shape))
    pushed(tmp_path / "run", "every_save", model=model, max_steps=3)
    assert hub.only().keys() >= {"lstm.py", "vocabulary_head.py", "config.json", "model.safetensors"}


def test_the_card_of_a_trainer_lists_what_differs_from_the_defaults(tmp_path: Path) -> None:
    trainer = train(tmp_path, extrap="sam", extrap_step_size=0.02, max_steps=1)
    trainer.create_model_card()
    text = ModelCard.load(tmp_path / "README.md").text
    changed, whole = (yaml.safe_load(block.split("```")[0]) for block in text.split("```yaml\n")[1:])
    assert changed == {
        **{"direction": "gradient", "scaling": "norm", "step_size": 0.02, "ascent": True, "anneal": False, "seed": 42}
    }
    assert ExtrapConfig.from_dict(whole) == trainer.extrap_config  # type: ignore[attr-defined]
    assert "<summary>All fields</summary>" in text
    assert "y = x + η · S(d, x), where d is a fresh gradient at x, and SGD stepped" in text
    assert "@inproceedings{lin2020extrapolation" in text
    assert "This model was trained from scratch on" in text and "[](" not in text


@pytest.mark.parametrize("name", ["x](javascript:1) <b>", "a *b* `c`", "a\n---\nlicense: mit"])
def test_names_in_the_card_of_a_trainer_are_text(tmp_path: Path, name: str) -> None:
    for kind in ("extrap-past", "none"):
        trainer = make(tmp_path, extrap=kind)
        trainer.create_model_card(model_name=name)
        card = ModelCard.load(tmp_path / "README.md")
        title = next(line for line in card.text.splitlines() if line.startswith("# "))
        assert not re.search(r"(?<!\\)[\[\]<>*`]", title)
        assert card.data.license is None


def test_without_extrapolation_the_card_is_the_stock_one(tmp_path: Path) -> None:
    texts = []
    for kind in (Trainer, ExtrapTrainer):
        make(tmp_path, kind).create_model_card(model_name="toy")
        texts.append((tmp_path / "README.md").read_text())
    nameless, scratch = "is a fine-tuned version of [](https://huggingface.co/) on", "was trained from scratch on"
    assert ModelCard(texts[1]).data.to_dict() == ModelCard(texts[0]).data.to_dict()
    assert ModelCard(texts[1]).text.strip() == ModelCard(texts[0]).text.replace(nameless, scratch).strip()
    assert not (tmp_path / "curves.png").exists()
