"""The named schemes of `ExtrapConfig.preset`: a table of fields, nothing more."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "extrap": {"direction": "gradient", "scope": "local", "scaling": "layer_step", "step_size": 0.1},
    "extrap-past": {"direction": "past_gradient", "scope": "local", "scaling": "layer_step", "step_size": 0.1},
    "extragradient": {"direction": "gradient", "scope": "global", "step_ratio": 1.0},
    "optimistic": {"direction": "past_gradient", "scope": "global", "step_ratio": 1.0},
    "past-update": {"direction": "past_update", "scope": "global", "step_ratio": 0.5},
    "msam": {"direction": "past_update", "scope": "global", "scaling": "norm", "step_size": 0.3, "anneal": False},
    "gaussian": {"direction": "gaussian", "scope": "local", "scaling": "layer", "step_size": 0.01},
    "smoothout": {"direction": "uniform", "scope": "local", "scaling": "filter", "step_size": 0.01},
    "sam": {"direction": "gradient", "scaling": "norm", "ascent": True, "step_size": 0.05, "anneal": False},
    "asam": {"direction": "gradient", "scaling": "adaptive", "ascent": True, "step_size": 0.5, "anneal": False},
}
