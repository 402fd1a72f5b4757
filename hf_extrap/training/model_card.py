"""The model card of a run: what was trained, how, on what, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes.figures import spoken

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"

# Task of this package -> the Hub's pipeline tag and its spoken name.
_HUB_TASKS = {
    "image_classification": ("image-classification", "Image Classification"),
    "language_modeling": ("text-generation", "Text Generation"),
    "translation": ("translation", "Translation"),
}
_SPLITS = {"eval": "validation", "test": "test"}


def optimizer_name(optimizer: torch.optim.Optimizer | None) -> str:
    """Class name of the base optimizer, found beneath the wrappers of Accelerate and of this package."""
    while True:
        inner = next((getattr(optimizer, name) for name in ("optimizer", "base") if hasattr(optimizer, name)), None)
        if inner is None:
            return type(optimizer).__name__
        optimizer = inner


def make_card(metrics: Mapping[str, Any], model: PreTrainedModel, figure: str | None) -> ModelCard:
    """The card of a finished run.

    Args:
        metrics: the content of metrics.json.
        model: the trained model, for its class and configuration.
        figure: name of the figure beside the card, or None.
    """
    facts, task, metric = metrics["facts"], metrics["task"], metrics["metric"]
    pipeline, task_name = _HUB_TASKS.get(task, (task.replace("_", "-"), task.replace("_", " ").capitalize()))
    dataset = _dataset_name(facts)
    languages = [facts[key] for key in ("language", "source_lang", "target_lang") if facts.get(key)]
    title = f"{type(model).__name__} trained on {dataset}"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        language=languages or None,
        tags=["hf_extrap", "large-batch-training", "extragradient", f"extrap:{metrics['preset']}", "arxiv:2006.05720"],
        metrics=[metric],
        model_name=title,
        eval_results=_eval_results(metrics, task_name, pipeline, dataset, metric) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        preset=metrics["preset"],
        result_rows=result_rows(metrics),
        diverged=metrics["status"] == "diverged",
        figure=figure,
        training_rows=_training_rows(metrics),
        extrap_fields=yaml.safe_dump(metrics["extrap"], sort_keys=False).strip(),
        command=metrics["command"],
        versions=", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
        data_rows=_fact_rows({**facts, "dataset": dataset}),
        loading=_loading(model),
    )


def add_extrapolation(path: Path, preset: str, config: ExtrapConfig, optimizer: torch.optim.Optimizer) -> None:
    """Tell in a stock model card what the stock Trainer does not know: the scheme, and the real base optimizer.

    Args:
        path: of the card; its metadata stay as they are, apart from the tags.
        preset: the scheme's name.
        config: the scheme.
        optimizer: of the training, in whatever wrappers.
    """
    card = ModelCard.load(path)
    card.data.tags = sorted({*(card.data.tags or []), "hf_extrap", f"extrap:{preset}", "arxiv:2006.05720"})
    fields = yaml.safe_dump(config.to_dict(), sort_keys=False).strip()
    card.text += (
        f"\n\n### Extrapolation\n\nGradients were taken at extrapolated points by `hf_extrap`, preset `{preset}`, and "
        f"stepped by {optimizer_name(optimizer)}. The training loss is the loss at the extrapolated point; evaluations "
        f"and weights are at the parameters themselves.\n\n```yaml\n{fields}\n```\n"
    )
    card.save(path)


def result_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rows (name, before, after) of the leading metric and the loss on validation and test."""
    rows = []
    for prefix, split in _SPLITS.items():
        for key in dict.fromkeys((metrics["metric"], "loss")):
            after = metrics[prefix].get(f"{prefix}_{key}") if metrics.get(prefix) else None
            before = (metrics.get("untrained") or {}).get(f"untrained_{key}") if prefix == "eval" else None
            if after is not None or before is not None:
                rows.append([f"{split} {spoken(key)}", _number(before), _number(after)])
    return rows


def worker_words(metrics: Mapping[str, Any]) -> str:
    """How many workers took part, and how they came about."""
    processes, virtual = metrics["world_size"], metrics["virtual_workers"]
    return f"{processes * virtual} ({processes} process{'es' * (processes > 1)} × {virtual} virtual)"


def _batch_words(metrics: Mapping[str, Any]) -> str:
    items, units = metrics["global_batch"], metrics["global_batch_units"]
    return f"{items:,}" if units == items else f"{items:,} batches, about {units:,.0f} tokens"


def _eval_results(
    metrics: Mapping[str, Any], task_name: str, pipeline: str, dataset: str, metric: str
) -> list[EvalResult]:
    found = []
    for prefix, split in _SPLITS.items():
        value = (metrics.get(prefix) or {}).get(f"{prefix}_{metric}")
        if value is not None:
            found.append(
                EvalResult(
                    task_type=pipeline,
                    task_name=task_name,
                    dataset_type=dataset.replace(" ", "-"),
                    dataset_name=dataset,
                    dataset_split=split,
                    metric_type=metric,
                    metric_name=f"{spoken(metric)} ({split})",
                    metric_value=round(float(value), 4),
                )
            )
    return found


def _training_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = {
        "base optimizer": metrics["optimizer"],
        "peak learning rate": metrics["peak_learning_rate"],
        "steps": metrics["steps"],
        "epochs": metrics["epochs"],
        "workers": worker_words(metrics),
        "global batch": _batch_words(metrics),
        "seconds a step": metrics["seconds_per_step"],
        "tokens a second": metrics["tokens_per_second"],
        "samples a second": None if metrics["tokens_per_second"] else metrics["samples_per_second"],
        "seconds of training": metrics["train_seconds"],
        "seed": metrics["seed"],
    }
    return [(name, _number(value)) for name, value in rows.items() if value is not None]


def _dataset_name(facts: Mapping[str, Any]) -> str:
    dataset = str(facts.get("dataset") or "unnamed data")
    if dataset == "builtin":
        return "built-in text"
    # A local folder's name is of use to a reader, its path is not.
    return Path(dataset).name if Path(dataset).is_dir() else dataset


def _loading(model: PreTrainedModel) -> str:
    processor, made = "AutoTokenizer", "tokenizer"
    auto = "AutoModelForSeq2SeqLM" if model.config.is_encoder_decoder else "AutoModelForCausalLM"
    if model.main_input_name == "pixel_values":
        auto, processor, made = "AutoModelForImageClassification", "AutoImageProcessor", "processor"
    lines = [f"from transformers import {auto}, {processor}", ""]
    if type(model).__module__.startswith("hf_extrap."):
        lines.insert(0, "import hf_extrap.recipes.models  # registers the architecture")
    lines += [f'model = {auto}.from_pretrained("PATH")', f'{made} = {processor}.from_pretrained("PATH")']
    return "\n".join(lines)


def _fact_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    # A bar would end the cell.
    return [(name.replace("_", " "), _number(value).replace("|", "\\|")) for name, value in facts.items()]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
