"""`python -m hf_extrap`, the same program as `hf-extrap`, for torchrun and accelerate launch."""

from hf_extrap.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
