"""Lets DeepSpeed run on the CPU with nothing compiled first: imported for that, before DeepSpeed is used.

Run as a script, it is `hf-extrap` with that.
"""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed.ops

# Its own extension for shared memory would have to be compiled; gloo does.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

if __name__ == "__main__":
    from hf_extrap.cli import main

    raise SystemExit(main())
