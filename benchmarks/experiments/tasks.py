"""Data, networks and base optimizers. Nothing is downloaded: text comes from Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crsam_ext.training.data import load as load_training_data
from crsam_ext.training.models import create_model
from crsam_ext.training.options import parse

Samples = tuple[Tensor, Tensor]
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
ADAMW = {"lr": 2e-3, "weight_decay": 0.05}


@dataclass(frozen=True)
class Splits:
    """Training, validation and test samples: inputs (N, ...), int64 labels (N,) or (N, length)."""

    train: Samples
    validation: Samples
    test: Samples


@dataclass(frozen=True)
class Task:
    """A task: classify samples or nodes, or predict each character of a text."""

    load: Callable[[], Splits]
    model: Callable[[], nn.Module]
    batch_size: int
    epochs: int
    quick_epochs: int
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    base_options: dict[str, Any] = field(default_factory=lambda: SGD)
    share: float = 1.0  #: multiplies the number of samples for curvature; smaller for samples with many labels
    ablation: bool = False  #: whether all methods are compared, or only base, SAM and CR-SAM


def batches(
    x: torch.Tensor, y: torch.Tensor, batch_size: int, order: torch.Tensor, drop_last: bool = False
) -> Iterator[Samples]:
    """Yield batches of (x, y) in ``order``, an int64 tensor of indices. The last may be smaller, or is dropped."""
    stop = len(order) - len(order) % batch_size if drop_last else len(order)
    for indices in order[:stop].split(batch_size):
        yield x[indices], y[indices]


@cache
def images(name: str) -> Splits:
    """Return mnist1d or digits as in crsam-train, with a fixed fifth of the training samples for validation."""
    data = load_training_data(parse(["--data", name]), torch.device("cpu"))
    x, y = (torch.cat(parts) for parts in list(zip(*data.train(0, 0), strict=True))[:2])
    test = tuple(torch.cat(parts) for parts in list(zip(*data.test(), strict=True))[:2])
    kept = len(x) - len(x) // 5
    return Splits((x[:kept], y[:kept]), (x[kept:], y[kept:]), (test[0], test[1]))


def image_model(name: str, model: str) -> Callable[[], nn.Module]:
    shape = {"mnist1d": (40,), "digits": (1, 8, 8)}[name]
    return lambda: create_model(model, shape, 10)


LENGTH, CHARACTERS = 64, 128
FILES = {
    "train": ("configparser",),
    "validation": ("csv",),
    "test": ("calendar",),
}


@cache
def source_code() -> Splits:
    """Return windows of characters from modules of the standard library; each label is the next character."""
    folder = Path(sysconfig.get_path("stdlib"))
    splits = []
    for names in FILES.values():
        text = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in names)
        codes = torch.tensor([code for code in text.encode() if code < CHARACTERS])
        count = (len(codes) - 1) // LENGTH
        x, y = (codes[start : start + count * LENGTH].view(count, LENGTH) for start in (0, 1))
        splits.append((x, y))
    return Splits(*splits)


class Transformer(nn.Module):
    """A causal transformer with two layers. Input: int64 (N, length); output: (N, characters, length)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(CHARACTERS, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position.weight
        x = self.layers(x, nn.Transformer.generate_square_subsequent_mask(LENGTH), is_causal=True)
        return self.out(x).transpose(1, 2)


class Recurrent(nn.Module):
    """A network with one GRU layer. Input: int64 (N, length); output: (N, characters, length)."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embed, self.cells = nn.Embedding(CHARACTERS, width), nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(self.embed(x))[0]).transpose(1, 2)


@cache
def neighbor_graph() -> tuple[Tensor, Tensor, Tensor]:
    """Return scikit-learn's 1797 digits as a graph of their 8 nearest neighbors: features, adjacency, labels.

    The adjacency is D^-1/2 (A + I) D^-1/2, as in Kipf and Welling (ICLR 2017).
    """
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    features, labels = load_digits(return_X_y=True)
    near = torch.tensor(kneighbors_graph(features, 8).toarray(), dtype=torch.float32)
    adjacency = torch.maximum(near, near.T) + torch.eye(len(near))
    root = adjacency.sum(1).rsqrt()
    return torch.tensor(features / 16, dtype=torch.float32), root[:, None] * adjacency * root, torch.tensor(labels)


@cache
def nodes() -> Splits:
    """Return node indices and labels: 100 for training, 300 for validation, the other 1397 for testing."""
    labels = neighbor_graph()[2]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, validation, test = order.split([100, 300, len(order) - 400])
    return Splits((train, labels[train]), (validation, labels[validation]), (test, labels[test]))


class GraphNetwork(nn.Module):
    """A network with two graph convolutions. Input: node indices, int64 (N,); output: (N, 10)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        features, self.adjacency, _ = neighbor_graph()
        self.spread = self.adjacency @ features  # the first convolution's sum over neighbors is constant
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.adjacency[x] @ torch.relu(self.first(self.spread)))


TASKS = {
    "mnist1d-mlp": Task(lambda: images("mnist1d"), image_model("mnist1d", "mlp"), 128, 60, 20, ablation=True),
    "mnist1d-cnn": Task(lambda: images("mnist1d"), image_model("mnist1d", "cnn"), 128, 12, 3, ablation=True),
    "digits-cnn": Task(lambda: images("digits"), image_model("digits", "cnn"), 64, 12, 5, ablation=True),
    "characters-transformer": Task(source_code, Transformer, 32, 8, 3, torch.optim.AdamW, ADAMW, 1 / 16),
    "characters-gru": Task(source_code, Recurrent, 32, 8, 3, torch.optim.AdamW, ADAMW, 1 / 16),
    "graph": Task(nodes, GraphNetwork, 100, 200, 60),
}
