"""Means and errors over seeds, and rank correlations between measures and the generalization gap."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

DRAWS = 1000  # draws of the bootstrap
#: Measures that need no test set.
PREDICTORS = ("train_c", "train_trace", "train_top_eigenvalue", "train_gradient_norm")


def best_rho(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Return, for each task and method, the rho with the best mean validation accuracy; the smallest if tied."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    for result in results:
        config = result["config"]
        by_rho = scores.setdefault((config["task"], config["method"]), {})
        by_rho.setdefault(config["rho"], []).append(result["rows"][-1]["test_accuracy"])
    return {key: max(sorted(by_rho), key=lambda rho: np.mean(by_rho[rho])) for key, by_rho in scores.items()}


def mean_and_error(values: Sequence[float | None]) -> tuple[float, float]:
    """Return the mean and its standard error. If a value is missing, both are NaN."""
    array = np.array([math.nan if v is None else v for v in values], dtype=float)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return float(array.mean()), float(error)


def summaries(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per task, method and checkpoint, with mean and error over seeds of every measurement."""
    groups: dict[tuple[str, str, float, int], list[dict[str, Any]]] = {}
    for result in results:
        config = result["config"]
        for row in result["rows"]:
            key = (config["task"], config["method"], config["rho"], row["epoch"])
            groups.setdefault(key, []).append(row)
    return [
        {"task": task, "method": method, "rho": rho, "epoch": epoch, "seeds": len(rows)}
        | {name: mean_and_error([row[name] for row in rows]) for name in rows[0] if name != "epoch"}
        for (task, method, rho, epoch), rows in groups.items()
    ]


def rank_correlation(x: np.ndarray, y: np.ndarray, kind: str) -> float:
    """Return Spearman's or Kendall's coefficient; NaN if either input is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float((stats.spearmanr if kind == "spearman" else stats.kendalltau)(x, y).statistic)


def bootstrap_interval(runs: Sequence[tuple[np.ndarray, np.ndarray]], kind: str, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of a rank correlation over the checkpoints of all runs.

    Whole runs are drawn, each with all its checkpoints, because the checkpoints of a run are not independent.

    Args:
        runs: for each run, the two quantities at its checkpoints.
        kind: "spearman" or "kendall".
    """
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(DRAWS):
        chosen = [runs[i] for i in generator.integers(len(runs), size=len(runs))]
        x, y = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
        values.append(rank_correlation(x, y, kind))
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def predictions(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each task, the rank correlation of each predictor with test loss − training loss.

    It is computed over all checkpoints, and over the last ones, which differ in method and seed but not in training
    time.
    """
    rows = []
    for task in dict.fromkeys(result["config"]["task"] for result in results):
        for which in ("all checkpoints", "last checkpoints"):
            for predictor in PREDICTORS:
                runs = []
                for result in results:
                    if result["config"]["task"] != task:
                        continue
                    chosen = result["rows"] if which == "all checkpoints" else result["rows"][-1:]
                    names = (predictor, "test_loss", "train_loss")
                    points = [r for r in chosen if all(r[n] is not None for n in names)]
                    if points:
                        gap = [r["test_loss"] - r["train_loss"] for r in points]
                        runs.append((np.array([r[predictor] for r in points]), np.array(gap)))
                row = {"task": task, "over": which, "predictor": predictor, "runs": len(runs)}
                for kind in ("spearman", "kendall") if len(runs) > 2 else ():
                    x, y = (np.concatenate(parts) for parts in zip(*runs, strict=True))
                    row[kind] = rank_correlation(x, y, kind)
                    row[f"{kind}_interval"] = bootstrap_interval(runs, kind)
                rows.append(row)
    return rows
