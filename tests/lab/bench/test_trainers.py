"""The stock Trainer beside ExtrapTrainer: the same steps on the same data, and each step's seconds."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Trainer

from hf_extrap.lab.bench import trainers


def test_every_kind_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "STEPS", 8)
    monkeypatch.setattr(trainers, "MANY", 1)
    taken: list[list[float]] = []
    plain = Trainer.training_step

    def recording(self: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 0:
            taken.append([])
        loss: torch.Tensor = plain(self, *args, **kwargs)
        taken[-1].append(float(loss.detach()))
        return loss

    monkeypatch.setattr(Trainer, "training_step", recording)
    kinds = trainers.GROUPS[0]
    found = trainers.run(kinds, 2, math.inf)
    assert tuple(found) == kinds
    for row in found.values():
        assert len(row["step"]) == len(row["base_step"]) == 2 and min(row["step"]) > 0
        assert row["base_step"] == found["base"]["step"] and row["block"] == 8 - 5
    # Of the last round, in which the order is turned round.
    past, none, base = taken[-3:]
    assert len(base) == 8 and base == none
    assert trainers.run(kinds, 2, 0.0) == {}
    assert past[0] == base[0] and past[2:] != base[2:]
