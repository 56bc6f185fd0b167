"""Federated averaging with SGD, SAM and CR-SAM as the clients' optimizer, for a fixed number of rounds.

    python -m benchmarks.experiments.federated   # half an hour on one core; an interrupted run continues

The algorithm is FedAvg (McMahan et al., AISTATS 2017). Clients have different label distributions, as in Hsu et al.
(arXiv 1909.06335): each label is split among the clients with shares from a Dirichlet distribution. For each number of
clients and of local steps, the learning rate of SGD is tuned on a validation split. SAM and CR-SAM use the same rate;
then their rho is tuned.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from crsam_ext import CRSAM
from crsam_ext.figures import method_color, panels
from crsam_ext.training import checkpoint
from crsam_ext.training.data import epoch_order

from ..tables import markdown_table
from .analysis import best_rho, mean_and_error
from .methods import METHODS
from .runs import evaluate, key_of, run_all
from .tasks import TASKS, Samples, batches

RESULTS = Path(__file__).parents[1] / "results"
VERSION = 1  # increment it when a change of the code changes the result of a run
TASK = "mnist1d-mlp"
CLIENTS = (10, 50)
PARTICIPANTS = 5  # clients per round
LOCAL_STEPS = (1, 2, 5, 10)
ROUNDS = 100
BATCH_SIZE = 32
CONCENTRATION = 0.3  # of the Dirichlet distribution
LEAST = 8  # minimum number of samples per client
# Clients keep no state between rounds. Momentum that starts from zero would have no effect on one local step, and a
# large effect on ten, so there is none.
SGD = {"momentum": 0.0, "weight_decay": 1e-3}
RHOS = (0.05, 0.1, 0.2)
GRADIENT_TICKS = (1, 2, 5, 10, 20)  # of the figure


Cell = tuple[int, int, str]  # clients, local steps, and method


@dataclass(frozen=True)
class Method:
    """How a client trains in a round."""

    options: dict[str, Any] | None = None  #: options of CRSAM; None means torch's SGD
    local_steps: int = 1  #: multiplies the number of local steps
    lrs: tuple[float, ...] = ()  #: candidate learning rates; empty: use the rate tuned for SGD


COMPARED = {
    "SGD": Method(lrs=(0.5, 1.0, 2.0)),
    "SAM": Method(METHODS["SAM"]),
    "CR-SAM": Method(METHODS["CR-SAM"]),
    "SGD, 3 x local steps": Method(local_steps=3, lrs=(0.25, 0.5, 1.0)),  # as many gradients as CR-SAM
}


@dataclass(frozen=True)
class Config:
    """All parameters that determine the result of a run."""

    task: str
    method: str
    clients: int
    participants: int  #: number of clients drawn for each round
    local_steps: int  #: local steps of SGD; a method may take a multiple
    rounds: int
    lr: float  #: initial learning rate, with cosine decay to 0
    rho: float
    seed: int
    tuning: bool = False  #: exclude the validation samples from training, and measure accuracy on them alone

    @property
    def key(self) -> str:
        return "federated-" + key_of(self, VERSION)


def split(labels: Tensor, clients: int, seed: int) -> list[Tensor]:
    """Assign samples to clients: return for each client the sorted indices of its samples, int64 (n,)."""
    generator = np.random.default_rng(seed)
    while True:
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in labels.unique():
            indices = generator.permutation(torch.nonzero(labels == label).flatten().numpy())
            shares = generator.dirichlet([CONCENTRATION] * clients)
            ends = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(int)
            for part, piece in zip(parts, np.split(indices, ends), strict=True):
                part.append(piece)
        dealt = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, dealt)) >= LEAST:  # otherwise draw again
            return [torch.from_numpy(indices) for indices in dealt]


def stream(x: Tensor, y: Tensor, seed: int) -> Iterator[Samples]:
    """Yield a client's batches indefinitely, epoch after epoch."""
    for epoch in count():
        yield from batches(x, y, BATCH_SIZE, epoch_order(len(x), seed, epoch))


class Federation:
    """A server and its clients. One model with its optimizer simulates each client in turn."""

    def __init__(self, config: Config, train: Samples) -> None:
        checkpoint.seed_everything(config.seed)
        self.config, self.method = config, COMPARED[config.method]
        options = self.method.options
        self.model = TASKS[config.task].model()
        assert not list(self.model.buffers()), "averaging of running statistics is not implemented"
        self.params = list(self.model.parameters())
        self.weights = [param.detach().clone() for param in self.params]  # the server's weights
        self.optimizer: torch.optim.Optimizer
        if options is None:
            self.optimizer = torch.optim.SGD(self.params, config.lr, **SGD)
        else:
            options = {"rho": config.rho, "lr": config.lr, **options, **SGD}
            self.optimizer = CRSAM(self.params, torch.optim.SGD, model=self.model, **options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.rounds)
        parts = split(train[1], config.clients, config.seed)
        self.sizes = [len(part) for part in parts]
        self.streams = [stream(train[0][part], train[1][part], 1000 * config.seed + k) for k, part in enumerate(parts)]
        self._drawing = torch.Generator().manual_seed(config.seed)
        self.sent = {"down": 0, "up": 0}  # bytes so far
        self.gradients = 0  # gradients so far

    def round(self) -> None:
        """Draw clients, train them, and average their weights, weighted by their numbers of samples."""
        drawn = torch.randperm(self.config.clients, generator=self._drawing)[: self.config.participants].tolist()
        total = sum(self.sizes[client] for client in drawn)
        mean = [torch.zeros_like(weight) for weight in self.weights]
        for client in drawn:
            self.load(self.weights)
            self.sent["down"] += nbytes(self.weights)
            for _ in range(self.method.local_steps * self.config.local_steps):
                self.step(*next(self.streams[client]))
            trained = [param.detach() for param in self.params]
            self.sent["up"] += nbytes(trained)
            torch._foreach_add_(mean, trained, alpha=self.sizes[client] / total)
        self.weights = mean
        self.schedule.step()

    @torch.no_grad()
    def load(self, weights: Sequence[Tensor]) -> None:
        """Copy weights into the model in place: the optimizer keeps the parameters in its buffers."""
        torch._foreach_copy_(self.params, weights)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Make one local step."""
        self.model.train()
        if self.method.options is None:
            self.optimizer.zero_grad()  # CRSAM does this itself

        def closure() -> Tensor:
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.gradients += 1
            return loss

        self.optimizer.step(closure)


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Return the total number of bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def run(config: Config) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    splits = TASKS[config.task].load()
    train, test = splits.train, splits.validation
    if not config.tuning:
        train = (torch.cat([train[0], splits.validation[0]]), torch.cat([train[1], splits.validation[1]]))
        test = splits.test
    federation = Federation(config, train)
    for _ in range(config.rounds):
        federation.round()
    federation.load(federation.weights)
    row = evaluate(federation.model, test, "test")
    row = {name: value if math.isfinite(value) else None for name, value in row.items()}
    row |= {"gradients": federation.gradients, **federation.sent}
    return {"config": asdict(config), "rows": [row], "seconds": round(time.perf_counter() - start, 1)}


def best(tuned: Sequence[dict[str, Any]], option: str) -> dict[Cell, float]:
    """Return, for each cell, the "lr" or "rho" with the best validation accuracy."""
    found = {}
    for clients in CLIENTS:
        for local_steps in LOCAL_STEPS:
            results = []
            for result in tuned:
                config = result["config"]
                if (config["clients"], config["local_steps"]) == (clients, local_steps):
                    results.append({**result, "config": {**config, "rho": config[option]}})
            found |= {(clients, local_steps, method): value for (_, method), value in best_rho(results).items()}
    return found


def tuning_configs_of_lr() -> list[Config]:
    return [
        Config(TASK, name, clients, PARTICIPANTS, local_steps, ROUNDS, lr, 0.0, 1000 + seed, tuning=True)
        for name, method in COMPARED.items()
        for clients in CLIENTS
        for local_steps in LOCAL_STEPS
        for lr in method.lrs
        for seed in range(3 // method.local_steps)  # as many gradients for each method
    ]


def tuning_configs_of_rho(lrs: dict[Cell, float]) -> list[Config]:
    return [
        Config(TASK, name, clients, PARTICIPANTS, local_steps, ROUNDS, lr, rho, 1000, tuning=True)
        for (clients, local_steps, tuned), lr in lrs.items()
        for name, method in COMPARED.items()
        if tuned == "SGD" and not method.lrs
        for rho in RHOS
    ]


def final_configs(lrs: dict[Cell, float], rhos: dict[Cell, float], seeds: int) -> list[Config]:
    configs = []
    for seed in range(seeds):
        for clients in CLIENTS:
            for local_steps in LOCAL_STEPS:
                for name, method in COMPARED.items():
                    lr = lrs[clients, local_steps, name if method.lrs else "SGD"]
                    rho = rhos.get((clients, local_steps, name), 0.0)
                    configs.append(Config(TASK, name, clients, PARTICIPANTS, local_steps, ROUNDS, lr, rho, seed))
    return configs


# Report --------------------------------------------------------------------------------------------------------------


def summaries(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each number of clients, number of local steps, and method."""
    by_cell: dict[Cell, list[dict[str, Any]]] = {}
    for result in results:
        config = result["config"]
        by_cell.setdefault((config["clients"], config["local_steps"], config["method"]), []).append(result)
    rows = []
    for (clients, local_steps, method), of_cell in by_cell.items():
        row = {"clients": clients, "local_steps": local_steps, "method": method}
        config, first = of_cell[0]["config"], of_cell[0]["rows"][0]
        row |= {"lr": config["lr"], "rho": config["rho"], "seeds": len(of_cell)}
        row |= {name: first[name] / config["rounds"] for name in ("down", "up", "gradients")}  # per round
        accuracies = [result["rows"][0]["test_accuracy"] for result in of_cell]
        rows.append(row | {"test_accuracy": mean_and_error(accuracies)})
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table for each number of clients."""
    lines: list[str] = []
    for clients in dict.fromkeys(row["clients"] for row in rows):
        lines += [f"## {clients} clients, {PARTICIPANTS} of them in each of {ROUNDS} rounds", ""]
        cells = []
        for row in rows:
            if row["clients"] == clients:
                accuracy, error = (100 * x for x in row["test_accuracy"])
                cells.append([
                    str(row["local_steps"]), row["method"], f"{row['gradients']:.0f}",
                    f"{row['down'] / 1000:.1f}", f"{row['up'] / 1000:.1f}",
                    f"{row['lr']:g}", f"{row['rho']:g}", str(row["seeds"]),
                    f"{accuracy:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}") + " %",
                ])  # fmt: skip
        head = ["local steps", "method", "gradients per round", "kB down per round", "kB up per round"]
        lines += [*markdown_table([*head, "lr", "rho", "seeds", "test accuracy"], cells), ""]
    lines.append(
        "Gradients and kB are totals over the participants of a round: down from the server, up from the clients. Test "
        "accuracy: mean ± standard error over the seeds.\n"
    )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw test accuracy against gradients per participant and round, one panel per number of clients."""
    numbers = list(dict.fromkeys(row["clients"] for row in rows))
    figure, axes = panels(len(numbers), height=3.4, columns=2, sharey=True)
    for ax, clients in zip(axes, numbers, strict=True):
        for name, method in COMPARED.items():
            known = [row for row in rows if (row["clients"], row["method"]) == (clients, name)]
            x = [row["gradients"] / PARTICIPANTS for row in known]
            means, errors = zip(*((100 * m, 100 * e) for m, e in (row["test_accuracy"] for row in known)), strict=True)
            style = "o-" if method.local_steps == 1 else "s--"
            ax.errorbar(x, means, errors, fmt=style, markersize=4, capsize=2, color=method_color(name), label=name)
        ax.set_xscale("log")
        ax.set_xticks(GRADIENT_TICKS, [str(tick) for tick in GRADIENT_TICKS])
        ax.set_xticks([], minor=True)
        ax.set_title(f"{clients} clients", fontsize=9)
        ax.set_xlabel("gradients per participant and round")
        ax.set_ylabel("test accuracy, %")
        ax.tick_params(labelleft=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COMPARED), fontsize=8)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write ``federated.json``, ``federated.md`` and ``federated.png``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.federated", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="final runs of each case (default: 5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--cache", type=Path, default=Path("runs/experiments"), help="folder of completed runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="output folder")
    args = parser.parse_args(argv)

    def computed(configs: Sequence[Config], what: str) -> list[dict[str, Any]]:
        return run_all(configs, args.cache, args.workers, progress(what, len(configs)), run)

    tuned = computed(tuning_configs_of_lr(), "tuning lr")
    lrs = best(tuned, "lr")
    tuned_rho = computed(tuning_configs_of_rho(lrs), "tuning rho")
    results = computed(final_configs(lrs, best(tuned_rho, "rho"), args.seeds), "runs")
    content = {"torch": torch.__version__, "seeds": args.seeds, "tuning": tuned + tuned_rho, "runs": results}
    rows = summaries(results)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "federated.json").write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    (args.output / "federated.md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, args.output / "federated.png")
    print(markdown(rows))


def progress(what: str, count: int) -> Callable[[int, dict[str, Any]], None]:
    def show(done: int, result: dict[str, Any]) -> None:
        config, accuracy = result["config"], result["rows"][0]["test_accuracy"]
        cell = f"{config['clients']} clients, {config['local_steps']} local steps, {config['method']}"
        options = f"lr {config['lr']:g}, rho {config['rho']:g}, seed {config['seed']}"
        print(f"{what} {done}/{count}: {cell}, {options}: {accuracy:.2%} in {result['seconds']:.0f} s", flush=True)

    return show


if __name__ == "__main__":
    main()
