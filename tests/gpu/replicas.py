"""Program for torchrun: compares DistributedDataParallel steps on a GPU with float64 steps on the CPU."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from crsam_ext import CRSAM

STEPS = 4
OPTIONS = {
    "linear": {"alpha": 0.3, "beta": 0.2},
    "sam": {"alpha": 0.0, "beta": 0.0},
    "log": {"regularizer": "log", "max_grad_norm": 0.5},
    "kept": {"curvature_interval": 2},
    "reuse": {"interval": 2, "reuse": True},
    "sync": {"sync_perturbation": True},
}


def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 50), torch.nn.Tanh(), torch.nn.Linear(50, 5)
    return torch.nn.Sequential(*layers)


def train(device, dtype, group, backend, base, options):
    """Return the parameters after some steps."""
    model = network().to(device, dtype)
    ddp = DistributedDataParallel(model, process_group=group)
    optimizer = CRSAM(model.parameters(), base, lr=0.01, rho=0.1, model=ddp, backend=backend, **options)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        x = torch.randn(16, 20, generator=generator, dtype=torch.float64).to(device, dtype)
        y = torch.randint(5, (16,), generator=generator).to(device)

        def closure(x=x, y=y):
            loss = torch.nn.functional.cross_entropy(ddp(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    optimizer.check_replicas()
    assert int(optimizer.stats.skipped) == 0
    return [p.detach().cpu().double() for p in model.parameters()]


def main(communication):
    dist.init_process_group(communication)
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    on_cpu = dist.new_group(backend="gloo")
    for name, options in OPTIONS.items():
        for base in (torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam):
            expected = train("cpu", torch.float64, on_cpu, "torch", base, options)
            for backend in ("cuda", "triton", "torch"):
                found = train(device, torch.float32, None, backend, base, options)
                # Adam divides by the magnitude of a gradient, so steps of 0.01 are only compared to 1e-4.
                for p, q in zip(found, expected, strict=True):
                    torch.testing.assert_close(
                        p, q, rtol=1e-3, atol=1e-4, msg=lambda m, c=(name, base, backend): f"{c}: {m}"
                    )
    dist.destroy_process_group()


main(sys.argv[1])
