"""What the benchmark compares computes the same thing."""

import pytest
import torch

from benchmarks.overhead import contestants
from benchmarks.shapes import resnet50

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


def test_resnet50_has_the_published_size():
    assert len(resnet50()) == 161
    assert sum(torch.Size(shape).numel() for shape in resnet50()) == 25_557_032
