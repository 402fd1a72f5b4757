"""The base optimizer by name (torch.optim or pytorch_optimizer), and its learning rate: scaling rules, step decay."""

from __future__ import annotations

import ast
import difflib
import inspect
import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainingArguments

from hf_extrap.optim.config import ExtrapConfig
from hf_extrap.optim.engines import steps_in_backward
from hf_extrap.optim.extrapolated import Extrapolated
from hf_extrap.optim.local_sgd import LocalSGD

from .extras import extra

logger = logging.getLogger(__name__)

_NOT_IN_A_LOOP = {"optimizer", "lbfgs", "sparseadam"}
# By default the library's LAMB multiplies its normalised step by 1 / (1 - beta1^t): 10 times too long at first.
_AS_IN_THE_PAPER = {"lamb": {"adam_debias": True}}


def scheme_of(args: Any, optimizer: torch.optim.Optimizer | None) -> ExtrapConfig:
    """The scheme of the arguments, or that of an `Extrapolated` which a user has made.

    Raises:
        ValueError: both are given, or they differ in the number of virtual workers.
    """
    config: ExtrapConfig = args.extrap_config()
    if not isinstance(optimizer, Extrapolated):
        return config
    if config.direction != "none":
        raise ValueError(
            f"extrap is {args.extrap!r} and optimizers holds an Extrapolated already; allowed: one of them, extrap "
            "'none' beside an Extrapolated or another optimizer beside a preset."
        )
    if optimizer.virtual_workers != args.extrap_virtual_workers:
        raise ValueError(
            f"extrap_virtual_workers is {args.extrap_virtual_workers} and optimizers holds an Extrapolated of "
            f"{optimizer.virtual_workers}; allowed: the same number."
        )
    return optimizer.config


def wrapped(base: torch.optim.Optimizer, config: ExtrapConfig, args: Any, scaler: Any) -> torch.optim.Optimizer:
    """The optimizer inside `Extrapolated`, with local steps if `local_steps` asks for them.

    A user's own `Extrapolated` is taken as it is. With `none`, one that steps inside the backward pass (LOMO,
    layer-wise GaLore) stays bare: accelerate knows it by its class.

    Raises:
        ValueError: an optimizer that cannot be extrapolated.
    """
    if isinstance(base, Extrapolated):
        base.grad_scaler = base.grad_scaler or scaler
        base.reset_step()
        return base
    if config.direction == "none" and steps_in_backward(base):
        return base
    workers = args.extrap_virtual_workers
    if args.local_steps > 1:
        base = LocalSGD(base, args.local_steps, virtual_workers=workers)
    return Extrapolated(base, config, virtual_workers=workers, grad_scaler=scaler)


def class_and_arguments(
    args: Any, stock: Callable[..., tuple[Any, dict[str, Any]]], model: Any
) -> tuple[Any, dict[str, Any]]:
    """The class that `base_optimizer` names, or the stock choice, with momentum for `optim: sgd`."""
    if getattr(args, "base_optimizer", None) is not None:
        return base_optimizer(args, args.base_optimizer)
    optimizer_class, kwargs = stock(args, model)
    if getattr(args, "sgd_momentum", 0):
        kwargs |= {"momentum": args.sgd_momentum, "nesterov": args.sgd_nesterov}
    return optimizer_class, kwargs


def base_optimizer(args: TrainingArguments, name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and keyword arguments of the optimizer `name`, with `optim_args` over the defaults.

    torch.optim is searched first. Its variants of Adam take adam_beta1, adam_beta2 and adam_epsilon, and decoupled
    weight decay as AdamW does; optimizers of pytorch_optimizer keep that library's defaults.

    Raises:
        ValueError: the name or an argument is unknown; close matches are named.
        ModuleNotFoundError: the name is not of torch.optim and pytorch_optimizer is not installed.
    """
    given = parse_arguments(args.optim_args)
    found = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and key.lower() not in _NOT_IN_A_LOOP
    }
    from_torch = name.lower() in found
    optimizer_class = found[name.lower()] if from_torch else _of_library(name, list(found))
    signature = inspect.signature(optimizer_class).parameters
    parameters = {key: p for key, p in signature.items() if p.kind is not p.VAR_KEYWORD}
    needed = [key for key, p in parameters.items() if p.default is p.empty and key not in given and key != "params"]
    if "params" not in parameters or needed:
        raise ValueError(f"base_optimizer {name!r} needs more than parameters and numbers; allowed: a plain optimizer.")
    allowed = sorted(set(parameters) - {"params", "lr", "weight_decay"})
    for key in given:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed) or allowed
            raise ValueError(f"optim_args has {key!r}, which {name!r} does not take; allowed: {', '.join(close)}.")
    defaults: dict[str, Any] = {"lr": args.learning_rate}
    if from_torch:
        adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "decoupled_weight_decay": True}
        defaults |= {key: value for key, value in adam.items() if "betas" in parameters and key in parameters}
    else:
        defaults |= _AS_IN_THE_PAPER.get(name.lower(), {})
    return optimizer_class, defaults | given


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Python literals by name, of a text such as "momentum=0.9,betas=(0.9,0.98),nesterov=true"."""
    try:
        call = ast.parse(f"f({text or ''})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return {str(k.arg): _literal(k.value) for k in call.keywords if k.arg or _literal(k.value)}
    except (SyntaxError, ValueError, AssertionError):
        raise ValueError(f"optim_args is {text!r}; allowed: name=value,name=value with Python's literals.") from None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return node.id == "true"
    return ast.literal_eval(node)


def _of_library(name: str, torch_names: list[str]) -> type[torch.optim.Optimizer]:
    try:
        with extra("optimizers"):
            import pytorch_optimizer
    except ModuleNotFoundError as error:
        message = f"base_optimizer {name!r} is not of torch.optim, and {error}"
        raise ModuleNotFoundError(message, name=error.name) from None
    names = pytorch_optimizer.get_supported_optimizers()
    if name.lower() not in names:
        close = difflib.get_close_matches(name.lower(), [*names, *torch_names], n=5)
        raise ValueError(
            f"base_optimizer is {name!r}; allowed: {', '.join(close) or 'sgd, adamw, nadam, lars, lamb'}, or another "
            "name of torch.optim or pytorch_optimizer."
        )
    return pytorch_optimizer.load_optimizer(name.lower())


def scaled_learning_rate_factor(rule: str, batch_size: float, base_batch_size: float) -> float:
    """The factor of a learning rate that was tuned at `base_batch_size`, for a step of `batch_size`, in the same unit.

    It is 1 by the rule `none`, the ratio of the batch sizes by `linear` (Goyal et al. 2017), and its square root by
    `sqrt`, for adaptive optimizers (Hoffer et al. 2017).
    """
    ratio = batch_size / base_batch_size if rule != "none" else 1.0
    return math.sqrt(ratio) if rule == "sqrt" else ratio


def step_decay(
    total_steps: int, warmup_steps: int, milestones: Sequence[float], factor: float
) -> Callable[[int], float]:
    """A schedule for `LambdaLR`: linear warm-up to 1, then times `factor` at each milestone, a share of all steps."""
    steps = [math.ceil(share * total_steps) for share in milestones]

    def rate(step: int) -> float:
        warm = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return warm * factor ** bisect_right(steps, step)

    return rate


def scale_learning_rate(optimizer: torch.optim.Optimizer, rule: str, batch_size: float, base: float | None) -> None:
    """Multiply the learning rate of every group, see `scaled_learning_rate_factor`."""
    if rule == "none" or base is None:
        return
    factor = scaled_learning_rate_factor(rule, batch_size, base)
    logger.info("learning rate times %.4g: %s scaling to a batch of %.6g", factor, rule, batch_size)
    for group in optimizer.param_groups:
        if group.get("lr") is not None:
            group["lr"] *= factor
