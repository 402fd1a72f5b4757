"""The data of a task: fields that name it, its splits, and a cache of what is prepared from it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_extrap.recipes.task import check_fields
from hf_extrap.training.argument_types import check_numbers
from hf_extrap.training.arguments import described
from hf_extrap.training.checkpoints.manifest import checksum_of
from hf_extrap.training.checkpoints.matching import INDEX_FILE, shard_names
from hf_extrap.training.extras import extra

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
DIGESTS_FILE = "digests.json"
#: File extension -> builder of `datasets` that reads it.
READERS = {"txt": "text", "json": "json", "jsonl": "json", "parquet": "parquet"}
ALLOWED_NAMES = "{train,validation,test}.{txt,json,jsonl,parquet}[.gz]"


@dataclass
class DataArguments:
    """Fields of every task that name the data, and a model to start from."""

    dataset: str = described("builtin", "'builtin' or the name of a dataset on the Hub.")
    dataset_config: str | None = described(None, "Configuration of the Hub dataset.")
    data_dir: str | None = described(None, f"Local folder with {ALLOWED_NAMES}; takes precedence over `dataset`.")
    model: str | None = described(None, "Folder or Hub name of a model; default: a new one, by the task's fields.")
    data_cache_dir: str | None = described(None, "Folder for prepared data; default: <HF datasets cache>/hf_extrap.")
    max_train_samples: int | None = described(None, "Limit of the rows of train.")
    max_eval_samples: int | None = described(None, "Limit of the rows of validation and test.")

    def __post_init__(self) -> None:
        check_numbers(self)
        names = ("max_train_samples", "max_eval_samples")
        limits = {name: getattr(self, name) is None or getattr(self, name) >= 1 for name in names}
        check_fields(self, **{name: (holds, "at least 1, or null for all rows") for name, holds in limits.items()})

    @property
    def cache_root(self) -> Path:
        """Folder of all prepared data."""
        if self.data_cache_dir:
            return Path(self.data_cache_dir).expanduser()
        with extra("recipes"):
            import datasets
        return Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "hf_extrap"


def load_splits(
    arguments: DataArguments,
    *,
    columns: Sequence[str],
    builtin: Callable[[], DatasetDict],
    cut_validation: Callable[[Dataset], tuple[Dataset, Dataset]] | None = None,
    take: Callable[[Dataset, int], Dataset] = lambda rows, count: rows.select(range(count)),
) -> DatasetDict:
    """Load the splits train, validation and test, each with the given columns.

    `builtin` builds the data of `dataset: builtin`, `cut_validation` divides the rows of train for data without a
    validation split, and `take` selects that many rows of a longer split, by default the first ones.

    Raises:
        FileNotFoundError: if `data_dir` or the file of a split is missing, or the Hub dataset cannot be found.
        ValueError: if a file cannot be read, a split is missing or empty, or a column is missing.
    """
    if arguments.data_dir is not None:
        optional = () if cut_validation is None else ("validation",)
        splits = _from_folder(Path(arguments.data_dir).expanduser(), arguments.cache_root / "raw", optional)
        origin = f"data_dir {arguments.data_dir!r}"
    elif arguments.dataset == "builtin":
        splits, origin = builtin(), "the built-in data"
    else:
        with extra("recipes"):
            import datasets
        origin = f"dataset {arguments.dataset!r}"
        try:
            splits = datasets.load_dataset(arguments.dataset, arguments.dataset_config)  # nosec B615 # the user names it
        except (ConnectionError, FileNotFoundError) as error:
            missing = f"{origin} is neither 'builtin' nor found on the Hub or in its cache: {_one_line(error)}"
            raise FileNotFoundError(missing) from error
    if cut_validation is not None and "train" in splits and "validation" not in splits:
        splits["train"], splits["validation"] = cut_validation(splits["train"])
    found = type(splits)()
    for name in SPLITS:
        if name not in splits:
            raise ValueError(f"{origin} has no split {name!r}: it has {', '.join(splits)}.")
        rows = splits[name]
        for column in columns:
            if column not in rows.column_names:
                raise ValueError(f"split {name!r} of {origin} has no column {column!r}: it has {rows.column_names}.")
        if len(rows) == 0:
            raise ValueError(f"split {name!r} of {origin} is empty; allowed: at least one row.")
        limit = arguments.max_train_samples if name == "train" else arguments.max_eval_samples
        found[name] = rows if limit is None or limit >= len(rows) else take(rows, limit)
    return found


def split_files(folder: Path, name: str) -> list[tuple[Path, str]]:
    """The files of a split in a folder, each with the builder of `datasets` that reads it."""
    files = {folder / f"{name}.{ending}{gz}": reader for ending, reader in READERS.items() for gz in ("", ".gz")}
    return [(path, reader) for path, reader in files.items() if path.is_file()]


def _from_folder(folder: Path, cache_dir: Path, optional: Sequence[str]) -> DatasetDict:
    with extra("recipes"):
        import datasets

    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir {str(folder)!r} is not a folder; allowed: one with {ALLOWED_NAMES}.")
    splits = datasets.DatasetDict()
    for name in SPLITS:
        found = split_files(folder, name)
        if not found and name in optional:
            continue
        if not found:
            raise FileNotFoundError(
                f"data_dir {str(folder)!r} has no file for split {name!r}: it needs {ALLOWED_NAMES}."
            )
        path, reader = found[0]
        if len(found) > 1:
            raise ValueError(f"data_dir {str(folder)!r} has both {path.name} and {found[1][0].name}; keep one of them.")
        if path.stat().st_size == 0:
            raise ValueError(f"{str(path)!r} is empty; allowed: at least one row.")
        splits[name] = _read_file(path, reader, cache_dir)
    return splits


def _read_file(path: Path, reader: str, cache_dir: Path) -> Dataset:
    """The rows of a data file, cached under a hash of its content."""
    import datasets

    file = str(path)

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as raw:
            try:
                rows = datasets.load_dataset(reader, data_files=file, split="train", cache_dir=raw)  # nosec B615 # local
            except Exception as error:
                reason = _one_line(error.__cause__ or error).removesuffix(".")
                raise ValueError(f"{file!r} cannot be read as {reader}: {reason}.") from error
            _check_images(rows, path)
            rows.save_to_disk(folder / "rows")

    key = f"{reader}-{path.suffix.removeprefix('.')}-{file_digest(path)}"
    return datasets.load_from_disk(str(cached_folder(cache_dir, key, build) / "rows"))


def _check_images(rows: Dataset, path: Path) -> None:
    """Refuse rows that name image files instead of holding images: a name may lead to any file of this machine."""
    import datasets

    for column in [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]:
        encoded = rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        for batch in encoded.iter(batch_size=1000):
            if any(image is None or image["bytes"] is None for image in batch[column]):
                raise ValueError(f"{str(path)!r} has a row without an image in {column!r}; allowed: encoded images.")


def check_texts(splits: DatasetDict, column: str) -> None:
    """Raise a ValueError for the first row whose value in this column is not a text."""
    for name, rows in splits.items():
        batches = rows.select_columns(column).iter(batch_size=1000)
        for number, text in enumerate(text for batch in batches for text in batch[column]):
            if not isinstance(text, str):
                raise ValueError(f"row {number} of split {name!r} has no text in {column!r}: {text!r:.80}.")


def load_pretrained(auto: Any, name: str) -> Any:
    """Load a configuration, tokenizer, image processor or model by its Auto class; the code in it is never run.

    Raises:
        FileNotFoundError: it is not found.
        ValueError: its files are damaged, or a model lacks weights.
    """
    parts = {"AutoConfig": "configuration", "AutoTokenizer": "tokenizer", "AutoImageProcessor": "image processor"}
    is_model, index = auto.__name__ not in parts, Path(name) / INDEX_FILE
    what = "model" if is_model else f"{parts[auto.__name__]} of model"
    if is_model and os.path.isfile(index):
        # Transformers would follow ../x.
        shard_names(index)
    try:
        found = auto.from_pretrained(
            name, trust_remote_code=False, **({"output_loading_info": True} if is_model else {})
        )
    except OSError as error:
        raise FileNotFoundError(f"{what} {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    # Damaged files raise errors of many types.
    except Exception as error:
        raise ValueError(f"{what} {name!r} cannot be loaded: {_one_line(error)}.") from error
    if not is_model:
        return found
    model, information = found
    if missing := sorted(information["missing_keys"]):
        raise ValueError(f"model {name!r} has no weight {missing[0]!r} of its configuration; allowed: all weights.")
    return model


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def content_fingerprint(splits: DatasetDict, *settings: Any) -> str:
    """Return a hash of all rows and of the settings (JSON values): the cache key of what is prepared from them."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12)
    for name, split in splits.items():
        digest.update(name.encode())
        for batch in split.iter(batch_size=1000):
            digest.update(json.dumps(batch, ensure_ascii=False).encode())
    return digest.hexdigest()


def cached_folder(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `root/key`; `build(folder)` fills it the first time, and again if a file in it has changed.

    It is filled under a temporary name and then renamed, so that no process ever sees an incomplete folder. Its file
    `digests.json` holds the checksum of every other file.
    """
    final = root / key
    if final.is_dir() and _is_intact(final):
        return final
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{key}-"))
    try:
        filled, damaged = temporary / "filled", temporary / "damaged"
        filled.mkdir()
        build(filled)
        (filled / DIGESTS_FILE).write_text(json.dumps(_digests(filled)), encoding="utf-8")
        if final.is_symlink() or final.exists():
            logger.warning("%s is damaged: it is prepared again", final)
            with suppress(FileNotFoundError):  # another process was faster
                os.rename(final, damaged)
        os.rename(filled, final)
    except OSError:
        if not (final.is_dir() and _is_intact(final)):  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _digests(folder: Path) -> dict[str, str]:
    """The checksum of every file in a folder, by its relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_dir() and name != DIGESTS_FILE:
            found[name] = checksum_of(path)
    return found


def _is_intact(folder: Path) -> bool:
    try:
        return json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8")) == _digests(folder)
    except (OSError, ValueError, RecursionError):
        return False


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
