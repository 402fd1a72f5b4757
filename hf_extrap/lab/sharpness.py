"""The sharpness of a saved model: the largest Hessian eigenvalue, and the loss along two lines, with a figure."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from hf_extrap.lab.figures import add_legend, finish, make_panels
from hf_extrap.recipes.run_folder import write_json
from hf_extrap.recipes.saved_run import SavedRun, load_saved_run
from hf_extrap.recipes.secrets import command_line
from hf_extrap.recipes.tables import make_table
from hf_extrap.training.curvature.lanczos import Eigenpair, largest_eigenpair
from hf_extrap.training.curvature.mean_loss import BatchNorm, CurvatureError, Differentiation, MeanLoss
from hf_extrap.training.curvature.preconditioner import preconditioned
from hf_extrap.training.figures import COLOURS
from hf_extrap.training.versions import versions

SHARPNESS_FILE = "sharpness.json"
FIGURE_FILE = "sharpness.png"
POINTS = 33
"""Number of losses along each line."""


def sharpness(
    checkpoint: str | Path,
    words: Sequence[str] = (),
    *,
    config: str | None = None,
    batches: int = 4,
    split: str = "train",
    differentiation: str = "autograd",
    batch_norm: str = "batch",
    tolerance: float = 1e-2,
    output_dir: str | Path | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure a saved model, and write sharpness.json and sharpness.png to its folder.

    Args:
        checkpoint: folder of a run, of a checkpoint in it, or of any saved model.
        words: `--field value …`, which override the run's own fields.
        config: YAML file with the fields of a saved model without run.json.
        batches: number of batches that the loss is averaged over: the first of the split in the run's own order and
            size, without dropout and augmentation.
        split: `train` or `validation`.
        differentiation: `autograd` or `differences`, see `MeanLoss`.
        batch_norm: `batch` or `running`, see `MeanLoss`.
        tolerance: of the eigenvalues' residual.
        output_dir: folder to write to; default: the checkpoint's.
        command: the command line, for the record.

    Returns:
        The content of sharpness.json.

    Raises:
        FileNotFoundError: the folder, its weights or the data do not exist.
        ValueError: a value that is not allowed, a folder that holds a measurement, or a model that cannot be measured.
    """
    if batches < 1:
        raise ValueError(f"batches is {batches}; allowed: a whole number >= 1.")
    if split not in ("train", "validation"):
        raise ValueError(f"split is {split!r}; allowed: train, validation.")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance:g}; allowed: a share of the eigenvalue, in (0, 1).")
    folder = Path(output_dir or checkpoint)
    if (folder / SHARPNESS_FILE).exists():
        raise ValueError(f"{folder / SHARPNESS_FILE} exists already; give another --output_dir, or delete it.")
    saved = load_saved_run(Path(checkpoint), words, config)
    trainer = saved.trainer
    on_train = split == "train"
    loader = trainer.get_train_dataloader() if on_train else trainer.get_eval_dataloader()
    streams = trainer.args.gradient_accumulation_steps if on_train else 1
    mean_loss = trainer.sharpness.mean_loss(
        trainer.sharpness.samples(loader, batches, streams),
        cast(Differentiation, differentiation),
        cast(BatchNorm, batch_norm),
    )
    content = {
        "checkpoint": str(checkpoint),
        "step": saved.step,
        "task": saved.configuration.task.name,
        "split": split,
        "batches": len(mean_loss.batches),
        "batch_size": trainer.args.train_batch_size if on_train else trainer.args.eval_batch_size,
        "differentiation": differentiation,
        "batch_norm": batch_norm,
        "tolerance": tolerance,
        "parameters": mean_loss.point.numel(),
        **measure(mean_loss, saved, tolerance),
        "arguments": saved.configuration.given,
        "versions": versions(),
        "command": command or command_line(sys.argv[1:]),
    }
    write_json(folder / SHARPNESS_FILE, content)
    draw_sharpness(content, folder / FIGURE_FILE)
    return content


def measure(mean_loss: MeanLoss, saved: SavedRun, tolerance: float) -> dict[str, Any]:
    """Loss, gradient, eigenvalues, and the loss along two lines.

    Raises:
        CurvatureError: if the model cannot be measured.
    """
    quiet = bool(saved.trainer.args.disable_tqdm)
    loss, gradient = mean_loss.value(), mean_loss.gradient()
    norm = float(gradient.norm())
    if not math.isfinite(loss + norm):
        raise CurvatureError(f"the loss is {loss:g} and the norm of its gradient {norm:g}: the run has diverged.")

    def eigenpair(product: Callable[[Tensor], Tensor], what: str) -> Eigenpair:
        with tqdm(desc=what, unit=" products", leave=False, disable=quiet) as bar:

            def counted(vector: Tensor) -> Tensor:
                bar.update()
                return product(vector)

            return largest_eigenpair(counted, mean_loss.point, tolerance=tolerance)

    top = eigenpair(mean_loss.hessian_product, "Hessian products")
    direction = gradient / norm if norm else gradient
    bend = float(direction @ mean_loss.hessian_product(direction)) if norm else 0.0
    preconditioner = saved.trainer.sharpness.preconditioner(mean_loss)
    in_metric = None
    if preconditioner is not None:
        in_metric = eigenpair(preconditioned(mean_loss.hessian_product, preconditioner), "products in Adam's metric")

    # Along the gradient the parabola has its minimum at 1 / bend; along the eigenvector it rises by half the loss.
    unit = next((1 / curvature for curvature in (bend, top.value) if curvature > 0), saved.learning_rate or 1.0)
    rates = (unit * np.linspace(-1, 3, POINTS)).tolist()
    reach = math.sqrt(abs(loss / top.value)) if top.value else 1.0
    lengths = (reach * np.linspace(-1, 1, POINTS)).tolist()
    with tqdm(total=2 * POINTS, desc="losses along lines", leave=False, disable=quiet) as bar:
        along_gradient = mean_loss.along(-gradient, rates, bar.update)
        along_eigenvector = mean_loss.along(top.vector, lengths, bar.update)
    rate = saved.learning_rate
    return {
        "loss": loss,
        "gradient_norm": norm,
        "sharpness": top.value,
        "sharpness_residual": top.residual,
        "sharpness_products": top.products,
        "preconditioned_sharpness": in_metric.value if in_metric else None,
        "preconditioned_residual": in_metric.residual if in_metric else None,
        "preconditioned_products": in_metric.products if in_metric else None,
        "difference_error": mean_loss.product_error(top.vector) if top.value else 0.0,
        "gradient_curvature": bend,
        "eigenvector_slope": float(gradient @ top.vector),
        "learning_rate": rate,
        "lines": {
            "gradient": {
                "learning_rate": rates,
                "length": [r * norm for r in rates],
                "share_of_learning_rate": [r / rate for r in rates] if rate else None,
                "loss": along_gradient,
            },
            "eigenvector": {"length": lengths, "loss": along_eigenvector},
        },
    }


def draw_sharpness(content: Mapping[str, Any], path: Path) -> None:
    """Draw the loss along both lines, with the parabola that slope and curvature at 0 predict.

    Args:
        content: of sharpness.json.
        path: PNG file to write.
    """
    figure, (left, right) = make_panels(2, height=3.2)
    lines, norm, loss = content["lines"], content["gradient_norm"], content["loss"]
    rates, t = np.array(lines["gradient"]["learning_rate"]), np.array(lines["eigenvector"]["length"])
    parabolas = (
        loss - norm**2 * (rates - content["gradient_curvature"] * rates**2 / 2),
        loss + content["eigenvector_slope"] * t + content["sharpness"] * t**2 / 2,
    )
    for axes, at, key, parabola in zip((left, right), (rates, t), ("gradient", "eigenvector"), parabolas, strict=True):
        # JSON's null, a loss that is not finite, leaves a gap.
        values = np.array(lines[key]["loss"], dtype=float)
        values[~np.isfinite(values)] = np.nan
        axes.plot(at, values, color=COLOURS[0], linewidth=1.5, marker="o", markersize=2.5, label="loss")
        if np.isfinite(values).any() and (spread := np.nanmax(values) - np.nanmin(values)) > 0:
            axes.set_ylim(np.nanmin(values) - spread / 10, np.nanmax(values) + spread / 10)
        axes.plot(at, parabola, color=COLOURS[1], linewidth=1.2, linestyle="--", label="slope and curvature at 0")
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.ticklabel_format(scilimits=(-3, 4))
    finish(left, across="learning rate γ of one gradient step, x − γ g", up="loss")
    finish(right, across="length t of the step along the eigenvector")
    if norm:
        lengths = left.secondary_xaxis("top", functions=(lambda rate: rate * norm, lambda t: t / norm))
        lengths.set_xlabel("length of the step, ‖γ g‖", fontsize=9)
        lengths.tick_params(labelsize=9)
    add_legend(figure, [left])
    # Matplotlib reads what is between dollar signs as mathematics.
    title = f"{content['task'].replace('_', ' ')}, {Path(content['checkpoint']).name}".replace("$", r"\$")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def print_sharpness(content: dict[str, Any], folder: str | Path, console: Console | None = None) -> None:
    """Print the measurement, and where its files are."""
    console = console or Console()
    rate, top, in_metric = content["learning_rate"], content["sharpness"], content["preconditioned_sharpness"]
    effort = f"{content['sharpness_residual']:.1e}, {content['sharpness_products']}"
    numbers = {
        "loss": f"{content['loss']:.6g}",
        "norm of the gradient": f"{content['gradient_norm']:.4g}",
        "sharpness, the largest eigenvalue of the Hessian": f"{top:.4g}",
        "  its residual, and the number of products": effort,
        "  error of its product against central differences": f"{content['difference_error']:.1e}",
        "curvature along the gradient": f"{content['gradient_curvature']:.4g}",
        "sharpness in Adam's metric": in_metric,
        "learning rate of the next step": rate,
        "  times the sharpness (gradient descent: stable below 2)": rate and rate * top,
        "  times the sharpness in Adam's metric (Adam, β₁ = 0.9: 38)": rate and in_metric and rate * in_metric,
    }
    rows = [[name, f"{v:.4g}" if isinstance(v, float) else v] for name, v in numbers.items() if v]
    what = f"{content['batches']} × {content['batch_size']} rows of {content['split']}, by {content['differentiation']}"
    console.print()
    console.print(make_table(f"Sharpness of {content['checkpoint']}: {what}", ["measured", "value"], rows))
    for name, file in (("figure", FIGURE_FILE), ("all numbers", SHARPNESS_FILE)):
        console.print(f"  {name:<12}{Path(folder) / file}", soft_wrap=True, highlight=False, markup=False)
