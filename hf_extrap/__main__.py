"""`python -m hf_extrap`, the same as `hf-extrap`: what torchrun and accelerate launch start."""

from hf_extrap.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
