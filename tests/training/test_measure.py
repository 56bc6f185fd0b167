"""Times, rates and sums, and the floating-point operations of a pass."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from crsam_ext.training import measure
from crsam_ext.training.data import Batch, Data
from crsam_ext.training.loop import Training, start
from crsam_ext.training.measure import Epoch, Parts, correct_in_top, flops_of_pass, peak_tflops
from crsam_ext.training.options import parse
from crsam_ext.training.progress import progress
from crsam_ext.training.ranks import ALONE

CPU = torch.device("cpu")


class Clock:
    """A clock that moves only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def go(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_parts_of_the_time_add_up(clock):
    parts, began = Parts(CPU), clock.now
    for seconds, part in ((3, "data"), (1, "other"), (4, "gradients"), (0.5, "optimizer"), (2, "gradients")):
        clock.go(seconds)
        parts.mark(part)

    assert parts.seconds() == {"data": 3, "other": 1, "gradients": 6, "optimizer": 0.5}
    assert clock.now - began == 10.5
    assert parts.seconds() == {}
    clock.go(7)
    parts.mark("data")
    assert parts.seconds() == {"data": 7}


@pytest.fixture
def train_by_the_clock(clock, tmp_path, monkeypatch):
    """Return a function that trains a linear model on eight batches of 10 per epoch and returns the rows of its log
    lines.

    A batch takes 1 s, each forward and backward pass 2 s, the optimizer 0.5 s before each of them and after the last,
    and a test 100 s.
    """

    def train(command):
        rows = []
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(10, 6, generator=generator), torch.arange(10) % 3

        def batches(epoch, first):
            for _ in range(first, 8):
                clock.go(1)
                yield Batch(x, y)

        def test():
            clock.go(100)
            return [Batch(x, y)]

        data = Data((6,), 3, 8, batches, test)
        options = parse(f"--epochs 2 --batch-size 10 --log-interval 4 --lr 0.01 --output {tmp_path} {command}".split())
        monkeypatch.setattr("crsam_ext.training.loop.create_model", lambda *args, **kwargs: nn.Linear(6, 3))
        state = start(options, data, CPU, ALONE)
        forward = state.objective.forward

        def timed_forward(*args):
            clock.go(0.5)
            training.parts.mark("optimizer")
            clock.go(2)
            return forward(*args)

        monkeypatch.setattr(state.objective, "forward", timed_forward)
        state.optimizer.register_step_post_hook(lambda *args: clock.go(0.5))
        logs = SimpleNamespace(
            add_step=rows.append, add_epoch=lambda *args: None, sync=lambda: None, draw=lambda history: None
        )
        requests = SimpleNamespace(begin_step=int, end_step=int, save=False, saved=int, raise_if_stopped=bool)
        training = Training(options, data, state, requests, logs)
        training.run()
        return rows

    return train


def test_rates_follow_from_the_time_of_the_steps(train_by_the_clock):
    rows = train_by_the_clock("--optimizer crsam --peak-tflops 1e-6")

    # A step takes 1 + 3 (0.5 + 2) + 0.5 = 9 s, for 10 images and 30 gradients; evaluation is not part of the rates.
    for row in rows:
        assert row["images_per_second"] == row["images_per_second_per_device"] == pytest.approx(10 / 9)
        assert row["gradients_per_second"] == pytest.approx(30 / 9)
        assert row["data_percent"] == pytest.approx(100 / 9)
        assert row["optimizer_percent"] == pytest.approx(100 * 2 / 9)
        # Forward: 2 * 6 * 3; backward: the same for the weights. The input needs no gradient.
        assert row["mfu_percent"] == pytest.approx(100 * (72 * 30 / 9) / 1e6)
    assert [row["step"] for row in rows] == [4, 8, 12, 16]
    # 12 and then 8 steps of 9 s are left. Before the last 4 steps, 12 steps have taken 108 s and an evaluation 100 s.
    assert [row["remaining_seconds"] for row in rows] == pytest.approx([108, 72, 4 * (108 + 100) / 12, 0])


def test_rates_count_the_passes_that_were_taken(train_by_the_clock):
    rows = train_by_the_clock("--optimizer crsam --curvature-interval 5 --epochs 5 --log-interval 40")

    # Rows end with the epochs: 5 times 8 steps, of which every fifth took three passes and the others two.
    gradients = sum(row["gradients_per_second"] / row["images_per_second"] for row in rows) / len(rows)
    assert gradients == pytest.approx(2.2)
    assert {row["mfu_percent"] for row in rows} == {None}  # the CPU's peak is unknown


def test_sums_of_an_epoch_are_exact():
    epoch = Epoch()
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    epoch.add(torch.tensor(0.5), logits, torch.tensor([0, 0, 0]), torch.tensor(2.0))
    epoch.fold()
    epoch.add(torch.tensor(2.0), logits[:1], torch.tensor([[0.3, 0.7]]), torch.tensor(math.inf))
    epoch.add(torch.tensor(1.0), logits[:1], torch.tensor([0]), None)

    epoch.fold()
    assert epoch.means() == pytest.approx({"loss": (1.5 + 2 + 1) / 5, "accuracy": 3 / 5, "grad_norm": 2})
    assert epoch.means(2) == pytest.approx({"loss": 1, "accuracy": 1, "grad_norm": math.nan}, nan_ok=True)
    other = Epoch()
    other.load(epoch.state())
    assert other.means() == epoch.means()


def test_sums_do_not_depend_on_when_they_are_fetched():
    sums = []
    for interval in (1, 3, 100):
        epoch, generator = Epoch(), torch.Generator().manual_seed(0)
        for step in range(20):
            loss, logits = torch.rand((), generator=generator), torch.rand(7, 3, generator=generator)
            epoch.add(loss, logits, torch.arange(7) % 3, loss)
            if step % interval == 0:
                epoch.fold()
        epoch.fold()
        sums.append(epoch.means())
    assert sums[0] == sums[1] == sums[2]


def test_top_k_counts_labels_among_the_largest_logits():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5]])

    assert [int(correct_in_top(logits, torch.tensor([1, 0]), k)) for k in (1, 2, 5, 6, 9)] == [0, 1, 1, 2, 2]


def test_flops_of_linear_layers():
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))

    # A matrix product takes 2 operations per weight: for the forward, for the weight gradient and, except in the first
    # layer, for the input gradient.
    assert flops_of_pass(model, (4, 5)) == 2 * (2 * 20 * 30 + 3 * 30 * 5)
    assert next(model.parameters()).device.type == "cpu"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_flops_of_resnet18():
    import timm

    # 1.82 G multiply-adds forward (He et al. 2016); the first convolution needs no gradient of the pixels.
    stem = 7 * 7 * 3 * 64 * 112**2
    assert flops_of_pass(timm.create_model("resnet18"), (3, 224, 224)) == pytest.approx(
        2 * (3 * 1.82e9 - stem), rel=0.01
    )


def test_flops_are_unknown_for_a_model_that_reads_values():
    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum().item())

    assert flops_of_pass(Reads(2, 2), (2,)) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H200", 989.4), ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0), ("NVIDIA L40S", 362.0), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA A10", 125.0),
        ("NVIDIA L40", None), ("NVIDIA A10G", None), ("NVIDIA GB200", None), ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
    ],
)  # fmt: skip
def test_peak_tflops_is_not_guessed_for_other_variants(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0), None, amp=True) == peak


def test_peak_tflops_of_known_devices(monkeypatch):
    cuda = torch.device("cuda")
    name = "NVIDIA H100 PCIe"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)

    assert peak_tflops(cuda, None, amp=True) == measure.PEAK_TFLOPS["H100 PCIe"]
    assert peak_tflops(cuda, None, amp=False) is None  # the table is for bfloat16
    assert peak_tflops(cuda, 12.5, amp=False) == 12.5
    assert peak_tflops(CPU, None, amp=True) is None
    name = "NVIDIA GeForce GTX 1080"
    assert peak_tflops(cuda, None, amp=True) is None


def test_the_text_of_the_bar_counts_batches_within_the_epoch():
    with progress(3, 10, 0) as bar:
        texts = [bar._text(done) for done in (0, 9, 10, 13, 29, 30)]

    assert texts == [
        "epoch 1/3  batch 0/10", "epoch 1/3  batch 9/10", "epoch 2/3  batch 0/10", "epoch 2/3  batch 3/10",
        "epoch 3/3  batch 9/10", "epoch 3/3  batch 10/10",
    ]  # fmt: skip
