"""The index of a checkpoint in shards names files of its own folder, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_extrap.training.checkpoints.matching import INDEX_FILE, check_checkpoint_matches


@pytest.mark.parametrize(
    "content",
    [
        {"weight_map": {"weight": "../outside.safetensors"}},
        {"weight_map": {"weight": "/etc/passwd"}},
        {"weight_map": {"weight": "a/b.safetensors"}},
        {"weight_map": {"weight": ".."}},
        {"weight_map": {"weight": 5}},
        {"weight_map": []},
        {"weight_map": None},
        {},
        [],
    ],
)
def test_names_that_leave_the_folder(content: object, tmp_path: Path) -> None:
    model, folder = torch.nn.Linear(2, 1, bias=False), tmp_path / "checkpoint"
    folder.mkdir()
    save_file(model.state_dict(), tmp_path / "outside.safetensors")
    save_file(model.state_dict(), folder / "part.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"weight": "part.safetensors"}}))
    check_checkpoint_matches(folder, model)
    (folder / INDEX_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not an index of weights.*allowed: names of files beside it"):
        check_checkpoint_matches(folder, model)
