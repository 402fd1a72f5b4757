"""The model card of a run: results, training, extrapolation, data, and how to load the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_extrap.recipes.markdown import code_block, escaped, one_line
from hf_extrap.recipes.run_folder import plain
from hf_extrap.recipes.task import spoken

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
#: Task -> pipeline tag of the Hub and its title.
HUB_TASKS = {
    "image_classification": ("image-classification", "Image Classification"),
    "language_modeling": ("text-generation", "Text Generation"),
    "translation": ("translation", "Translation"),
}
#: Facts that name a language.
LANGUAGES = ("language", "source_lang", "target_lang")
#: Prefix of a metric -> split that it was measured on.
SPLITS = {"eval": "validation", "test": "test"}


def make_card(metrics: Mapping[str, Any], model: PreTrainedModel, figure: str | None) -> ModelCard:
    """Return the model card of a finished run, from metrics.json, with the figure of this name beside the card."""
    metrics = plain(metrics)
    facts, metric = metrics["facts"], metrics["metric"]
    task = metrics["task"]
    pipeline, task_name = HUB_TASKS.get(task, (task.replace("_", "-"), task.replace("_", " ").capitalize()))
    dataset = _dataset_name(facts)
    title = f"{type(model).__name__} trained on {dataset}"
    results = [
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
        for prefix, split in SPLITS.items()
        if (value := (metrics.get(prefix) or {}).get(f"{prefix}_{metric}")) is not None
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        language=[one_line(facts[key]) for key in LANGUAGES if facts.get(key)] or None,
        tags=["hf_extrap", "large-batch-training", "extragradient", f"extrap:{metrics['preset']}", "arxiv:2006.05720"],
        metrics=[metric],
        model_name=title,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=escaped(title),
        preset=metrics["preset"],
        result_rows=result_rows(metrics),
        diverged=metrics["status"] == "diverged",
        figure=figure,
        training_rows=training_rows(metrics),
        extrap_fields=yaml.safe_dump(metrics["extrap"], sort_keys=False).strip(),
        command=code_block(metrics["command"], "bash"),
        versions=", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
        data_rows=[(n.replace("_", " "), escaped(_number(v))) for n, v in {**facts, "dataset": dataset}.items()],
        loading=_loading(model),
    )


def result_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rows (name, before training, after training) of the leading metric and the loss on validation and test."""
    rows = []
    for prefix, split in SPLITS.items():
        for key in dict.fromkeys((metrics["metric"], "loss")):
            after = (metrics.get(prefix) or {}).get(f"{prefix}_{key}")
            before = (metrics.get("untrained") or {}).get(f"untrained_{key}") if prefix == "eval" else None
            if after is not None or before is not None:
                rows.append([f"{split} {spoken(key)}", _number(before), _number(after)])
    return rows


def training_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rows (name, value) of optimizer, steps, workers, batch, speed and seed, without missing values."""
    processes, virtual = metrics["world_size"], metrics["virtual_workers"]
    items, units = metrics["global_batch"], metrics["global_batch_units"]
    rows = {
        "base optimizer": metrics["optimizer"],
        "peak learning rate": metrics["peak_learning_rate"],
        "steps": metrics["steps"],
        "epochs": metrics["epochs"],
        "workers": f"{processes * virtual} ({processes} process{'es' * (processes > 1)} × {virtual} virtual)",
        "global batch": f"{items:,}" if units == items else f"{items:,} batches, about {units:,.0f} tokens",
        "seconds a step": metrics["seconds_per_step"],
        "of which waiting for data": metrics["data_seconds_per_step"],
        "tokens a second": metrics["tokens_per_second"],
        "samples a second": None if metrics["tokens_per_second"] else metrics["samples_per_second"],
        "seconds of training": metrics["train_seconds"],
        "seed": metrics["seed"],
    }
    return [[name, _number(value)] for name, value in rows.items() if value is not None]


def _dataset_name(facts: Mapping[str, Any]) -> str:
    dataset = str(facts.get("dataset") or "unnamed data")
    if dataset == "builtin":
        return "built-in text"
    # Of a local folder the card gives the name, not the path.
    is_path = os.path.isabs(dataset) or os.path.isdir(dataset)
    return one_line(Path(dataset).name if is_path else dataset)


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


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
