"""Host time of a step on shards: CRSAM with AdamW, and torch.optim.AdamW, on DTensors and on plain tensors.

`python -m benchmarks.sharded_host` simulates rank 5 of 4096 in one process: a fake process group performs collectives
without communication. The plain tensors are the same shards, so the difference is the cost of DTensors. The assignment
of gradients is not timed. Backend "cuda" is its own C++ without launching kernels (host.py). "torch" and AdamW include
the arithmetic on the shards, which are small.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, empty
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from crsam_ext import CRSAM
from crsam_ext.bench import quantiles

from .host import _empty_cuda, _step_of
from .shapes import MODELS, Shapes

RANK, RANKS = 5, 4096


def small() -> Shapes:
    """Return 10,000 tensors of which every rank holds 1 to 8 elements."""
    return [((1 + i % 8) * RANKS,) for i in range(10_000)]


SHAPES = {"gpt3_xl": MODELS["gpt3_xl"], "10,000 small": small}
PEERS = ("CRSAM, cuda without kernels", "CRSAM, torch", "AdamW, foreach")


@torch.no_grad()
def tensors(shapes: Shapes, mesh: Any, plain: bool) -> list[Tensor]:
    """Return random shards of tensors of these shapes, each in separate memory."""
    made = []
    for shape in shapes:
        tensor = empty(shape, device_mesh=mesh, placements=[Shard(0)])
        tensor.to_local().normal_(std=1e-3)
        made.append(tensor.to_local() if plain else tensor)
    return made


def step_of(peer: str, shapes: Shapes, mesh: Any, plain: bool) -> Callable[[], float]:
    """Return a function that makes a step and returns the processor seconds of this thread."""
    params = [Parameter(x) for x in tensors(shapes, mesh, plain)]
    options = {"lr": 1e-3, "weight_decay": 1e-2}
    if peer.startswith("CRSAM"):
        backend = "cuda" if "cuda" in peer else "torch"
        optimizer = CRSAM(params, torch.optim.AdamW, rho=0.1, backend=backend, **options)
        return _step_of(optimizer, params, [tensors(shapes, mesh, plain) for _ in range(3)], "closure")
    adamw, grads = torch.optim.AdamW(params, foreach=True, **options), tensors(shapes, mesh, plain)

    def step() -> float:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        began = time.thread_time()
        adamw.step()
        return time.thread_time() - began

    return step


def main() -> None:
    """Print a table, and write a result file with p20, p50 and p80 in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each kind (default: 15)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sharded-host.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    about = f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, one thread, fake process group"
    records: list[dict[str, Any]] = []
    result = {
        "device": about,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": f"python -m benchmarks.sharded_host --rounds {arguments.rounds}",
        "ranks": RANKS,
        "results": records,
    }
    print(f"{'ms of a step':56}{'p20':>9}{'p50':>9}{'p80':>9}")
    with _empty_cuda():
        for model, shapes_of in SHAPES.items():
            shapes = shapes_of()
            for peer in PEERS:
                steps = {kind: step_of(peer, shapes, mesh, kind == "plain") for kind in ("plain", "DTensor")}
                seconds: dict[str, list[float]] = {kind: [] for kind in steps}
                for index in range(-3, arguments.rounds):
                    for kind, step in steps.items():  # in turn, because the machine's speed drifts
                        taken = step()
                        if index >= 0:
                            seconds[kind].append(taken)
                for kind, of_kind in seconds.items():
                    cuts = [round(1e3 * q, 2) for q in quantiles(of_kind)]
                    records.append({"model": model, "peer": peer, "kind": kind, "ms": cuts})
                    print(f"{model}, {peer}, {kind:8}".ljust(56) + "".join(f"{q:9.2f}" for q in cuts), flush=True)
                arguments.output.write_text(json.dumps(result).replace("}, {", "},\n{") + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
