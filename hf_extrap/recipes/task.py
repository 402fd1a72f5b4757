"""The interface between a task and a run: `Task` and `PreparedTask`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


@dataclass
class PreparedTask:
    """Everything a Trainer needs to train and evaluate one model on one task.

    Attributes:
        metric: key of the leading metric, without the prefix `eval_`, such as `perplexity`.
        augment: transforms a training batch on its device, with random numbers from the generator alone.
        batch_size_unit: number of units (such as tokens) that one dataset item counts for.
        tokens_per_epoch: target tokens in one epoch of the training set.
        facts: data and vocabulary, for the model card and metrics.json.
    """

    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase | BaseImageProcessor | None
    train_dataset: Dataset
    eval_dataset: Dataset
    test_dataset: Dataset | None
    data_collator: Callable[..., Any]
    metric: str
    greater_is_better: bool
    compute_metrics: Callable[..., dict[str, float]] | None = None
    preprocess_logits_for_metrics: Callable[..., Any] | None = None
    augment: Callable[[dict[str, Any], torch.Generator], dict[str, Any]] | None = None
    batch_size_unit: float = 1.0
    tokens_per_epoch: int = 0
    samples_per_epoch: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A task turns its own arguments, of `arguments_class`, into a `PreparedTask`, given those of the Trainer."""

    name: ClassVar[str]
    arguments_class: ClassVar[type]
    seq2seq: ClassVar[bool] = False

    def training_defaults(self) -> dict[str, Any]:
        """Return the task's defaults of training arguments."""
        ...

    def prepare(self, arguments: Any, training_arguments: TrainingArguments) -> PreparedTask:
        """Load and encode the data (main process first), and build model, collator and metrics.

        Raises:
            FileNotFoundError: if data or model is missing.
            ValueError: if data, model and training arguments cannot be used, or not together.
        """
        ...


def check_fields(arguments: Any, **conditions: tuple[bool, str]) -> None:
    """Raise a ValueError for the first field whose condition, (whether it holds, what is allowed), does not hold."""
    for name, (holds, allowed) in conditions.items():
        if not holds:
            raise ValueError(f"`{name}` is {getattr(arguments, name)!r}; allowed: {allowed}.")


def parameter_count(model: torch.nn.Module) -> int:
    """Number of parameters, including those that ZeRO-3 has partitioned."""
    return sum(map(element_count, model.parameters()))


def element_count(parameter: torch.nn.Parameter) -> int:
    """Number of elements of a parameter, the whole of one that ZeRO-3 has partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
