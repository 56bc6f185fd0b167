"""What the benchmarks compare computes the same thing, and moves the bytes that are reported."""

import pytest
import torch

from benchmarks import operators
from benchmarks.overhead import contestants
from benchmarks.shapes import resnet50

from .cuda_on_cpu.build import counted

SHAPES = [(70, 300), (64,), (8, 4, 3, 3), (1,), (20000,)]


def after_two_steps(make):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    step = make(params)
    for _ in range(2):
        step([[torch.randn(shape) for shape in SHAPES] for _ in range(3)])
    return params


@pytest.mark.parametrize("name", [name for name in contestants() if name.startswith("crsam_ext")])
def test_agrees_with_the_loop(name):
    expected = after_two_steps(contestants()["loop per tensor"])
    actual = after_two_steps(contestants()[name])
    for a, b in zip(actual, expected, strict=True):
        # A few roundings of numbers of order 10 (gradient times the sum of the weights) in fp32.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bytes_of_operators(dtype, cuda_on_cpu, shim):
    """The bytes that GB/s are computed from are those that the kernels move."""
    lengths = [4097, 3, 300]
    entries = operators.contestants("cuda", dtype, torch.device("cpu"), lengths)
    del entries["copy"]
    for name, entry in entries.items():
        _, read, written = counted(shim, entry.call)
        assert read + written == entry.nbytes * sum(lengths), name


def test_measurement_of_operators(cuda_on_cpu):
    results = operators.measure("cuda", torch.float32, torch.device("cpu"), [4097, 3], rounds=3, calls=1)
    assert len(results) == 8
    for result in results.values():
        assert 0 < result["p20"] <= result["p50"] <= result["p80"]
        assert result["gb_per_s"] == pytest.approx(result["bytes"] / result["p50"] / 1e9)
    assert results["copy"]["of_copy"] == 1


def test_resnet50_has_the_published_size():
    assert len(resnet50()) == 161
    assert sum(torch.Size(shape).numel() for shape in resnet50()) == 25_557_032
