"""Checkpoints: what each process keeps for itself, saved and found again."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from .base import MixinBase
from .checkpoints import check_checkpoint_matches
from .diagnostics import GradientNoiseScale
from .rank_state import load_rank_state, rank_file, save_rank_state

logger = logging.getLogger(__name__)


class ResumingMixin(MixinBase):
    """A resumed run is the uninterrupted one: directions, recurrent states and earlier batches of every process."""

    _noise_scale: GradientNoiseScale
    _step_batches: list[dict[str, Any]]
    _step_states: dict[str, Tensor]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if (optimizer := self.extrapolated) is None:
            return
        local = optimizer.local_state_dict()
        alone = self._is_alone
        save_rank_state(
            rank_file(output_dir, self.args.process_index),
            {
                "directions": {} if alone else local["directions"],
                "curvature": {} if alone else local["curvature"],
                "carried": self._carried.tensors(),
                **self._earlier_samples(),
            },
            {
                "owner": local["owner"],
                "noise_scale": self._noise_scale.state(),
                "processes": self.accelerator.num_processes,
            },
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or (optimizer := self.extrapolated) is None:
            return
        self._connect(self.model_wrapped)
        path = rank_file(checkpoint, self.args.process_index)
        if not path.is_file():
            logger.warning("%s is missing: directions and recurrent states of this process start cold", path)
            return
        groups, facts = load_rank_state(path)
        self._noise_scale.load_state(facts["noise_scale"])
        processes = self.accelerator.num_processes
        if facts["processes"] != processes:
            logger.warning(
                "the checkpoint has %d processes and this run %d: directions and recurrent states start cold",
                facts["processes"],
                processes,
            )
            return
        self._carried.load(groups.get("carried", {}), self.args.device)
        self._take_earlier_samples(groups)
        if not self._is_alone:
            named = {"directions": groups.get("directions", {}), "curvature": groups.get("curvature", {})}
            optimizer.load_local_state_dict({"owner": facts["owner"], **named})

    @property
    def _is_alone(self) -> bool:
        """Whether directions travel in the optimizer's own file: one process, whose file it is."""
        return self.accelerator.num_processes == 1 and not self._has_engine

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint_matches(resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _earlier_samples(self) -> dict[str, dict[str, Tensor]]:
        """The last step's batches and the states they began with: the next one's `independent` samples."""
        if self.args.extrap_config().batch != "independent":
            return {}
        batches = {
            # Labels may be the inputs themselves, and safetensors refuses tensors that share memory.
            f"{index}.{name}": value.clone()
            for index, batch in enumerate(self._step_batches)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        return {"step_batches": batches, "step_states": self._step_states}

    def _take_earlier_samples(self, groups: dict[str, dict[str, Tensor]]) -> None:
        batches: dict[int, dict[str, Any]] = {}
        for key, value in groups.get("step_batches", {}).items():
            index, _, name = key.partition(".")
            batches.setdefault(int(index), {})[name] = value.to(self.args.device)
        self._step_batches = [batches[index] for index in sorted(batches)]
        self._step_states = {name: value.to(self.args.device) for name, value in groups.get("step_states", {}).items()}
