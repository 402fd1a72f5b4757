"""The model card of a run: results, comparison, usage, method, training and data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.recipes.baseline import Baseline
from hf_extrap.recipes.run_folder import CARD_FILE, plain
from hf_extrap.training.figures import spoken
from hf_extrap.training.markdown import code, code_block, escaped, escaped_text, one_line
from hf_extrap.training.model_card import CITATION, changed_fields, is_hub_name, method, tags

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
#: Metric -> its name on the Hub, and its definition, with facts to fill in.
METRICS = {
    "accuracy": ("accuracy", "percentage of images whose most likely class is right"),
    "bleu": ("sacrebleu", "corpus BLEU of detokenized, cased text by sacreBLEU, {signature}"),
    "perplexity": (
        "perplexity",
        "exponential of the mean cross entropy in nats over all tokens of the split, of a vocabulary of {vocabulary:,}",
    ),
    "loss": ("loss", "mean cross entropy in nats per token"),
}
#: In a snippet, of a model that is not on the Hub.
PLACE = "path/to/this/model"
USAGE = {
    "language_modeling": """from transformers import pipeline

generator = pipeline("text-generation", "PLACE"CODE)
print(generator("the", max_new_tokens=20)[0]["generated_text"])""",
    "translation": """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PLACE")
model = AutoModelForSeq2SeqLM.from_pretrained("PLACE"CODE)
inputs = tokenizer(["two days"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))""",
    "image_classification": """from transformers import pipeline

classifier = pipeline("image-classification", "PLACE"CODE)
print(classifier("image.png"))""",
}
PROGRAM = {
    "language_modeling": 'hf-extrap generate PLACE "the" --do_sample --top_k 20',
    "translation": 'hf-extrap generate PLACE "two days" --num_beams 5',
    "image_classification": "hf-extrap predict PLACE image.png --top_k 3",
}


def make_card(
    metrics: Mapping[str, Any],
    model: PreTrainedModel,
    figure: str | None,
    baseline: Baseline | None = None,
    repository: str | None = None,
) -> ModelCard:
    """Return the model card of a finished run.

    Args:
        metrics: the content of metrics.json.
        model: the trained model.
        figure: name of the figure of the curves beside the card.
        baseline: the run without extrapolation to compare with.
        repository: name on the Hub, for the snippets.
    """
    metrics = plain(metrics)
    facts, arguments, task = metrics["facts"], metrics["arguments"], metrics["task"]
    pipeline, task_name = HUB_TASKS.get(task, (task.replace("_", "-"), task.replace("_", " ").capitalize()))
    metric, definition = _defined(metrics["metric"], facts)
    signature = {"signature": facts["sacrebleu_signature"]} if metric == "sacrebleu" else {}
    dataset, hub_dataset = _dataset_name(facts), _hub_dataset(arguments)
    base = arguments.get("model") if not arguments.get("from_scratch") else None
    title = f"{type(model).__name__} trained on {dataset}"
    config = ExtrapConfig.from_dict(metrics["extrap"])
    results = [
        EvalResult(
            task_type=pipeline,
            task_name=task_name,
            dataset_type=hub_dataset or dataset.replace(" ", "-"),
            dataset_name=dataset,
            dataset_config=arguments.get("dataset_config") if hub_dataset else None,
            dataset_split=split,
            metric_type=metric,
            metric_name=f"{spoken(metrics['metric'])} ({split})",
            metric_value=round(float(value), 4),
            metric_args={"definition": definition, **signature},
        )
        for prefix, split in SPLITS.items()
        if (value := (metrics.get(prefix) or {}).get(f"{prefix}_{metrics['metric']}")) is not None
    ]
    data = ModelCardData(
        library_name="transformers",
        license=_license(arguments),
        base_model=base if is_hub_name(base) else None,
        datasets=[hub_dataset] if hub_dataset else None,
        pipeline_tag=pipeline,
        language=[one_line(facts[key]) for key in LANGUAGES if facts.get(key)] or None,
        tags=tags(metrics["preset"]),
        metrics=[metric],
        model_name=title,
        eval_results=results or None,
    )
    place = repository or PLACE
    changed = changed_fields(config)
    fields = {name: _without_folders(value) for name, value in arguments.items()}
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=escaped(title),
        summary=_summary(metrics, model, dataset),
        preset=metrics["preset"],
        diverged=metrics["status"] == "diverged",
        result_rows=result_rows(metrics),
        definition=escaped_text(f"The {spoken(metrics['metric'])} is the {definition}."),
        comparison_rows=_comparison_rows(metrics, baseline) if baseline else [],
        comparison=_comparison(metrics, baseline) if baseline else "",
        figure=figure,
        usage=code_block(_usage(task, model).replace("PLACE", place), "python"),
        program=code_block(PROGRAM.get(task, "").replace("PLACE", place), "bash"),
        method=method(config, metrics["optimizer"]),
        changed_fields=code_block(changed, "yaml") if changed else "",
        training_rows=training_rows(metrics) + _machine_rows(metrics),
        command=code_block(metrics["command"], "bash"),
        arguments=code_block(yaml.safe_dump(fields, sort_keys=True, allow_unicode=True).strip(), "yaml"),
        extrap_fields=code_block(config.to_yaml().strip(), "yaml"),
        data_rows=[(n.replace("_", " "), escaped(_number(v))) for n, v in {**facts, "dataset": dataset}.items()],
        citation=CITATION,
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
    accumulated = max(metrics.get("accumulation", virtual) // virtual, 1)
    factors = (
        f"{processes} process{'es' * (processes > 1)} × {items // (processes * accumulated * virtual):,} a batch × "
    )
    factors += f"{accumulated} accumulated × {virtual} virtual"
    global_batch = f"{items:,}" if units == items else f"{items:,} batches, about {units:,.0f} tokens,"
    rows = {
        "base optimizer": metrics["optimizer"],
        "peak learning rate": metrics["peak_learning_rate"],
        "steps": metrics["steps"],
        "epochs": metrics["epochs"],
        "workers": f"{processes * virtual} ({processes} process{'es' * (processes > 1)} × {virtual} virtual)",
        "global batch": f"{global_batch} = {factors}",
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


def _hub_dataset(arguments: Mapping[str, Any]) -> str | None:
    """Name of the data on the Hub, if they are from there."""
    dataset = arguments.get("dataset")
    is_local = arguments.get("data_dir") is not None or dataset == "builtin"
    return dataset if not is_local and is_hub_name(dataset) else None


def _license(arguments: Mapping[str, Any]) -> str | None:
    """The given licence; that in the card of a local base model; of new models of built-in data, this package's."""
    if arguments.get("license"):
        return one_line(str(arguments["license"]))
    model = arguments.get("model")
    if model is None:
        is_builtin = arguments.get("data_dir") is None and arguments.get("dataset", "builtin") == "builtin"
        return "apache-2.0" if is_builtin else None
    card = Path(str(model)) / CARD_FILE
    if not card.is_file():
        return None
    try:
        found = ModelCard.load(card).data.license
    # A card from elsewhere may hold anything.
    except Exception:
        return None
    return found if isinstance(found, str) else None


def _defined(metric: str, facts: Mapping[str, Any]) -> tuple[str, str]:
    """Name of a metric on the Hub, and its definition."""
    name, definition = METRICS.get(metric, (metric, metric))
    vocabulary, signature = facts.get("vocabulary_size", 0), facts.get("sacrebleu_signature")
    return name, definition.format(vocabulary=vocabulary, signature=signature)


def _summary(metrics: Mapping[str, Any], model: PreTrainedModel, dataset: str) -> str:
    kind = metrics["task"].replace("_", " ")
    size = metrics["facts"].get("parameters")
    parameters = f" of {size:,} parameters" if isinstance(size, int) else ""
    values = [f"{row[0]} {row[2]}" for row in result_rows(metrics) if not row[0].endswith(" loss") and row[2] != "–"]
    reached = f": {', '.join(values)}" if values else ""
    return (
        f"This {escaped(type(model).__name__)}{parameters} for {kind} was trained on {escaped(dataset)} with "
        f"`hf_extrap`, preset `{metrics['preset']}`{reached}."
    )


def _comparison_rows(metrics: Mapping[str, Any], baseline: Baseline) -> list[list[str]]:
    before, after = result_rows(baseline.metrics), result_rows(metrics)
    values = {row[0]: row[2] for row in before}
    rows = [[row[0], values.get(row[0], "–"), row[2]] for row in after]
    return [*rows, ["seconds a step", *(_number(one.get("seconds_per_step")) for one in (baseline.metrics, metrics))]]


def _comparison(metrics: Mapping[str, Any], baseline: Baseline) -> str:
    given, own = baseline.metrics["arguments"], metrics["arguments"]
    differences = [
        f"{code(name)} is {code(str(_without_folders(given.get(name))))} there and "
        f"{code(str(_without_folders(own.get(name))))} here"
        for name in baseline.differences
    ]
    beside = f" Beside the extrapolation, {'; '.join(differences)}." if differences else ""
    return (
        f"The run {code(one_line(baseline.name))} has the same data, steps, global batch and seed.{beside} One seed "
        "does not show whether a difference is larger than chance."
    )


def _machine_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rows (name, value) of hardware and versions."""
    found = metrics.get("hardware") or {}
    processes, machines = metrics["world_size"], found.get("machines")
    used = f"{processes} × {found['accelerator']}" if found.get("accelerator") else None
    places = f"{machines} machine{'s' * (machines > 1)}" if isinstance(machines, int) else None
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    rows = {"hardware": ", ".join(filter(None, (used, found.get("cpu"), places))), "versions": versions}
    return [[name, escaped(value)] for name, value in rows.items() if value]


def _usage(task: str, model: PreTrainedModel) -> str:
    """A snippet that uses the model; "PLACE" stands for its folder or name."""
    carries_code = type(model).__module__.startswith("hf_extrap.")
    snippet = USAGE.get(task, "").replace("CODE", ", trust_remote_code=True" if carries_code else "")
    return f"# `import hf_extrap` makes trust_remote_code unnecessary.\n{snippet}" if carries_code else snippet


def _without_folders(value: Any) -> Any:
    """Of an absolute path its last part."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
