"""crsam-train --profile."""

import json
import math
import os
import statistics
import subprocess
import sys

import pytest

from crsam_ext import bench
from crsam_ext.training.__main__ import main
from crsam_ext.training.options import parse
from crsam_ext.training.profile import ROUNDS, method
from crsam_ext.training.state import PROFILE

pytestmark = pytest.mark.slow

DIGITS = ["--data", "digits", "--model", "mlp", "--batch-size", "32", "--threads", "1", "--device", "cpu"]
JPEG = [
    "--data", "synthetic-jpeg:10", "--model", "test_resnet", "--image-size", "32", "--batch-size", "4", "--workers",
    "1", "--threads", "1", "--device", "cpu",
]  # fmt: skip


def profile(arguments, folder, seconds=1.0):
    """Return the records of a profile by part."""
    assert main([*arguments, "--profile", str(seconds), "--output", str(folder)]) == 0
    report = json.loads((folder / PROFILE).read_text())
    assert bench.compare(report, report) == []
    return {record["part"]: record for record in report["training"]}


@pytest.mark.parametrize("arguments", [DIGITS, JPEG], ids=["digits", "JPEG"])
def test_profile_prints_and_records_all_parts(arguments, here, capsys):
    records = profile(arguments, here / "out")

    printed = capsys.readouterr().out
    assert list(records) == ["data", "compute", "both"]
    for record in records.values():
        assert 1 <= len(record["images_per_second"]) <= ROUNDS
        assert all(rate > 0 for rate in record["images_per_second"])
    for part in ("compute", "both"):
        assert records[part]["passes"] == 3
        shares = records[part]["parts_percent"]
        assert all(of_round.keys() == {"data", "gradients", "optimizer", "other"} for of_round in shares)
        # The median, because the process may be stopped for a while between the two clocks.
        assert statistics.median(sum(of_round.values()) for of_round in shares) == pytest.approx(100, abs=2)
    assert statistics.median(of_round["data"] for of_round in records["compute"]["parts_percent"]) < 2
    of_core, compute = records["data"]["images_per_second_per_core"], records["compute"]
    assert of_core == statistics.median(records["data"]["images_per_second"])  # one process
    needed = math.ceil(statistics.median(compute["images_per_second"]) / of_core)
    assert compute["cores_per_device"] == needed
    assert f"cores per device: {needed}" in printed
    assert "ceil(compute / devices / images/s per core)" in printed
    # No other file of a run is written.
    assert [path.name for path in (here / "out").iterdir()] == [PROFILE]


def test_profile_records_what_it_measured(here):
    profile([*DIGITS, "--optimizer", "sam", "--batch-size", "16"], here / "out", 0.2)
    report = json.loads((here / "out" / PROFILE).read_text())
    assert report["options"]["batch_size"] == 16
    assert {"python", "torch", "timm"} <= report["versions"].keys()
    assert report["device"].startswith("CPU")
    assert report["cores"] == bench.cores()
    assert {record["method"] for record in report["training"]} == {"sam sgd"}


def test_profile_measures_whole_cycles_of_steps(here):
    """Of four steps, one has three passes, one two, and two one; the last batch of an epoch has 29 samples, not 32."""
    records = profile([*DIGITS, "--interval", "2", "--curvature-interval", "2"], here / "out")
    assert records["compute"]["passes"] == 1.75
    assert records["both"]["passes"] == pytest.approx(1.75, abs=0.03)


def test_profile_takes_all_passes_with_any_schedule(here):
    """A rho that follows the learning rate is 0 in warm-up and at the end; no step may be skipped."""
    schedules = "--lr 1000 --warmup-epochs 1 --epochs 2 --schedule linear --rho-schedule proportional"
    assert profile([*DIGITS, *schedules.split()], here / "out", 0.5)["both"]["passes"] == 3


def test_utilization_follows_from_the_peak(here):
    records = profile([*DIGITS, "--peak-tflops", "1"], here / "out", 0.2)
    flops = 2 * (64 * 256 + 256 * 256 + 256 * 10) * 3 - 2 * 64 * 256  # the images need no gradient
    compute = records["compute"]
    expected = [100 * 3 * rate * flops / 1e12 for rate in compute["images_per_second"]]
    assert compute["mfu_percent"] == pytest.approx(expected)


def test_profile_and_run_can_share_a_folder(here, capsys):
    short = [*DIGITS, "--epochs", "1", "--output", "out"]
    profile([*DIGITS], here / "out", 0.2)
    assert main(short) == 0
    assert main([*short, "--profile", "0.2"]) == 2
    assert "profile.json already exists: use --overwrite" in capsys.readouterr().err
    assert main([*short, "--profile", "0.2", "--overwrite"]) == 0
    assert (here / "out" / "last.pt").exists()
    assert main([*short, "--profile", "0.2", "--resume"]) == 2
    assert "--profile cannot be combined with --resume or --evaluate" in capsys.readouterr().err


def test_profile_of_two_processes(here):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "crsam_ext.training", *DIGITS, "--profile", "0.5", "--output", "out"],
        capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    report = json.loads((here / "out" / PROFILE).read_text())
    records = {record["part"]: record for record in report["training"]}
    assert all(record["devices"] == 2 for record in records.values())
    data = records["data"]
    assert data["images_per_second_per_core"] == statistics.median(data["images_per_second"]) / 2
    for of_round in records["both"]["parts_percent"]:
        assert of_round.keys() == {"data", "gradients", "optimizer", "other"}


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("--optimizer sgd", "sgd"),
        ("--optimizer sam --base adamw", "sam adamw"),
        ("--interval 5 --reuse", "crsam sgd, interval 5, reuse"),
        ("--curvature-interval 3", "crsam sgd, curvature interval 3"),
    ],
)
def test_methods_are_named_after_their_options(command, name):
    assert method(parse(command.split())) == name
