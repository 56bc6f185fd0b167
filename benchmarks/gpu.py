"""Run everything that needs a GPU: tests, the bandwidth of every operator, and training. Write one JSON file.

Run ``make gpu``, which builds the extension first. The exit status is 0 if all tests passed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from crsam_ext import available_backends

from . import parallel
from .operators import contestants, measure, stopwatch
from .shapes import resnet50

ROOT = Path(__file__).parents[1]
TESTS = (
    "gpu",
    *(
        f"test_{name}.py"
        for name in (
            "amp", "curvature", "golden", "hard_inputs", "intervals", "invariants", "ops", "optimizer", "parallel",
            "schedules", "stats",
        )
    ),
)  # fmt: skip
# Tests that use a backend on the GPU, and all of tests/gpu.
SELECTION = "gpu or (cuda and not cuda_on_cpu) or (triton and not triton_interpreted)"
BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16)
# Shapes of a Triton program to compare: vectors per tile and number of warps.
BLOCKS = ((128, 4), (256, 4), (256, 8), (512, 4), (512, 8), (1024, 8), (1024, 16))


def run_tests() -> dict[str, dict[str, object]]:
    """Run the tests; return for each file or folder how many passed, failed and were skipped, and the failures.

    They run in one process per core, because they spend most of their time on the host.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-k", SELECTION]
        done = subprocess.run(
            [*command, "--numprocesses=auto", f"--junitxml={report}", *(f"tests/{name}" for name in TESTS)],
            cwd=ROOT,
            env=os.environ | {"CRSAM_REQUIRE_CUDA": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            print(done.stdout[-20000:])
        if not report.exists():
            return {"pytest": {"passed": 0, "failed": 1, "skipped": 0, "failures": [done.stdout[-2000:]]}}
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    results: dict[str, dict[str, object]] = {}
    for name in TESTS:
        # A file that cannot be imported is a test case without a class, named after the file.
        module = f".{name.removesuffix('.py')}."
        own = [case for case in cases if module in f"{case.get('classname') or case.get('name')}."]
        failures = [c.get("name") for c in own if c.find("failure") is not None or c.find("error") is not None]
        skipped = sum(c.find("skipped") is not None for c in own)
        passed = len(own) - len(failures) - skipped
        results[name] = {"passed": passed, "failed": len(failures), "skipped": skipped, "failures": failures}
    if done.returncode != 0 and not any(counts["failed"] for counts in results.values()):
        results["pytest"] = {"passed": 0, "failed": 1, "skipped": 0, "failures": [f"exit status {done.returncode}"]}
    return results


def tune(device: torch.device, lengths: list[int], calls: int) -> dict[str, dict[str, float]]:
    """Return the total seconds of all Triton operators, for each dtype and shape of a program.

    Enter the fastest shape into BLOCKS of triton_kernels/launch.py.
    """
    from crsam_ext.triton_kernels import launch

    results: dict[str, dict[str, float]] = {}
    for dtype in DTYPES:
        key = torch.cuda.get_device_capability(device)[0], dtype.itemsize
        before = launch.BLOCKS.get(key)
        times = results[str(dtype).removeprefix("torch.")] = {}
        for vectors, warps in BLOCKS:
            launch.BLOCKS[key] = launch.Block(vectors, warps)
            entries = contestants("triton", dtype, device, lengths)
            del entries["copy"]
            watches = [stopwatch(entry.call, device, calls) for entry in entries.values()]
            times[f"{vectors} vectors, {warps} warps"] = sum(min(watch() for _ in range(5)) for watch in watches)
        if before is None:
            del launch.BLOCKS[key]
        else:
            launch.BLOCKS[key] = before
    return results


def train_imagenet() -> dict[str, Any]:
    """Return the result of `benchmarks.imagenet` with its defaults, which should take less than ten minutes on an
    H100."""
    try:
        from . import imagenet
    except ModuleNotFoundError as error:  # only training needs these packages
        print(f"training is not measured: the package {error.name} is missing")
        return {"skipped": {"training": f"the package {error.name} is missing"}}
    return imagenet.run(imagenet.parser().parse_args([]))


def revision() -> str:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def main() -> int:
    """Run the tests, measure the operators, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20, help="rounds per operator (default: 20)")
    parser.add_argument("--calls", type=int, default=10, help="consecutive calls per round (default: 10)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device", file=sys.stderr)
        return 1

    began = time.perf_counter()
    device, lengths = torch.device("cuda"), [math.prod(shape) for shape in resnet50()]
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "revision": revision(),
        "command": ["python", "-m", "benchmarks.gpu", *sys.argv[1:]],
        "backends": available_backends(),
        "parameters": sum(lengths),
    }
    print(f"{report['device']}, torch {torch.__version__}, revision {report['revision']}, {sum(lengths):,} parameters")
    tests = report["tests"] = run_tests()
    for name, counts in tests.items():
        print(f"{name:20} {counts['passed']:5} passed {counts['failed']:5} failed {counts['skipped']:5} skipped")

    operators = report["operators"] = {}
    print(f"\n{'':32} {'us p20':>8} {'p50':>8} {'p80':>8} {'GB/s':>7} {'of copy':>8} {'host us':>8}")
    for backend in BACKENDS:
        if available_backends()[backend] != "available":
            print(f"{backend} is {available_backends()[backend]}")
            continue
        for dtype in DTYPES:
            case = f"{backend} {str(dtype).removeprefix('torch.')}"
            operators[case] = measure(backend, dtype, device, lengths, arguments.rounds, arguments.calls)
            for name, x in operators[case].items():
                micro = " ".join(f"{x[p] * 1e6:8.1f}" for p in ("p20", "p50", "p80"))
                print(f"{case:18} {name:13} {micro} {x['gb_per_s']:7.0f} {x['of_copy']:8.0%} {x['host'] * 1e6:8.1f}")
    if available_backends()["triton"] == "available":
        report["triton_blocks"] = tune(device, lengths, arguments.calls)
        for dtype_name, blocks in report["triton_blocks"].items():
            for block, taken in sorted(blocks.items(), key=lambda item: item[1]):
                print(f"triton {dtype_name:9} {block:24} {taken * 1e6:8.1f} us for all operators")
    report["parallel"] = parallel.measure(device, arguments.rounds, batch=128)
    print(f"\nTime of a step with w + e and w - e evaluated in turn or together\n{parallel.table(report['parallel'])}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    # Keep these results even if training, the longest part, fails.
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print("\nTraining")
    report |= train_imagenet()
    report["seconds"] = time.perf_counter() - began
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{report['seconds']:.0f} s; written to {arguments.output}")
    return int(any(counts["failed"] for counts in tests.values()))


if __name__ == "__main__":
    sys.exit(main())
