"""The models of this package in the Auto classes and pipelines of Transformers, from `import hf_extrap` on.

Transformers finds the class of a model type by names: tables give the class name, and `transformers.models.<type>` the
class. `register_models` adds this package's names to the tables, at once if they are loaded and otherwise when they
are, and a module that forwards to `hf_extrap.recipes.models`. So neither torch nor Transformers is imported before a
model is used, and the order of `import transformers` and `import hf_extrap` does not matter. `AutoModel.register` takes
classes, whose module imports Transformers: it cannot be called while Transformers is being imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODELS = "hf_extrap.recipes.models"
CONFIGURATIONS = {"extrap_lstm": "ExtrapLstmConfig", "extrap_resnet": "ExtrapResNetConfig"}
#: Module of Transformers -> its table of names -> the names to add, by model type.
TABLES: dict[str, dict[str, dict[str, str]]] = {
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING_NAMES": CONFIGURATIONS},
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING_NAMES": {"extrap_lstm": "ExtrapLstmModel"},
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {"extrap_lstm": "ExtrapLstmForCausalLM"},
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": {"extrap_resnet": "ExtrapResNetForImageClassification"},
    },
}
FORWARDED = {f"transformers.models.{model_type}" for model_type in CONFIGURATIONS}


def register_models() -> None:
    """Make the models known to the Auto classes, whether Transformers is imported already or not."""
    sys.meta_path.insert(0, _Finder())
    for name in TABLES:
        if name in sys.modules:
            _add_names(sys.modules[name])


def _add_names(module: ModuleType) -> None:
    for table, names in TABLES[module.__name__].items():
        getattr(module, table).update(names)
    for mapping in vars(module).values():
        # Made before the configurations were known.
        if isinstance(types := getattr(mapping, "_reverse_config_mapping", None), dict):
            types.update({configuration: model_type for model_type, configuration in CONFIGURATIONS.items()})


class _Finder(MetaPathFinder):
    """Finds the forwarding modules, and follows the loading of the modules with the tables."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in FORWARDED:
            return ModuleSpec(name, _Forwarding())
        if name not in TABLES:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            if (spec := finder.find_spec(name, path, target)) is not None:
                spec.loader = _Followed(spec.loader) if spec.loader is not None else None
                return spec
        return None


class _Forwarding(Loader):
    """Loads a module with the names of `hf_extrap.recipes.models`."""

    def exec_module(self, module: ModuleType) -> None:
        models = import_module(MODELS)
        vars(module).update({name: getattr(models, name) for name in models.__all__})


class _Followed(Loader):
    """A loader after which the names are added to the module's tables."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _add_names(module)
