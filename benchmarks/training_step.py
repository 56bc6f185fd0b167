"""Time of a whole training step of ResNet-50 on a GPU: torch's SGD, SAM, and CR-SAM with each backend.

Run ``python -m benchmarks.training_step``. The batch, 256 images of 224 x 224 pixels, is one channels-last tensor on
the device, so no loader is measured. Training uses bfloat16 autocast. "device" is the time between events before and
after a step, "host" the time until the step was issued. Both are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torchvision
from torch.nn import functional as F

from crsam_ext import CRSAM, GraphedStep

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
CASES = ("sgd", "sam cuda", "crsam torch", "crsam cuda", "crsam triton", "crsam cuda graph")


def step_of(case: str, batch: int) -> Callable[[], object]:
    """Return a function that makes one step of a new model."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (batch,), device="cuda")

    def closure() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    method, *rest = case.split()
    if method == "sgd":
        base = torch.optim.SGD(model.parameters(), fused=True, **SGD)

        def step() -> None:
            base.zero_grad()
            closure()
            base.step()

        return step
    only_sam = {"alpha": 0.0, "beta": 0.0} if method == "sam" else {}
    optimizer = CRSAM(model.parameters(), torch.optim.SGD, rho=0.1, backend=rest[0], model=model, **SGD, **only_sam)
    return GraphedStep(optimizer, closure) if "graph" in rest else lambda: optimizer.step(closure)


def measure(step: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the milliseconds of a step on the device, and those until the host has issued it."""
    for _ in range(6):  # warm up: choose and compile kernels, capture a graph
        step()
    device, host = [], []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        start.record()
        step()
        stop.record()
        host.append(1e3 * (time.perf_counter() - began))
        stop.synchronize()
        device.append(start.elapsed_time(stop))
    return statistics.median(device), statistics.median(host)


def main() -> int:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=256, help="images per batch (default: 256)")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each case (default: 8)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device", file=sys.stderr)
        return 1
    torch.backends.cudnn.benchmark = True
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ResNet-50, batch {arguments.batch}")
    for case in CASES:
        torch.cuda.empty_cache()
        device, host = measure(step_of(case, arguments.batch), arguments.rounds)
        print(f"{case:20} device {device:8.2f} ms, host {host:8.2f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
