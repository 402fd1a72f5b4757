"""Recipes: one folder per task, with its model, data, tokenization and metric; and a run from a YAML file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_extrap.recipes.task import Task

#: Task name, which is also its folder -> class in its module `task`, imported on first use.
TASKS = {
    "image_classification": "ImageClassificationTask",
    "language_modeling": "LanguageModelingTask",
    "translation": "TranslationTask",
}


def get_task(name: str) -> Task:
    """Return a task by its name; ValueError if there is no such task."""
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown: choose one of {', '.join(sorted(TASKS))}.")
    return getattr(import_module(f"hf_extrap.recipes.{name}.task"), TASKS[name])()
