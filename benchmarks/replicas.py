"""Training step time on several GPUs: CR-SAM with one, two and three all-reduces of the gradient, and SGD.

Run ``torchrun --nproc-per-node 8 -m benchmarks.replicas`` on each node, with one process per GPU. It trains ResNet-50
with bfloat16 autocast on random images and uses NCCL. ``--trace FOLDER`` writes a profile of one step of each form. In
it, the all-reduce of the last pass should overlap with its backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from crsam_ext import CRSAM

FORMS = {
    "SGD": "1 all-reduce, one pass",
    "every pass": "3 all-reduces: CRSAM without model=",
    "sync_perturbation": "2 all-reduces: one e for all ranks",
    "local": "1 all-reduce: one e per rank",
}


def step_of(form: str, batch: int, device: torch.device) -> Callable[[], object]:
    """Return a function that makes one step of a new model."""
    torch.manual_seed(0)
    network = torchvision.models.resnet50().to(device, memory_format=torch.channels_last)
    model = DistributedDataParallel(network, device_ids=[device], gradient_as_bucket_view=True)
    x = torch.randn(batch, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (batch,), device=device)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "rho": 0.0 if form == "SGD" else 0.1}
    if form != "every pass":
        options |= {"model": model, "sync_perturbation": form == "sync_perturbation"}
    optimizer = CRSAM(model.parameters(), torch.optim.SGD, **options)

    def closure() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def measure(step: Callable[[], object], rounds: int) -> list[float]:
    """Return the milliseconds of each step, after warm-up steps that choose kernels and arrange buckets."""
    for _ in range(6):
        step()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return times


def main() -> int:
    """Print a line for each form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=128, help="images per GPU (default: 128)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each form (default: 10)")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="write a profile of one step of each form")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device", file=sys.stderr)
        return 1
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    if rank == 0:
        print(
            f"{size} x {torch.cuda.get_device_name()}, torch {torch.__version__}, ResNet-50, {arguments.batch} per GPU"
        )
    for form, what in FORMS.items():
        torch.cuda.empty_cache()
        step = step_of(form, arguments.batch, device)
        times = measure(step, arguments.rounds)
        if arguments.trace is not None:
            with torch.profiler.profile() as profile:
                step()
            arguments.trace.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(arguments.trace / f"{form.replace(' ', '-')}-{rank}.json"))
        if rank == 0:
            low, middle, high = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
            print(f"{form:18} p20 {low:8.2f} p50 {middle:8.2f} p80 {high:8.2f} ms   {what}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
