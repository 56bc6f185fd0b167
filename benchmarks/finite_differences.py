"""Error of kappa from finite differences, relative to the exact Hessian, by rho, precision, batch size and loss scale.

    python -m benchmarks.finite_differences

The log regularizer divides by kappa, an estimate of eᵀHe with e = rho g/‖g‖. ``estimator`` selects its source: the
gradients, ½ e·(g₊ − g₋), or the losses, L(w+e) + L(w−e) − 2 L(w). Here the optimizer computes kappa on batches of
half-trained networks (``stats.kappa``, with a learning rate of zero). The reference is eᵀHe for the same batch, mode
and direction, from Hessian-vector products in float64. Only rounding and the step size differ.

Both estimators should have a truncation error in rho². The rounding error should grow as 1/rho from gradients, whose
difference is divided by rho, and as 1/rho² from losses. If the network has kinks, a difference also contains the kinks
between w and w ± e, which the Hessian omits: an error without an order in rho. The model fitted to the medians is
``relative error² = (T rho²)² + (R / rho^p)² + K²`` with p = 1 or 2.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import nn
from torch.nn import functional as F

from crsam_ext import CRSAM, curvature
from crsam_ext.training.data import load
from crsam_ext.training.measure import Parts
from crsam_ext.training.models import create_model
from crsam_ext.training.options import parse
from crsam_ext.training.steps import Objective, Step, create_optimizer

from .experiments.tasks import Samples
from .tables import markdown_table

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
# Data, model and epochs of SGD after which a network is half-trained: one smooth network, and common ones with kinks
# (ReLU) and batch norm.
NETWORKS = {
    "MLP, GELU, mnist1d": ("--data mnist1d --model mlp", 10),
    "MLP, ReLU, mnist1d": ("--data mnist1d --model mlp", 10),
    "CNN, ReLU, batch norm, digits": ("--data digits --model cnn", 2),
}
PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16 autocast": torch.float32}
ESTIMATORS = {"gradient": 1, "loss": 2}  # the power of rho by which their rounding error decreases
COLORS = {"gradient": "tab:blue", "loss": "tab:green"}
RHOS = [float(rho) for rho in 10 ** np.linspace(-4, 0, 13)]
TOLERANCE = 0.1
# Batch size and loss factor. All networks use the first pair; only the first network uses the others.
SETTINGS = [(128, 1.0), (16, 1.0), (512, 1.0), (128, 1e-3), (128, 1e3)]


def half_trained(name: str) -> tuple[nn.Module, Samples]:
    """Return a network after some epochs of SGD, and the samples of the next epoch."""
    command, epochs = NETWORKS[name]
    options = parse([*command.split(), "--optimizer", "sgd", "--schedule", "constant"])
    data = load(options, CPU)
    torch.manual_seed(0)
    model = create_model(options.model, data.shape, data.classes)
    if "GELU" in name:
        model = nn.Sequential(*(nn.GELU() if isinstance(layer, nn.ReLU) else layer for layer in model))
    objective = Objective(model, options).train()
    step = Step(objective, create_optimizer(objective, options), Parts(CPU))
    for epoch in range(epochs):
        for x, y, _ in data.train(epoch, 0):
            step(x, y)
    last = list(data.train(epochs, 0))
    x, y = torch.cat([batch.x for batch in last]), torch.cat([batch.y for batch in last])
    # A copy, because the optimizer has moved the parameters into its buffers.
    return copy.deepcopy(model), (x, y)


def kappas(
    model: nn.Module, batch: Samples, rhos: list[float], estimator: str, precision: str, scale: float
) -> tuple[list[float], list[torch.Tensor]]:
    """Return kappa for each rho, as the optimizer computes it, and the gradient that gives its direction."""
    x, y = batch
    model = copy.deepcopy(model).to(PRECISIONS[precision]).train()
    optimizer = CRSAM(model.parameters(), lr=0.0, regularizer="log", estimator=estimator, model=model)

    def closure() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
            loss = scale * F.cross_entropy(model(x.to(PRECISIONS[precision])), y)
        loss.backward()
        return loss

    values = []
    for rho in rhos:
        optimizer.param_groups[0]["rho"] = rho
        optimizer.step(closure)
        assert optimizer.stats.kappa is not None
        values.append(float(optimizer.stats.kappa))
    return values, [p.grad.double() for p in model.parameters() if p.grad is not None]


def errors_of(
    model: nn.Module, batches: list[Samples], rhos: list[float], precision: str, scale: float
) -> dict[str, list[list[float]]]:
    """Return relative errors of kappa: for each estimator, a list over rho of lists over batches."""
    wide = copy.deepcopy(model).double()
    errors: dict[str, list[list[float]]] = {name: [] for name in ESTIMATORS}
    for x, y in batches:
        measured = {name: kappas(model, (x, y), rhos, name, precision, scale) for name in ESTIMATORS}
        direction = measured["gradient"][1]  # the same for all rho and both estimators
        exact = curvature.directional_curvature(
            wide, F.cross_entropy, [(x.double(), y)], direction=direction, training=True
        ).value
        for name, (values, _) in measured.items():
            errors[name].append([k / (scale * rho**2 * exact) - 1 for k, rho in zip(values, rhos, strict=True)])
    return {name: [list(of_rho) for of_rho in zip(*rows, strict=True)] for name, rows in errors.items()}


def fit(rhos: list[float], medians: list[float], power: int) -> list[float]:
    """Return T, R and K of the error model, by least squares of the logarithm of the error."""
    rho, error = np.array(rhos), np.maximum(medians, 1e-16)

    def residuals(logs: np.ndarray) -> np.ndarray:
        return np.log(modeled(np.exp(logs), rho, power)) - np.log(error)

    start = [math.log(error[-1] / rho[-1] ** 2), math.log(error[0] * rho[0] ** power), math.log(min(error))]
    return [float(x) for x in np.exp(least_squares(residuals, start, loss="soft_l1").x)]


def modeled(parameters: list[float], rho: np.ndarray, power: int) -> np.ndarray:
    """Return the error that the model predicts."""
    truncation, rounding, kinks = parameters
    return np.sqrt((truncation * rho**2) ** 2 + (rounding / rho**power) ** 2 + kinks**2)


def good_range(rhos: list[float], by_rho: list[list[float]]) -> list[float] | None:
    """Return the longest range of rho in which the 90 % quantile over batches is within the tolerance, or None."""
    good = [np.quantile(np.abs(errors), 0.9) <= TOLERANCE for errors in by_rho]
    best: list[float] = []
    current: list[float] = []
    for rho, ok in zip(rhos, good, strict=True):
        current = [*current, rho] if ok else []
        best = max(best, current, key=len)
    return [best[0], best[-1]] if best else None


def measure(
    networks: list[str], settings: list[tuple[int, float]], rhos: list[float], count: int
) -> list[dict[str, Any]]:
    """Return one row for each network, setting, precision and estimator."""
    rows = []
    for name in networks:
        model, (x, y) = half_trained(name)
        for batch_size, scale in settings if name == networks[0] else settings[:1]:
            batches = [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(x), batch_size)][:count]
            batches = [batch for batch in batches if len(batch[0]) == batch_size]
            for precision in PRECISIONS:
                for estimator, by_rho in errors_of(model, batches, rhos, precision, scale).items():
                    medians = [float(np.median(np.abs(errors))) for errors in by_rho]
                    truncation, rounding, kinks = fit(rhos, medians, ESTIMATORS[estimator])
                    rows.append(
                        {
                            "network": name,
                            "batch_size": batch_size,
                            "loss_scale": scale,
                            "batches": len(batches),
                            "precision": precision,
                            "estimator": estimator,
                            "range": good_range(rhos, by_rho),
                            "truncation": truncation,
                            "rounding": rounding,
                            "kinks": kinks,
                            "median": medians,
                            "p90": [float(np.quantile(np.abs(errors), 0.9)) for errors in by_rho],
                        }
                    )
            print(f"{name}, batches of {batch_size}, loss times {scale:g}: done", flush=True)
    return rows


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [
        "# Error of kappa from finite differences, relative to the exact Hessian",
        "",
        f"`{about['command']}`, torch {about['versions']['torch']}, {about['machine']}.",
        "",
        "- loss ×: factor by which the loss is multiplied.",
        f"- range of rho: where the 90 % quantile of the error over {rows[0]['batches']} batches is at most "
        f"{TOLERANCE:.0%}. {len(about['rhos'])} values from 1e-4 to 1 were tried, evenly spaced on a log scale.",
        "- T, R, K: coefficients of the fitted error model, relative error² = (T rho²)² + (R / rho^p)² + K², with "
        "p = 1 (gradient) or 2 (loss).",
        "",
    ]
    head = ["network", "batch size", "loss ×", "precision", "estimator", "range of rho", "T", "R", "K"]
    cells = []
    at = min(range(len(about["rhos"])), key=lambda i: abs(about["rhos"][i] - 0.1))
    for row in rows:
        span = "none" if row["range"] is None else f"{row['range'][0]:.2g} to {row['range'][1]:.2g}"
        cells.append([
            row["network"], str(row["batch_size"]), f"{row['loss_scale']:g}", row["precision"], row["estimator"], span,
            f"{row['truncation']:.2g}", f"{row['rounding']:.1g}", f"{row['kinks']:.1g}", f"{row['median'][at]:.1%}",
        ])  # fmt: skip
    lines += markdown_table([*head, "median error at rho = 0.1"], cells)
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], rhos: list[float], path: Path) -> None:
    """Draw the error over rho for batches of 128: one row of panels per network, one column per precision."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from crsam_ext.figures import panels, reference_line

    networks = list(dict.fromkeys(row["network"] for row in rows))
    columns = len(PRECISIONS)
    figure, axes = panels(len(networks) * columns, height=2.4, columns=columns, sharex=True, sharey=True)
    rho = np.array(rhos)
    for row in rows:
        if (row["batch_size"], row["loss_scale"]) != SETTINGS[0]:
            continue
        ax = axes[networks.index(row["network"]) * columns + list(PRECISIONS).index(row["precision"])]
        color = COLORS[row["estimator"]]
        ax.loglog(rho, np.maximum(row["median"], 1e-12), "o-", color=color, markersize=3)
        ax.fill_between(
            rho, np.maximum(row["median"], 1e-12), np.maximum(row["p90"], 1e-12), color=color, alpha=0.2, linewidth=0
        )
        power = ESTIMATORS[row["estimator"]]
        model = modeled([row["truncation"], row["rounding"], row["kinks"]], rho, power)
        ax.loglog(rho, model, "--", color=color, linewidth=1)
        ax.set_ylim(1e-9, 1e3)
        ax.set_title(f"{row['network']}\n{row['precision']}", fontsize=9)
        ax.set_xlabel("ρ")
        ax.set_ylabel("relative error of κ")
    for ax in axes:
        reference_line(ax, TOLERANCE, f"{TOLERANCE:.0%}", vertical=False)
        ax.label_outer()
    handles = [
        *(Line2D([], [], color=color, label=f"estimator: {name}") for name, color in COLORS.items()),
        Line2D([], [], color="black", marker="o", markersize=3, label="median"),
        Patch(color="black", alpha=0.2, linewidth=0, label="median to 90 % quantile"),
        Line2D([], [], color="black", linestyle="--", linewidth=1, label="fitted error model"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=10, help="batches in each setting (default: 10)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of finite-differences.{json,md,png}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(list(NETWORKS), SETTINGS, RHOS, args.batches)
    about = {
        "what": "relative error of kappa, as CRSAM estimates it, against the exact quadratic form",
        "command": " ".join(["python -m benchmarks.finite_differences", *sys.argv[1:]]),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rhos": RHOS,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "finite-differences.json").write_text(json.dumps({**about, "rows": rows}) + "\n")
    (args.output / "finite-differences.md").write_text(markdown(rows, about))
    draw(rows, RHOS, args.output / "finite-differences.png")
    print(markdown(rows, about))


if __name__ == "__main__":
    main()
