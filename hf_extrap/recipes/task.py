"""What every task shares: its interface, the fields that name the data, loading of splits, and the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import datasets

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

SPLITS = ("train", "validation", "test")
#: File ending -> builder of `datasets` that reads it.
READERS = {"txt": "text", "json": "json", "jsonl": "json", "parquet": "parquet"}
ALLOWED_NAMES = "{train,validation,test}.{txt,json,jsonl,parquet}[.gz]"


@dataclass
class PreparedTask:
    """Everything a trainer needs to train and evaluate one model on one task.

    Attributes:
        metric: Key of the leading metric, without the prefix `eval_`, such as `perplexity`.
        batch_size_unit: Number of units (such as tokens) that one dataset item counts for.
        tokens_per_epoch: Target tokens in one epoch of the training set.
        augment: Changes a training batch that is on its device, at random by the generator alone.
        facts: What the model card and `metrics.json` say about data and vocabulary.
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


@dataclass
class DataArguments:
    """Fields that say which data, and which model if not one made here: shared by all tasks."""

    dataset: str = field(default="builtin", metadata={"help": "'builtin' or the name of a dataset on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    data_dir: str | None = field(
        default=None, metadata={"help": f"Local folder with {ALLOWED_NAMES}; wins over `dataset`."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a model; by default one is made from the task's fields."}
    )
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "Where prepared data is kept; default: <HF datasets cache>/hf_extrap."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many rows of train."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many rows of the others."})

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}: it must be at least 1, or null for all rows.")

    @property
    def cache_root(self) -> Path:
        """Folder for everything that is prepared once and used again."""
        return Path(self.data_cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "hf_extrap").expanduser()


class Task(Protocol):
    """A task turns its own arguments into a `PreparedTask`."""

    name: ClassVar[str]
    arguments_class: ClassVar[type]
    seq2seq: ClassVar[bool]

    def training_defaults(self) -> dict[str, Any]:
        """Fields of the training arguments that the task sets unless the user does."""
        ...

    def prepare(self, arguments: Any, training_arguments: TrainingArguments) -> PreparedTask:
        """Load and encode the data (main process first), and build model, collator and metrics."""
        ...


def parameter_count(model: torch.nn.Module) -> int:
    """The parameters of a model, those that ZeRO-3 has cut up among the processes included."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def load_splits(
    arguments: DataArguments,
    *,
    columns: Sequence[str],
    builtin: Callable[[], datasets.DatasetDict],
    cut_validation: Callable[[datasets.Dataset], tuple[datasets.Dataset, datasets.Dataset]] | None = None,
    take: Callable[[datasets.Dataset, int], datasets.Dataset] | None = None,
) -> datasets.DatasetDict:
    """Load the splits train, validation and test that the arguments name.

    Args:
        arguments: `data_dir` wins over `dataset`; `max_train_samples` and `max_eval_samples` cut the splits.
        columns: Columns that every split must have, such as `("text",)`.
        builtin: Makes the task's own data, for `dataset: builtin`.
        cut_validation: Divides train into what remains and validation, for data that has no validation split; by
            default such data is refused.
        take: Takes so many rows of a split that has more; by default the first ones.

    Raises:
        FileNotFoundError: If `data_dir` or a split in it is missing, or the Hub dataset cannot be found.
        ValueError: If a file cannot be read, lacks a column, or holds no row; or if the dataset lacks a split.
    """
    if arguments.data_dir is not None:
        needed = [name for name in SPLITS if name != "validation" or cut_validation is None]
        splits = _from_folder(Path(arguments.data_dir).expanduser(), arguments.cache_root / "raw", needed)
        origin = f"data_dir {arguments.data_dir!r}"
    elif arguments.dataset == "builtin":
        splits, origin = builtin(), "the built-in data"
    else:
        splits = _from_hub(arguments.dataset, arguments.dataset_config)
        origin = f"dataset {arguments.dataset!r}"
    if cut_validation is not None and "train" in splits and "validation" not in splits:
        splits["train"], splits["validation"] = cut_validation(splits["train"])
    for name in SPLITS:
        if name not in splits:
            raise ValueError(f"{origin} has no split {name!r}: it has {', '.join(splits)}.")
        missing = [column for column in columns if column not in splits[name].column_names]
        if missing:
            raise ValueError(
                f"split {name!r} of {origin} has no column {missing[0]!r}: it has {splits[name].column_names}."
            )
        if len(splits[name]) == 0:
            raise ValueError(f"split {name!r} of {origin} is empty: at least one row is needed.")
    take = take or (lambda rows, count: rows.select(range(count)))
    limits = {"train": arguments.max_train_samples}
    return datasets.DatasetDict(
        {name: _limited(splits[name], limits.get(name, arguments.max_eval_samples), take) for name in SPLITS}
    )


def _limited(
    split: datasets.Dataset, limit: int | None, take: Callable[[datasets.Dataset, int], datasets.Dataset]
) -> datasets.Dataset:
    return split if limit is None or limit >= len(split) else take(split, limit)


def _from_folder(folder: Path, cache_dir: Path, needed: Sequence[str]) -> datasets.DatasetDict:
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir {str(folder)!r} is not a folder: give one with {ALLOWED_NAMES}.")
    splits = {}
    for name in SPLITS:
        candidates = {
            folder / f"{name}.{ending}{gz}": reader for ending, reader in READERS.items() for gz in ("", ".gz")
        }
        found = [path for path in candidates if path.is_file()]
        if not found and name not in needed:
            continue
        if not found:
            raise FileNotFoundError(
                f"data_dir {str(folder)!r} has no file for split {name!r}: it needs {ALLOWED_NAMES}."
            )
        if len(found) > 1:
            raise ValueError(
                f"data_dir {str(folder)!r} has both {found[0].name} and {found[1].name}: keep one of them."
            )
        path = found[0]
        if path.stat().st_size == 0:
            raise ValueError(f"{str(path)!r} is empty: a split needs at least one row.")
        try:
            splits[name] = datasets.load_dataset(
                candidates[path], data_files={name: str(path)}, split=name, cache_dir=str(cache_dir)
            )
        except Exception as error:
            reason = error.__cause__ or error
            raise ValueError(f"{str(path)!r} cannot be read as {candidates[path]}: {_one_line(reason)}") from error
    return datasets.DatasetDict(splits)


def _from_hub(name: str, config: str | None) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(name, config)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"dataset {name!r} is neither 'builtin' nor found on the Hub or in its cache: {_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def content_fingerprint(splits: datasets.DatasetDict, *settings: Any) -> str:
    """Return a hash of all rows and of the settings (JSON values): the key of what is made from them."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12)
    for name, split in splits.items():
        digest.update(name.encode())
        for batch in split.iter(batch_size=1000):
            digest.update(json.dumps(batch, ensure_ascii=False).encode())
    return digest.hexdigest()


def cached_folder(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `root/key`, made once by `build(folder)`.

    It appears under its name only when complete (written beside it, then renamed), so neither a killed nor a
    concurrent process can leave or see half of it.
    """
    final = root / key
    if not final.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{key}-"))
        try:
            build(temporary)
            os.rename(temporary, final)
        except OSError:
            if not final.is_dir():  # not another process that was first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final
