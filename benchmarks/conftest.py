"""Options of pytest, and output of the results: a JSON file, a table and two figures."""

import json
import sys
from pathlib import Path

import pytest
import torch

from crsam_ext import bench

HERE = Path(__file__).parent


def pytest_addoption(parser):
    group = parser.getgroup("crsam_ext")
    group.addoption("--full", action="store_true", help="all models, dtypes and base optimizers that fit into memory")
    group.addoption("--rounds", type=int, default=15, help="measured rounds per peer and case (default: 15)")
    group.addoption(
        "--threads", type=int, default=1, help="threads on a CPU, at most the number of idle cores (default: 1)"
    )
    group.addoption("--output", type=Path, help="result file (default: benchmarks/results/<device>.json)")


@pytest.fixture(scope="session")
def device(request):
    torch.set_num_threads(request.config.getoption("threads"))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def rounds(request):
    return request.config.getoption("rounds")


@pytest.fixture(scope="session")
def results(request, device):
    """Return the records of the measurements, and write them at the end of the session."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu-{torch.get_num_threads()}"
    collected = {
        "name": name.lower().replace(" ", "-"),
        **bench.machine(device, ("torch", "triton", "pytorch_optimizer", "pytest-benchmark")),
        "command": " ".join(["pytest", *(a for a in sys.argv[1:] if not a.startswith("--output"))]),
        "results": [],
        "host": [],
        "shares": [],
    }
    yield collected
    path = request.config.getoption("output") or HERE / "results" / f"{collected['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(_rounded(collected), indent=None, separators=(",", ":")).replace('},{"', '},\n{"') + "\n"
    )
    figures = bench.draw(collected, path.parent) if collected["results"] else []
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{collected['device']}, torch {torch.__version__}\n\n{bench.table(collected)}\n")
        print("written:", path, *figures)


def _rounded(value):
    """Round seconds to 0.01 us to keep the file readable."""
    if isinstance(value, float):
        return round(value, 8)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
