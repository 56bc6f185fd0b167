"""Measure the optimizer's part of a step. Run ``make bench`` or ``pytest benchmarks``; see benchmarks/README.md."""

import time

import psutil
import pytest
import torch

from crsam_ext import CRSAM, available_backends
from crsam_ext.training.models import cifar_resnet18

from . import host
from .peers import BASES, PEERS, Case, available
from .record import Contest
from .shapes import MODELS

DEFAULT = [
    ("resnet50", Case("crsam", "sgd"), torch.float32),
    ("vit_b32", Case("crsam", "sgd"), torch.float32),
    ("resnet18", Case("sam", "sgd"), torch.float32),
    ("resnet18", Case("crsam", "adamw"), torch.float32),
    ("resnet18", Case("crsam", "sgd"), torch.bfloat16),
]
FULL = [
    (model, Case(method, base), dtype)
    for model in MODELS
    for method in ("crsam", "sam")
    for base in BASES
    for dtype in (torch.float32, torch.bfloat16)
]


def pytest_generate_tests(metafunc):
    if "peer" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("full")
    metafunc.parametrize(
        ("model", "case", "dtype", "peer"),
        [
            pytest.param(*of_case, peer, id="-".join([model, *case, str(dtype)[6:], peer.replace(" ", "_")]))
            for of_case in (FULL if full else DEFAULT)
            for peer in PEERS
            for model, case, dtype in [of_case]
        ],
    )


def test_step(model, case, dtype, peer, device, rounds, results, benchmark):
    if not available(peer, case, dtype):
        pytest.skip("the peer is not available or does not support this case")
    elements = sum(torch.Size(shape).numel() for shape in MODELS[model]())
    # The peer and the loop, each with parameters, state, stored gradients and temporaries.
    needed, free = 20 * 4 * elements, psutil.virtual_memory().available
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"needs {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")
    contest = Contest(model, peer, case, dtype, device)
    benchmark.group = "-".join([model, *case, str(dtype)[6:]])
    benchmark.pedantic(contest.timed_step, setup=contest.references, rounds=rounds, warmup_rounds=2)
    results["results"].append(contest.finish(list(benchmark.stats.stats.data)))


@pytest.mark.parametrize("form", ["closure", "calls"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("backend", host.BACKENDS)
def test_host_time(backend, base, form, results):
    times = host.measure(backend, base, MODELS["resnet50"](), form, rounds=300)
    entry = {"backend": backend, "model": "resnet50", "base": base, "form": form}
    results["host"].append({**entry, "seconds": times.step, "floor": times.floor})


@pytest.mark.parametrize(
    "options",
    [{"backend": "torch"}, {"backend": "torch", "compile": True}, {"backend": "cuda"}, {"backend": "triton"}],
    ids=["eager", "compiled", "cuda", "triton"],
)
def test_share_of_a_training_step(options, device, rounds, results):
    """Measure the CIFAR form of ResNet-18: three gradients of a batch, and everything between them."""
    verdict = available_backends()[options["backend"]]
    if verdict != "available":
        pytest.skip(f"backend {options['backend']} is {verdict}")
    batch = 128 if device.type == "cuda" else 16
    torch.manual_seed(0)
    model = cifar_resnet18((3, 32, 32), 10).to(device)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    optimizer = CRSAM(model.parameters(), torch.optim.SGD, rho=0.1, model=model, **options, **BASES["sgd"])
    spent = 0.0

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def closure():
        nonlocal spent
        began = now()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        spent += now() - began
        return loss

    seconds, shares = [], []
    for index in range(-2, rounds):
        began, spent = now(), 0.0
        optimizer.step(closure)
        taken = now() - began
        if index >= 0:
            seconds.append(taken)
            shares.append(1 - spent / taken)
    name = f"crsam_ext {options['backend']}" + (", compiled" if options.get("compile") else "")
    entry = {"peer": name, "model": "cifar_resnet18", "batch": batch, "dtype": "float32"}
    results["shares"].append({**entry, "seconds": seconds, "shares": shares})
