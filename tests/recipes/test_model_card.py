"""The card of a run: metadata, comparison, hardware and batch, and what is uploaded to the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_extrap.cli import main
from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes.baseline import find_baseline
from hf_extrap.recipes.hardware import cpu_model
from hf_extrap.recipes.model_card import make_card
from hf_extrap.recipes.models import ExtrapLstmConfig, ExtrapLstmForCausalLM
from hf_extrap.recipes.run_folder import RunFolder, write_json
from hf_extrap.training.figures import CURVES_FILE
from tests.support.fake_hub import fake_hub


@pytest.fixture(scope="module")
def model() -> ExtrapLstmForCausalLM:
    shape = {"vocab_size": 9, "embedding_size": 4, "hidden_size": 4, "num_hidden_layers": 1}
    return ExtrapLstmForCausalLM(ExtrapLstmConfig(**shape))


@pytest.fixture
def metrics(task_runs: Path) -> dict[str, Any]:
    """The numbers of a run with `none`, as if it had been one with `extrap-past`."""
    found = RunFolder(task_runs / "language_modeling").read_metrics()
    return {**found, "preset": "extrap-past", "extrap": ExtrapConfig.preset("extrap-past").to_dict()}


def blocks(card: ModelCard, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [block.split("\n```")[0] for block in card.content.split(f"```{language}\n")[1:]]


def test_metadata_of_new_and_of_pretrained_models(metrics: dict[str, Any], model: Any, tmp_path: Path) -> None:
    def data(**arguments: Any) -> Any:
        given = {**metrics["arguments"], **arguments}
        facts = {**metrics["facts"], "dataset": given.get("dataset", "builtin")}
        return make_card({**metrics, "arguments": given, "facts": facts}, model, None).data

    new = data()
    assert (new.library_name, new.pipeline_tag, new.license) == ("transformers", "text-generation", "apache-2.0")
    assert new.base_model is None and new.datasets is None and new.language == ["en"]
    hub = data(model="openai-community/gpt2", dataset="Salesforce/wikitext", dataset_config="wikitext-2-raw-v1")
    assert (hub.base_model, hub.datasets, hub.license) == ("openai-community/gpt2", ["Salesforce/wikitext"], None)
    assert {(r.dataset_type, r.dataset_config) for r in hub.eval_results} == {
        ("Salesforce/wikitext", "wikitext-2-raw-v1")
    }
    # The configuration alone is no base model, and neither names nor licences are made of local folders.
    assert data(model="openai-community/gpt2", from_scratch=True).base_model is None
    assert data(dataset="Salesforce/wikitext").license is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    local = data(model=str(tmp_path), data_dir="/home/someone/corpus")
    assert (local.base_model, local.datasets, local.license) == (None, None, "mit")
    assert data(model=str(tmp_path), license="cc-by-4.0").license == "cc-by-4.0"
    (tmp_path / "README.md").write_text("no card")
    assert data(model=str(tmp_path)).license is None


@pytest.mark.parametrize(
    ("task", "name", "definition"),
    [
        ("language_modeling", "perplexity", "exponential of the mean cross entropy in nats"),
        ("translation", "sacrebleu", "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:"),
        ("image_classification", "accuracy", "percentage of images"),
    ],
)
def test_results_have_name_split_and_definition(task_runs: Path, task: str, name: str, definition: str) -> None:
    card, metrics = ModelCard.load(task_runs / task / "README.md"), RunFolder(task_runs / task).read_metrics()
    assert card.data.metrics == [name]
    results = {result.dataset_split: result for result in card.data.eval_results}
    assert set(results) == {"validation", "test"}
    for prefix, split in (("eval", "validation"), ("test", "test")):
        result = results[split]
        assert result.metric_type == name and definition in result.metric_args["definition"]
        assert ("signature" in result.metric_args) == (task == "translation")
        assert result.metric_value == round(metrics[prefix][f"{prefix}_{metrics['metric']}"], 4)
    assert definition.replace("|", "\\|") in card.content
    assert f"![Training curves]({CURVES_FILE})" in card.content and (task_runs / task / CURVES_FILE).is_file()


def test_fields_that_differ_and_the_whole_configuration(metrics: dict[str, Any], model: Any) -> None:
    arguments = {**metrics["arguments"], "data_dir": "/home/someone/corpus"}
    card = make_card({**metrics, "arguments": arguments}, model, None)
    changed, fields, whole = map(yaml.safe_load, blocks(card, "yaml"))
    assert changed == {"direction": "past_gradient", "scaling": "layer_step", "step_size": 0.1}
    assert ExtrapConfig.from_dict(whole) == ExtrapConfig.preset("extrap-past")
    assert fields == {**arguments, "data_dir": "corpus", "output_dir": "language_modeling"}
    details = card.content.split("<details>")[1].split("</details>")[0]
    assert "<summary>Whole configuration</summary>" in details and details.count("```yaml") == 2
    assert "/home/someone" not in card.content
    assert "where d is the gradient of the last step, and SGD stepped the parameters x" in card.content
    assert "@inproceedings{lin2020extrapolation" in blocks(card, "bibtex")[0]
    none = make_card({**metrics, "preset": "none", "extrap": ExtrapConfig().to_dict()}, model, None)
    assert len(blocks(none, "yaml")) == 2 and "Gradients were not extrapolated." in none.content


def test_hardware_and_the_factors_of_the_batch(metrics: dict[str, Any], model: Any) -> None:
    own = make_card(metrics, model, None).content
    assert f"| hardware | {cpu_model()}, 1 machine |" in own
    assert "| global batch | 4 = 1 process × 4 a batch × 1 accumulated × 1 virtual |" in own
    several = {"world_size": 4, "virtual_workers": 2, "accumulation": 2, "global_batch": 64, "global_batch_units": 64}
    machines = {"hardware": {"accelerator": "NVIDIA H200", "cpu": "Xeon", "machines": 2}}
    card = make_card({**metrics, **several, **machines}, model, None).content
    assert "| hardware | 4 × NVIDIA H200, Xeon, 2 machines |" in card
    assert "| global batch | 64 = 4 processes × 8 a batch × 1 accumulated × 2 virtual |" in card
    plain = {**several, "virtual_workers": 1, "accumulation": 4}
    card = make_card({**metrics, **plain}, model, None).content
    assert "| global batch | 64 = 4 processes × 4 a batch × 4 accumulated × 1 virtual |" in card


def test_the_baseline_is_the_run_beside_with_the_same_data_steps_batch_and_seed(
    metrics: dict[str, Any], model: Any, task_runs: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    none = RunFolder(task_runs / "language_modeling").read_metrics()

    def beside(name: str, **fields: Any) -> None:
        write_json(tmp_path / name / "metrics.json", {**none, **fields})

    beside("own")
    beside("seed", seed=7)
    beside("steps", steps=7)
    beside("batch", global_batch=8)
    beside("data", facts={**none["facts"], "train_tokens": 5})
    beside("diverged", status="diverged")
    beside("sam", preset="sam")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("{")
    assert find_baseline(own, metrics) is None
    beside("tuned", arguments={**none["arguments"], "learning_rate": 0.25})
    found = find_baseline(own, metrics)
    assert found is not None and (found.name, found.differences) == ("tuned", ["learning_rate"])
    card = make_card(metrics, model, None, found).content
    assert "Beside the extrapolation, `learning_rate` is `0.25` there and `1.0` here." in card
    # A run that differs in nothing else is the better one.
    beside("z_plain", eval={**none["eval"], "eval_perplexity": 123.25})
    found = find_baseline(own, metrics)
    assert found is not None and (found.name, found.differences) == ("z_plain", [])
    card = make_card(metrics, model, None, found).content
    assert f"| validation perplexity | 123.2 | {metrics['eval']['eval_perplexity']:.4g} |" in card
    assert "The run `z_plain` has the same data" in card and "Beside the extrapolation" not in card
    assert find_baseline(own, none) is None


def test_a_run_is_compared_with_the_one_beside_it_and_uploaded_with_its_card(
    tiny_language_model: Path, task_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(task_runs / "language_modeling", tmp_path / "none")
    words = ["train", str(tiny_language_model), "--output_dir", str(tmp_path / "moved"), "--extrap", "extrap-past"]
    with fake_hub(monkeypatch) as hub:
        pushing = ["--push_to_hub", "true", "--hub_model_id", "me/lstm", "--hub_strategy", "every_save"]
        assert main([*words, *pushing]) == 0
    files = hub.only()
    for name in ("model.safetensors", "README.md", CURVES_FILE, "lstm.py", "vocabulary_head.py", "tokenizer.json"):
        assert files[name] == (tmp_path / "moved" / name).read_bytes(), name
    assert not [name for name in files if name.startswith(("extrap_rank_", "optimizer", "rng_state", "_", "check"))]
    card = ModelCard(files["README.md"].decode())
    assert "The run `none` has the same data" in card.content and 'pipeline("text-generation", "me/lstm"' in card.text
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"] == "lstm.ExtrapLstmForCausalLM"


def test_a_licence_may_be_given(tiny_language_model: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    words = ["train", str(tiny_language_model), "--output_dir", str(tmp_path), "--max_steps", "1", "--license", "mit"]
    assert main([*words, "--evaluate_untrained", "false"]) == 0
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
    assert error_of("train", tiny_language_model, "--licence", "mit").startswith("unknown field --licence")
