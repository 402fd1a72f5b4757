"""Any parameters and any base optimizer: each step is the base optimizer's from x, or one sentence refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_extrap import ExtrapConfig, Extrapolated
from tests.support.plain_loop import take_passes
from tests.support.random_schemes import SCHEMES
from tests.support.refusals import refused_or_done
from tests.support.soak import cases


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


KINDS: dict[str, Callable[[], list[Tensor]]] = {
    "vector": lambda: [drawn(3)],
    "matrix": lambda: [drawn(4, 2)],
    "double": lambda: [drawn(3, 2, dtype=torch.float64)],
    "bfloat16": lambda: [drawn(4, dtype=torch.bfloat16)],
    "float16": lambda: [drawn(2, 3, dtype=torch.float16)],
    "number": lambda: [drawn()],
    "empty": lambda: [drawn(0, 3)],
    "complex": lambda: [drawn(2, dtype=torch.complex64)],
    "expanded": lambda: [drawn(1).expand(3)],
    "transposed": lambda: [drawn(2, 5).t()],
    "channels last": lambda: [drawn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)],
    "views of one": lambda: list(drawn(6).split(3)),
    "tied": lambda: [(t := drawn(3)), t],
    "overlapping": lambda: [(t := drawn(5))[:3], t[2:]],
    "strided": lambda: [drawn(6)[::2]],
    "meta": lambda: [torch.empty(3, device="meta")],
    "zero": lambda: [torch.zeros(3)],
    "huge": lambda: [torch.full((2,), 1e30)],
}
USES = ["used", "used", "used", "unused", "frozen", "sometimes", "sparse"]

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, rate in a tensor": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1), momentum=0.9),
    "SGD up": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
    "SGD at 0": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adam, one by one": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}

PARAMETERS = st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(USES)), min_size=1, max_size=4)


class Sparse(torch.autograd.Function):
    """The sum of the first row, with a sparse gradient."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.like = p.detach()
        return p[:1].sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        rows = torch.zeros(1, 1, dtype=torch.long)
        return torch.sparse_coo_tensor(rows, grads[0].expand(ctx.like[:1].shape).clone(), ctx.like.shape)


class Model:
    """Parameters of some kinds, in one or two groups, and a loss of them."""

    def __init__(self, kinds: Sequence[tuple[str, str]], base: str) -> None:
        self.uses: list[str] = []
        self.params: list[nn.Parameter] = []
        for kind, use in kinds:
            if use == "sparse" and kind not in ("vector", "matrix", "double"):
                # Torch itself aborts on sparse gradients of others.
                use = "used"
            for tensor in KINDS[kind]():
                self.params.append(nn.Parameter(tensor, requires_grad=use != "frozen"))
                self.uses.append(use)
        half = len(self.params) // 2
        groups = [{"params": self.params[half:]}, {"params": self.params[:half]}]
        self.base = BASES[base]([group for group in groups if group["params"]] if base != "LBFGS" else self.params)

    def loss(self, step: int) -> Tensor:
        terms = [
            Sparse.apply(p).float() if use == "sparse" else (p - 0.1 * step).abs().square().float().sum()
            for p, use in zip(self.params, self.uses, strict=True)
            if use in ("used", "sparse") or (use == "sometimes" and step % 2)
        ]
        return sum(terms, torch.zeros(())) if all(p.device.type != "meta" for p in self.params) else sum(terms)  # type: ignore[return-value]


def bits(tensors: Sequence[Tensor | None]) -> list[Any]:
    """What compares equal if and only if all bits do."""
    return [
        None
        if t is None
        else (tuple(t.shape), t.dtype)
        if t.device.type == "meta"
        else (tuple(t.shape), t.dtype, bytes(t.detach().to_dense().contiguous().clone().view(torch.uint8).numpy()))
        if t.numel() and t.dim()
        else (tuple(t.shape), t.dtype, t.tolist().__repr__())
        for t in tensors
    ]


def state_bits(optimizer: torch.optim.Optimizer) -> list[Any]:
    saved = optimizer.state_dict()["state"]
    return [bits([v for v in s.values() if isinstance(v, Tensor)]) for _, s in sorted(saved.items(), key=str)]


def base_alone(model: Model, steps: int) -> list[list[Any]]:
    """x after each step; rejects a case that the base optimizer itself cannot carry out."""
    xs = []
    for step in range(steps):

        def closure(step: int = step) -> Tensor:
            model.base.zero_grad()
            loss = model.loss(step)
            if loss.requires_grad:
                loss.backward()
            return loss

        try:
            if isinstance(model.base, torch.optim.LBFGS):
                model.base.step(closure)
            else:
                closure()
                model.base.step()
        except Exception:
            reject()
        xs.append(bits(model.params))
    return xs


@cases(150, 14_000)
@given(PARAMETERS, st.sampled_from(sorted(BASES)), SCHEMES, st.integers(1, 2), st.booleans())
def test_every_step_is_the_bases_from_x(
    kinds: list[tuple[str, str]], base: str, config: ExtrapConfig, workers: int, collects: bool
) -> None:
    try:
        alone, twin, model = (Model(kinds, base) for _ in range(3))
    except (ValueError, TypeError, RuntimeError):
        reject()
    expected = base_alone(alone, 4)
    with refused_or_done() as refused:
        optimizer = Extrapolated(model.base, config, virtual_workers=workers)
    if refused:
        return
    # A tensor without memory has no norm.
    optimizer.collect_statistics = collects and all(p.device.type != "meta" for p in model.params)
    for step in range(4):
        x, state = bits(model.params), state_bits(model.base)

        def backward(worker: int, index: int, probe: Any, step: int = step) -> None:
            loss = model.loss(step) / workers
            if loss.requires_grad:
                loss.backward()

        if base == "LBFGS":

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = model.loss(step)
                if loss.requires_grad:
                    loss.backward()
                return loss

            optimizer.step(closure)
            assert bits(model.params) == expected[step]
            continue
        with refused_or_done() as refused:
            take_passes(optimizer, backward)
        optimizer.restore()
        assert bits(model.params) == x and state_bits(model.base) == state
        if refused:
            return
        for p, q in zip(model.params, twin.params, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        skipped = optimizer.skipped_steps
        with refused_or_done() as refused:
            optimizer.step()
        if refused:
            assert bits(model.params) == x and state_bits(model.base) == state
            return
        if optimizer.skipped_steps > skipped:
            assert not all(bool(torch.isfinite(p.grad.to_dense()).all()) for p in twin.params if p.grad is not None)
            assert bits(model.params) == x and state_bits(model.base) == state
        else:
            twin.base.step()
            assert bits(model.params) == bits(twin.params) and state_bits(model.base) == state_bits(twin.base)
        if not config.moves and workers == 1:
            assert bits(model.params) == expected[step]
        optimizer.zero_grad()
