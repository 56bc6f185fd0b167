"""Time of a step that evaluates w + e and w - e together, by vmap, relative to a step that evaluates them in turn.

Run ``python -m benchmarks.parallel``; ``make gpu`` includes it. The two kinds of steps alternate and a ratio compares
adjacent steps, so that drift of the machine's speed favors neither.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from crsam_ext import CRSAM

CLASSES = 10


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES)
    )


def transformer() -> nn.Module:
    """Return a vision transformer with four layers over patches of 4 x 4."""

    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(2).transpose(1, 2)

    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(nn.Conv2d(3, 128, 4, stride=4), Mean(), encoder, nn.Flatten(), nn.Linear(64 * 128, CLASSES))


def convolutions() -> nn.Module:
    """Return a VGG-like network with group norm."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {"MLP": mlp, "transformer": transformer, "convolutions": convolutions}


def measure(device: torch.device, rounds: int, batch: int) -> dict[str, dict[str, float]]:
    """Return for each model the median seconds of a step in both forms, and quantiles of their ratio."""
    results = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make().to(device)
        models = [model, copy.deepcopy(model)]
        x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(CLASSES, (batch,), device=device)
        steps = [_sequential(models[0], x, y), _parallel(models[1], x, y)]
        times: list[tuple[float, float]] = []
        for index in range(-3, rounds):  # three warm-up rounds
            pair = tuple(_seconds(step, device) for step in steps)
            if index >= 0:
                times.append((pair[0], pair[1]))
        ratios = statistics.quantiles([parallel / sequential for sequential, parallel in times], n=5)
        results[name] = {
            "batch": batch,
            "sequential": statistics.median(s for s, _ in times),
            "parallel": statistics.median(p for _, p in times),
            "ratio p20": ratios[0],
            "ratio p50": statistics.median(p / s for s, p in times),
            "ratio p80": ratios[3],
        }
    return results


def _optimizer(model: nn.Module) -> CRSAM:
    return CRSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.01, momentum=0.9)


def _sequential(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    optimizer = _optimizer(model)

    def closure() -> torch.Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def _parallel(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    optimizer = _optimizer(model)
    return lambda: optimizer.step(lambda: F.cross_entropy(model(x), y), parallel=model)


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def table(results: dict[str, dict[str, float]]) -> str:
    """Return a table of the milliseconds of a step in both forms and their ratio."""
    lines = [f"{'':16}{'batch':>7}{'in turn ms':>12}{'together ms':>12}{'ratio p20':>11}{'p50':>7}{'p80':>7}"]
    for name, x in results.items():
        ratios = f"{x['ratio p20']:11.2f}{x['ratio p50']:7.2f}{x['ratio p80']:7.2f}"
        lines.append(f"{name:16}{x['batch']:7}{1e3 * x['sequential']:12.1f}{1e3 * x['parallel']:12.1f}{ratios}")
    return "\n".join(lines)


def main() -> None:
    """Measure on a CPU with small and large batches, and print the results."""
    for batch in (16, 128):
        print(table(measure(torch.device("cpu"), rounds=15, batch=batch)))


if __name__ == "__main__":
    main()
