"""The configuration of an extrapolation scheme: frozen, validated, and independent of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .config_checks import (
    STEP_SCALINGS,
    Batch,
    Direction,
    DirectionDevice,
    DirectionDtype,
    Scaling,
    Scope,
    check_combination,
    check_fields,
)
from .presets import PRESETS
from .serialization import Serializable


@dataclass(frozen=True, kw_only=True)
class ExtrapConfig(Serializable):
    """One extrapolation scheme: y = x − η · S(d, x), the gradient taken at y, the step taken from x.

    Attributes: Direction d
        direction: `none` (the base optimizer alone), `gradient` (a fresh gradient at x), `past_gradient` (the gradient
            of the last step), `past_update` (the last update of x divided by the learning rate), or i.i.d. noise,
            `gaussian` N(0, 1) and `uniform` U(−1, 1).
        scope: `local`, each worker has its own d and y; `global`, all workers share them, as they always share a
            `past_update`.
        ascent: reverse the sign of d (SAM).
        batch: samples of a fresh direction: the `same` as the step's own, or `independent` ones.
        batch_fraction: share of the local batch that a fresh direction uses, in (0, 1].
        precondition: multiply a gradient direction by Adam's P = 1 / (√v̂ + ε), from the state of the base optimizer;
            `auto` then measures the curvature in that metric.
        direction_dtype: dtype in which directions are stored; None keeps that of the parameters.
        direction_device: `cpu` offloads the directions of virtual workers to host memory, pinned if the parameters are
            on a GPU, and copies one worker's while another one computes. A single direction stays on the device.
        swap: let a parameter point to the memory of y and then back to its own, instead of copying x. None swaps on
            the CPU alone, since a CUDA graph reads the addresses that it was recorded with. Parameters that share
            memory, or that an engine owns, are copied in any case.
        check_finite: skip a step whose averaged gradient is not finite, which synchronizes with the device once per
            step. If false, such a gradient is stepped with, as by the base optimizer alone.
        seed: of the noise and of stochastic rounding.

    Attributes: Distance between x and y
        scaling: S, one of `hf_extrap.optim.scaling`.
        step_size: η, a number >= 0, or `auto`: `curvature_share` / L̂, where L̂ is the curvature measured along the
            direction. With the scalings `step` and `layer_step` it is a share of the last step of x.
        step_ratio: η as a ratio >= 0 of the current learning rate. Exactly one of step_size and step_ratio is given.
        curvature_share: c of η = c / L̂, in (0, 1), for `auto`.
        probe_every: with `auto` and a past direction, number of steps from one measurement of the curvature to the
            next.
        anneal: let step_size follow the learning rate: η · lr / peak lr. A step_ratio, and a share of the last step,
            follow it in any case.
        max_displacement: upper bound of ‖x − y‖ as a share of the length of the last step of x; None for no bound.

    Attributes: Steps that extrapolate
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
        # A numpy float or a string Enum is one of these, and neither JSON nor YAML can write it.
        for name, value in vars(self).items():
            if isinstance(value, (str, float)):
                object.__setattr__(self, name, str.__str__(value) if isinstance(value, str) else float(value))
        check_fields(vars(self))
        check_combination(vars(self))

    @property
    def moves(self) -> bool:
        """Whether any step extrapolates."""
        return self.is_active(self.start_step)

    @property
    def is_fresh(self) -> bool:
        """Whether every step takes a gradient at x first."""
        return self.direction == "gradient"

    @property
    def is_past(self) -> bool:
        """Whether the direction is kept from the last step."""
        return self.direction.startswith("past_")

    @property
    def is_noise(self) -> bool:
        """Whether the direction is drawn at random."""
        return self.direction in ("gaussian", "uniform")

    @property
    def is_local(self) -> bool:
        """Whether each worker has its own direction; the last update of x is the same for all of them."""
        return self.scope == "local" and self.direction != "past_update"

    @property
    def scales_by_step(self) -> bool:
        """Whether the step size is a share of the last step of x."""
        return self.scaling in STEP_SCALINGS

    @property
    def anneals(self) -> bool:
        """Whether the step size is multiplied by lr / peak lr."""
        return self.anneal and not self.scales_by_step

    def is_active(self, step: int) -> bool:
        """Whether a step, counted from 0, extrapolates."""
        if self.direction == "none" or self.step_size == 0 or self.step_ratio == 0:
            return False
        return self.start_step <= step and (self.end_step is None or step < self.end_step)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ExtrapConfig:
        """A named scheme, with some of its fields replaced.

        Args:
            name: one of `PRESETS`.
            **overrides: fields of this class. A step_size replaces the preset's step_ratio, and vice versa; a
                step_ratio and `auto` also replace a scaling by the last step.

        Raises:
            ValueError: for an unknown preset or field, or for fields that do not go together.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"extrap preset is {name!r}; allowed: {', '.join(PRESETS)}.")
        fields = dict(PRESETS[name])
        if overrides.get("step_size") is not None or overrides.get("step_ratio") is not None:
            fields.pop("step_size", None)
            fields.pop("step_ratio", None)
            if fields.get("scaling") in STEP_SCALINGS and not isinstance(overrides.get("step_size"), (int, float)):
                del fields["scaling"]
        return cls.from_dict({**fields, **overrides})
