"""What a Trainer uploads beside the weights: its model card, its curves, and the code of its model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.trainer_utils import HubStrategy

from .figures import CURVES_FILE, draw_curves
from .markdown import one_line
from .model_card import complete_card


class Uploads:
    """The files of the output folder that a stock Trainer does not write.

    Attributes:
        card: a model card to write in place of the Trainer's own, on the first process.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.card: ModelCard | None = None

    def write_card(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """`card`, or what `write`, the stock method, writes with these arguments, completed."""
        trainer, folder = self.trainer, Path(str(self.trainer.args.output_dir))
        if self.card is not None:
            self.card.save(folder / "README.md")
            return
        name = kwargs.get("model_name") or folder.absolute().name
        if one_line(name) != name and not args:
            kwargs["model_name"] = one_line(name)
        write(*args, **kwargs)
        if trainer.is_world_process_zero() and (folder / "README.md").is_file():
            optimizer, config = trainer.extrapolated, trainer.extrap_config
            figure = self._draw_curves(folder) if optimizer is not None and config.direction != "none" else None
            complete_card(folder / "README.md", trainer.args.extrap, config, optimizer, figure)

    def _draw_curves(self, folder: Path) -> str | None:
        """Draw what was logged beside the card, if Matplotlib is installed."""
        if find_spec("matplotlib") is None:
            return None
        metric = (self.trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
        return CURVES_FILE if draw_curves(self.trainer.state.log_history, metric, folder / CURVES_FILE) else None

    def before_checkpoint(self, checkpoint: Path) -> None:
        """Before a checkpoint is uploaded: the stock Trainer copies its configuration and its weights alone."""
        trainer = self.trainer
        if not trainer.is_world_process_zero() or trainer.args.hub_strategy == HubStrategy.END:
            return
        for code in checkpoint.glob("*.py"):
            shutil.copy(code, str(trainer.args.output_dir))
        if trainer.extrap_config.direction != "none":
            trainer.create_model_card(model_name=Path(str(trainer.hub_model_id)).name)
