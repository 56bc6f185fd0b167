"""Program that torchrun runs on each of two hosts: DistributedDataParallel steps with a checkpoint after each step."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from crsam_ext import CRSAM


def train(folder, steps, pause):
    """Continue from the last checkpoint; each gradient takes ``pause`` additional seconds."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).double()
    model = DistributedDataParallel(network)
    optimizer = CRSAM(
        model.parameters(), torch.optim.SGD, model=model, lr=0.1, momentum=0.9, rho=0.1, alpha=0.5, curvature_interval=2
    )
    path, first, rank = Path(folder, "last.pt"), 0, dist.get_rank()
    if path.exists():
        saved = torch.load(path)
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["steps"]
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(16, 10, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (16,), generator=generator)

        def closure(x=x, y=y):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            time.sleep(pause)
            loss.backward()
            return loss

        optimizer.step(closure)
        if rank == 0:
            saved = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "steps": step + 1}
            torch.save(saved, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)
    optimizer.check_replicas()
    return [p.detach().clone() for p in network.parameters()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    train(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    dist.destroy_process_group()
