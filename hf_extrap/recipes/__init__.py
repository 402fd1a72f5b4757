"""Recipes: one folder per task, with its model, data, tokenization and metric; and a run from a YAML file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_extrap.recipes.task import Task

#: Task name -> "module:class", imported on first use.
TASKS: dict[str, str] = {
    "image_classification": "hf_extrap.recipes.image_classification.task:ImageClassificationTask",
    "language_modeling": "hf_extrap.recipes.language_modeling.task:LanguageModelingTask",
    "translation": "hf_extrap.recipes.translation.task:TranslationTask",
}


def get_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        ValueError: if there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown: choose one of {', '.join(sorted(TASKS))}.")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()
