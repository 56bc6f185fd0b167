"""Tests that need a GPU: the operators on it, a step in a CUDA graph, no synchronization, compute-sanitizer."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn import Parameter

from crsam_ext import CRSAM

from ..conftest import missing

pytestmark = pytest.mark.require_cuda

STEPS = 3


def params_and_gradients(seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(n, generator=generator).cuda()) for n in (1, 3, 4097, 300000)]
    # The gradients are close to each other and not close to 0. If terms canceled, Adam would divide one rounding error
    # by another.
    signs = [torch.randn(p.shape, generator=generator).sign() for p in params]
    grads = [[(s * (1 + 0.3 * torch.rand(s.shape, generator=generator))).cuda() for s in signs] for _ in range(3)]
    return params, grads


def closure_of(params, grads):
    """Return a closure that gives each pass its gradients, as new tensors."""
    passes = iter(grads * 100)

    def closure():
        for p, g in zip(params, next(passes), strict=True):
            p.grad = g.clone()

    return closure


def train(backend, base, steps=STEPS):
    params, grads = params_and_gradients()
    optimizer = CRSAM(params, base, lr=0.1, backend=backend, max_grad_norm=1.0)
    closure = closure_of(params, grads)
    for _ in range(steps):
        optimizer.step(closure)
    return params


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_equal_torchs_and_are_deterministic(base, fused):
    found, again, expected = train(fused, base), train(fused, base), train("torch", base)
    for x, y, z in zip(found, again, expected, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-5, atol=1e-5)


def test_steps_do_not_synchronize(fused):
    params, grads = params_and_gradients()
    optimizer = CRSAM(params, lr=0.1, momentum=0.9, backend=fused)
    closure = closure_of(params, grads)
    optimizer.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_in_a_graph_give_the_same_bits(fused):
    """Replayed steps equal eager steps, bit for bit."""
    expected = train(fused, torch.optim.SGD, steps=5)
    params, grads = params_and_gradients()
    optimizer = CRSAM(params, torch.optim.SGD, lr=0.1, backend=fused, max_grad_norm=1.0, replay_rng=False)
    closure = closure_of(params, grads)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizer.step(closure)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(closure)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(params, expected, strict=True))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool, fused):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        missing("no compute-sanitizer was found")
    code = f"""
import torch
from crsam_ext import CRSAM
params = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (1, 3, 4097, 40000)]
optimizer = CRSAM(params, torch.optim.AdamW, lr=0.1, backend="{fused}", regularizer="log")
def closure():
    for p in params:
        p.grad = torch.randn_like(p)
optimizer.step(closure)
torch.cuda.synchronize()
"""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
