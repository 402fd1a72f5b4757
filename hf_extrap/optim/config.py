"""What to extrapolate along, and how far: a frozen, validated configuration that imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Direction = Literal["none", "gradient", "past_gradient", "past_update", "gaussian", "uniform"]
Scope = Literal["local", "global"]
Scaling = Literal["none", "norm", "layer", "filter", "adaptive", "step", "layer_step"]
Batch = Literal["same", "independent"]
DirectionDtype = Literal["float32", "bfloat16", "float16"]
DirectionDevice = Literal["cpu"]

PAST_DIRECTIONS: tuple[str, ...] = ("past_gradient", "past_update")
NOISE_DIRECTIONS: tuple[str, ...] = ("gaussian", "uniform")
STEP_SCALINGS: tuple[str, ...] = ("step", "layer_step")
"""Scalings in which the step size is a share of the last step of x."""


@dataclass(frozen=True, kw_only=True)
class ExtrapConfig:
    """One extrapolation scheme: y = x − η · S(d, x), the gradient taken at y, the step taken from x.

    Parameters that control the direction d:
        direction: `none` (the base optimizer alone), `gradient` (a fresh gradient at x), `past_gradient` (the gradient
            of the last step), `past_update` (the last update of the base optimizer over its learning rate), or i.i.d.
            noise, `gaussian` N(0, 1) and `uniform` U(−1, 1).
        scope: `local`, each worker its own d and y; `global`, all workers share them.
        ascent: go up instead of down (SAM).
        batch: samples of a fresh direction: the `same` as the step's own, or `independent` ones.
        batch_fraction: share of the local batch that a fresh direction uses, in (0, 1].
        precondition: multiply a gradient direction by Adam's P = 1 / (√v̂ + ε), from the state of the base optimizer;
            `auto` then measures the curvature in that metric.
        direction_dtype: the type in which directions are stored; None keeps that of the parameters.
        direction_device: `cpu` keeps the directions of virtual workers in the host's memory, pinned where the
            parameters are on a GPU, and copies one worker's to and fro while another one runs; None keeps them beside
            the parameters. There the direction of a single worker, or of all, stays in any case.
        swap: let a parameter point to the memory of y and then back to its own, in place of copying x: no copy is made,
            and y lies over its spent direction. None swaps on the CPU alone, since a CUDA graph reads the addresses
            that it was recorded with. Parameters that share memory, or whose engine owns it, are copied in any case.
        check_finite: give up a step whose averaged gradient is not finite, for which the host waits for the device once
            a step; without, such a gradient goes into x, as it does with the base optimizer alone.
        seed: of the noise and of stochastic rounding.

    Parameters that control the length of the move:
        scaling: S, see `hf_extrap.optim.displacement.scale_direction`.
        step_size: η, a number > 0, or `auto`: `curvature_share` / L̂ with L̂ the curvature measured along the direction.
            With the scalings `step` and `layer_step` it is the share of the last step of x that y lies away.
        step_ratio: η as a share > 0 of the current learning rate. Exactly one of step_size and step_ratio is given.
        curvature_share: c of η = c / L̂, in (0, 1); read by `auto` alone.
        probe_every: with `auto` and a past direction, every how many steps a fresh gradient measures the curvature.
        anneal: let step_size follow the learning rate: η · lr / peak lr. A step_ratio follows it by itself, and so does
            a share of the last step.
        max_displacement: cap of ‖x − y‖ as a share of the length of the last step of x; None for no cap.

    Parameters that control when:
        start_step: first step that extrapolates, counted from 0.
        end_step: first step that no longer does; None for never.

    Raises:
        ValueError: in one sentence that names the field, its value and what is allowed.
    """

    direction: Direction = "none"
    scope: Scope = "local"
    scaling: Scaling = "none"
    step_size: float | Literal["auto"] | None = None
    step_ratio: float | None = None
    curvature_share: float = 0.3
    ascent: bool = False
    precondition: bool = False
    batch: Batch = "same"
    batch_fraction: float = 1.0
    anneal: bool = True
    probe_every: int = 10
    max_displacement: float | None = None
    start_step: int = 0
    end_step: int | None = None
    direction_dtype: DirectionDtype | None = None
    direction_device: DirectionDevice | None = None
    swap: bool | None = None
    check_finite: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_step()

    def _check_choices(self) -> None:
        for name, choices in (
            ("direction", get_args(Direction)),
            ("scope", get_args(Scope)),
            ("scaling", get_args(Scaling)),
            ("batch", get_args(Batch)),
            ("direction_dtype", (None, *get_args(DirectionDtype))),
            ("direction_device", (None, *get_args(DirectionDevice))),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {_listed(choices)}.")
        for name in ("ascent", "anneal", "precondition", "check_finite"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: true, false.")
        if self.swap is not None and not isinstance(self.swap, bool):
            raise ValueError(f"swap is {self.swap!r}; allowed: true, false, none.")

    def _check_numbers(self) -> None:
        if not (_is_number(self.batch_fraction) and 0 < self.batch_fraction <= 1):
            raise ValueError(f"batch_fraction is {self.batch_fraction!r}; allowed: a number in (0, 1].")
        if not (_is_number(self.curvature_share) and 0 < self.curvature_share < 1):
            raise ValueError(f"curvature_share is {self.curvature_share!r}; allowed: a number in (0, 1).")
        if self.max_displacement is not None and not (_is_number(self.max_displacement) and self.max_displacement > 0):
            raise ValueError(f"max_displacement is {self.max_displacement!r}; allowed: a number > 0, or none.")
        for name, least in (("probe_every", 1), ("start_step", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; allowed: a whole number >= {least}.")
        if self.end_step is not None and not (
            isinstance(self.end_step, int) and not isinstance(self.end_step, bool) and self.end_step > self.start_step
        ):
            raise ValueError(
                f"end_step is {self.end_step!r}; allowed: a whole number > start_step ({self.start_step}), or none."
            )

    def _check_step(self) -> None:
        for name in ("step_size", "step_ratio"):
            value = getattr(self, name)
            if value is None or (name == "step_size" and value == "auto"):
                continue
            # 0 is the base optimizer alone: allowed, as the end of every sweep.
            if not (_is_number(value) and value >= 0):
                allowed = "a number >= 0 or 'auto'" if name == "step_size" else "a number >= 0"
                raise ValueError(f"{name} is {value!r}; allowed: {allowed}.")
        if self.direction == "none":
            if self.step_size is not None or self.step_ratio is not None:
                raise ValueError("step_size and step_ratio need a direction, and direction is 'none'.")
            return
        if self.precondition and self.direction not in ("gradient", "past_gradient"):
            raise ValueError(
                f"precondition is true, and direction is {self.direction!r}; allowed: gradient, past_gradient (a "
                "past_update has the preconditioner in it)."
            )
        if (self.step_size is None) == (self.step_ratio is None):
            given = "neither" if self.step_size is None else "both"
            raise ValueError(f"step_size and step_ratio: {given} given; allowed: exactly one of them.")
        if self.scales_by_step and self.step_ratio is not None:
            raise ValueError(
                f"scaling is {self.scaling!r}, which follows the learning rate by itself, and step_ratio is "
                f"{self.step_ratio}; allowed: step_size, a share of the last step."
            )
        if self.step_size == "auto":
            if self.direction in NOISE_DIRECTIONS:
                raise ValueError(
                    f"step_size is 'auto', which cannot measure along {self.direction} noise; give a number."
                )
            if self.direction_dtype in ("bfloat16", "float16"):
                raise ValueError(
                    f"step_size is 'auto', which needs directions in full precision, not direction_dtype "
                    f"{self.direction_dtype!r}; allowed: float32, or none."
                )
            if self.scaling != "none":
                raise ValueError(f"step_size is 'auto', which needs scaling 'none', not {self.scaling!r}.")
            if self.direction == "gradient" and (self.batch != "same" or self.batch_fraction != 1):
                raise ValueError(
                    "step_size is 'auto', which compares two gradients of one batch: it needs batch 'same' and "
                    f"batch_fraction 1, not {self.batch!r} and {self.batch_fraction}."
                )

    @property
    def moves(self) -> bool:
        """Whether any step extrapolates; without, the base optimizer is alone."""
        return self.is_active(self.start_step)

    @property
    def is_fresh(self) -> bool:
        """Whether every step takes a gradient at x first."""
        return self.direction == "gradient"

    @property
    def is_past(self) -> bool:
        """Whether the direction is left over from the last step."""
        return self.direction in PAST_DIRECTIONS

    @property
    def is_noise(self) -> bool:
        """Whether the direction is drawn at random."""
        return self.direction in NOISE_DIRECTIONS

    @property
    def scales_by_step(self) -> bool:
        """Whether the step size is a share of the last step of x."""
        return self.scaling in STEP_SCALINGS

    @property
    def anneals(self) -> bool:
        """Whether the step size must be made to follow the learning rate."""
        return self.anneal and not self.scales_by_step

    def is_active(self, step: int) -> bool:
        """Whether step `step`, counted from 0, extrapolates."""
        if self.direction == "none" or self.step_size == 0 or self.step_ratio == 0:
            return False
        return self.start_step <= step and (self.end_step is None or step < self.end_step)

    @property
    def is_local(self) -> bool:
        """Whether workers differ in their directions; the last update of x is the same for all of them."""
        return self.scope == "local" and self.direction != "past_update"

    def probes(self, step: int) -> bool:
        """Whether step `step` looks along a fresh gradient, which must be taken at x before."""
        if not self.is_active(step):
            return False
        return self.is_fresh or (self.step_size == "auto" and self.is_past and step % self.probe_every == 0)

    def measures(self, step: int) -> bool:
        """Whether step `step` compares its gradients at x and at y: the curvature, for `auto`."""
        return self.step_size == "auto" and self.probes(step)

    def captures(self, step: int) -> bool:
        """Whether each worker's own gradient of step `step` is wanted: as the next direction, or to compare."""
        past = self.direction == "past_gradient" and self.is_active(step + 1)
        return self.is_local and (past or self.measures(step))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ExtrapConfig:
        """A named scheme, with some of its fields replaced.

        Args:
            name: one of `PRESETS`.
            **overrides: fields of this class. A step_size replaces a preset's step_ratio, and the other way round; a
                step_ratio and `auto`, lengths in other units, replace a preset's scaling by the last step too.

        Raises:
            ValueError: for an unknown preset or field, or for fields that do not go together.
        """
        if name not in PRESETS:
            raise ValueError(f"extrap preset is {name!r}; allowed: {_listed(PRESETS)}.")
        fields = dict(PRESETS[name])
        if overrides.get("step_size") is not None or overrides.get("step_ratio") is not None:
            fields.pop("step_size", None)
            fields.pop("step_ratio", None)
            if fields.get("scaling") in STEP_SCALINGS and not isinstance(overrides.get("step_size"), (int, float)):
                del fields["scaling"]
        return cls.from_dict({**fields, **overrides})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ExtrapConfig:
        """The configuration with these fields; an unknown one is a ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(f"unknown extrap field {unknown[0]!r}; allowed: {_listed(known)}.")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Every field by its name."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Every field, as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ExtrapConfig:
        """The inverse of `to_json`; a field left out keeps its default."""
        return cls.from_dict(_mapping(json.loads(text)))

    def to_yaml(self) -> str:
        """Every field, as a YAML mapping."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> ExtrapConfig:
        """The inverse of `to_yaml`; a field left out keeps its default."""
        import yaml

        return cls.from_dict(_mapping(yaml.safe_load(text)))

    def save(self, path: str | Path) -> None:
        """Write YAML or JSON, by the file's ending."""
        path = Path(path)
        path.write_text(self.to_json() + "\n" if path.suffix == ".json" else self.to_yaml(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ExtrapConfig:
        """Read YAML or JSON, by the file's ending."""
        path = Path(path)
        text = path.read_text(encoding="utf-8")
        return cls.from_json(text) if path.suffix == ".json" else cls.from_yaml(text)


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
"""The named schemes of `ExtrapConfig.preset`: a table of fields, nothing more."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _listed(names: Any) -> str:
    return ", ".join("none" if name is None else str(name) for name in names)


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"an extrap configuration is a mapping of fields, not {type(value).__name__}.")
    return value
