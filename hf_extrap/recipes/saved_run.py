"""A saved run, rebuilt with its task and Trainer, for measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import set_seed

from hf_extrap.recipes.configuration import Configuration, resolve, to_words
from hf_extrap.recipes.run import make_trainer
from hf_extrap.recipes.run_folder import CONFIGURATION_FILE, RunFolder
from hf_extrap.recipes.secrets import is_secret
from hf_extrap.training.checkpoints.finding import check_whole
from hf_extrap.training.checkpoints.folders import MANIFEST_FILE
from hf_extrap.training.checkpoints.matching import INDEX_FILE, WEIGHTS_FILE, check_checkpoint_matches
from hf_extrap.training.trainer import ExtrapTrainer

OPTIMIZER_FILE = "optimizer.pt"

#: Fields of places, devices and speed, which do not change what was trained.
UNUSED = frozenset(
    "output_dir resume_from_checkpoint use_cpu bf16 fp16 torch_compile deepspeed fsdp report_to push_to_hub".split()
    + ["sharpness_batches"]
)


@dataclass
class SavedRun:
    """A Trainer with the saved weights, in float32, and the saved state of the optimizer, None without optimizer.pt.

    `learning_rate` is that of the optimizer's next step, `step` that of a checkpoint, otherwise None.
    """

    folder: Path
    configuration: Configuration
    trainer: ExtrapTrainer
    learning_rate: float | None
    step: int | None


def load_saved_run(folder: Path, words: Sequence[str] = (), config: str | None = None) -> SavedRun:
    """Rebuild a run from the folder of a run, of a checkpoint in it, or of any saved model.

    `words`, `--field value …`, take precedence over the run's fields; `config` is a YAML file with the fields, for a
    saved model without run.json.

    Raises:
        FileNotFoundError: if there is no such folder, or no weights in it.
        ValueError: if the weights do not fit the fields, or a field is wrong or missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist.")
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        last = RunFolder(folder).last_checkpoint()
        hint = f"; give its last checkpoint, {last}" if last else ""
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}{hint}.")
    run = next((path for path in (folder, folder.parent) if (path / CONFIGURATION_FILE).is_file()), None)
    if run is not None and config is not None:
        raise ValueError(f"{run / CONFIGURATION_FILE} already says how {folder} was trained; leave out --config.")
    if run is None and config is None and not any(word.split("=")[0] == "--task" for word in words):
        raise ValueError(
            f"no {CONFIGURATION_FILE} says how {folder} was trained; give --config FILE.yaml or --task NAME."
        )
    if run is not None:
        recorded = RunFolder(run).read_configuration()["arguments"]
        known = {k: v for k, v in recorded.items() if k not in UNUSED and not is_secret(k)}
        fields = to_words({name: value for name, value in known.items() if value is not None})
    else:
        fields = ["--model", str(folder)]
    # The Trainer creates its output folder, so it gets one that exists.
    configuration = resolve(config, [*fields, "--report_to", "none", *words, "--output_dir", str(folder)])
    arguments = configuration.training_arguments
    if arguments.world_size > 1:
        raise ValueError(f"{arguments.world_size} processes were launched; allowed: one.")
    set_seed(arguments.seed)
    prepared = configuration.task.prepare(configuration.task_arguments, arguments)
    check_checkpoint_matches(folder, prepared.model)
    if (folder / MANIFEST_FILE).is_file():
        check_whole(folder, configuration.training_arguments.checkpoint_integrity)
    try:
        weights = type(prepared.model).from_pretrained(folder, use_safetensors=True, dtype=torch.float32).state_dict()
        # Into the model of the task: a loaded one would also train fixed positions.
        prepared.model.float().load_state_dict(weights)
    # A damaged config.json raises errors of many types.
    except Exception as error:
        raise ValueError(f"the model in {folder} cannot be loaded: {' '.join(str(error).split())}") from error
    trainer = cast(ExtrapTrainer, make_trainer(configuration, prepared))
    step = folder.name.removeprefix("checkpoint-")
    rate = _load_optimizer(trainer, folder / OPTIMIZER_FILE)
    return SavedRun(folder, configuration, trainer, rate, int(step) if step.isdigit() else None)


def _load_optimizer(trainer: ExtrapTrainer, path: Path) -> float | None:
    """Load the saved optimizer, if any, into the Trainer; return the learning rate of its next step."""
    if not path.is_file():
        return None
    trainer.create_optimizer()
    optimizer = trainer.extrapolated
    if optimizer is None:
        raise ValueError(f"{path} belongs to an engine whose state cannot be read in one process.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # A measurement at x needs no directions.
        optimizer.base.load_state_dict({name: value for name, value in state.items() if name != "extrap"})
    except Exception as error:
        raise ValueError(f"{path} cannot be read into this run's optimizer: {' '.join(str(error).split())}") from error
    rate = optimizer.param_groups[0].get("lr")
    return None if rate is None else float(rate)
