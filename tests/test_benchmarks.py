"""The peers of the benchmarks compute the same step and move the reported bytes."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from benchmarks import host, imagenet, operators, record
from benchmarks.peers import PEERS, Case, available, make
from benchmarks.shapes import MODELS
from crsam_ext import bench
from crsam_ext.backends.torch import TorchOperators
from crsam_ext.training import models
from crsam_ext.training.profile import method

from .cuda_on_cpu.build import counted

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SHAPES = [(70, 300), (64,), (8, 4, 3, 3), (1,), (20000,)]
CASES = [Case(method, base) for method in ("crsam", "sam") for base in ("sgd", "adamw")]
TIMM = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "vit_s32": "vit_small_patch32_224",
    "vit_b32": "vit_base_patch32_224",
    "vit_l16": "vit_large_patch16_224",
}


def after_steps(name, case, dtype, steps=3):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    phases = make(name, params, case)
    for _ in range(steps):
        for phase in phases:
            phase([torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES])
    return [p.detach() for p in params]


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("name", [name for name in PEERS if name not in ("loop", "torch, base alone")])
def test_peers_agree(name, case, cuda_on_cpu):
    if not available(name, case, torch.float64):
        pytest.skip(f"{name} is not available or does not support {case.method}")
    for actual, expected in zip(*(after_steps(n, case, torch.float64) for n in (name, "loop")), strict=True):
        # About 30 roundings of numbers of order 1 per step; AdamW also divides by sqrt(v), of order 1.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["foreach", "flat", "crsam_ext torch"])
def test_peers_agree_with_masters(name):
    """After three steps in bfloat16, an element may round the other way, a relative difference of 2^-8."""
    case = Case("crsam", "sgd")
    for actual, expected in zip(*(after_steps(n, case, torch.bfloat16) for n in (name, "loop")), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2.0**-7, atol=1e-5)
        assert (actual != expected).float().mean() < 0.01


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_those_of_the_networks(model):
    shapes = MODELS[model]()
    if model in ("gpt3_xl", "tiny"):
        elements = {"gpt3_xl": 1_315_723_264, "tiny": 97_276}[model]
        assert sum(torch.Size(shape).numel() for shape in shapes) == elements
        return
    with torch.device("meta"):
        net = timm.create_model(TIMM[model]) if model in TIMM else getattr(models, model)((3, 32, 32), 10)
    assert shapes == [tuple(p.shape) for p in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kernels_move_the_reported_bytes(dtype, cuda_on_cpu, shim):
    """The bytes from which GB/s are computed are those that the kernels move."""
    lengths = [4097, 3, 300]
    entries = operators.contestants("cuda", dtype, torch.device("cpu"), lengths)
    del entries["copy"]
    for name, entry in entries.items():
        _, read, written = counted(shim, entry.call)
        assert read + written == entry.nbytes * sum(lengths), name


def test_operators_are_measured(cuda_on_cpu):
    results = operators.measure("cuda", torch.float32, torch.device("cpu"), [4097, 3], rounds=3, calls=1)
    assert len(results) == 12
    for result in results.values():
        assert 0 < result["p20"] <= result["p50"] <= result["p80"]
        assert result["gb_per_s"] == pytest.approx(result["bytes"] / result["p50"] / 1e9)
    assert results["copy"]["of_copy"] == 1


# Counting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_kernels_of_a_step_move_the_reported_bytes(case, dtype, cuda_on_cpu, shim):
    """The bytes by which peers are judged are those that the kernels of a step move."""
    lengths = [4097, 3, 300]
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in lengths]
    phases = make("crsam_ext cuda", params, case)

    def step():
        for phase in phases:
            phase([torch.randn(n).to(dtype) for n in lengths])

    step()
    launches, read, written = counted(shim, step)
    assert read + written == record.fused_bytes(case, dtype) * sum(lengths)
    assert launches == record.FUSED_LAUNCHES[case.method]


def test_operations_and_their_bytes_are_counted():
    a, b = torch.ones(100), torch.ones(100)
    with record.Operations() as operations:
        (a + b).mul_(2).view(10, 10)
    # The sum reads two tensors and writes one, mul_ reads one and writes it, and a view moves nothing.
    assert (operations.count, operations.nbytes) == (2, 5 * 400)


def test_memory_of_operations_is_counted():
    a = torch.ones(1000)

    kept = []

    def body():
        b = a.neg()  # a + 1 would also allocate the 1
        kept.append(b.neg())

    assert record.memory(body) == (8000, 4000, 2)


# Comparing -----------------------------------------------------------------------------------------------------------


def results(path, seconds, copy=0.01):
    key = {"model": "resnet18", "method": "crsam", "base": "sgd", "dtype": "float32", "peer": "crsam_ext torch"}
    entry = {**key, "seconds": seconds, "copy": [copy] * len(seconds), "loop": [2 * copy] * len(seconds)}
    path.write_text(json.dumps({"device": "any", "results": [entry], "host": [], "shares": []}))
    return str(path)


def test_comparison_reports_regressions(tmp_path, capsys):
    """A result is a regression if it is slower by more than the spread and 5 %. A slower machine also slows the
    copy."""
    spread = [0.95, 0.98, 1.0, 1.0, 1.01, 1.02, 1.06]
    before = results(tmp_path / "before.json", [0.015 * x for x in spread])
    for factor, copy, status in ((1.0, 0.01, 0), (1.03, 0.01, 0), (1.2, 0.01, 1), (3.0, 0.03, 0), (0.8, 0.01, 0)):
        after = results(tmp_path / "after.json", [0.015 * factor * x for x in spread], copy)
        assert bench.main(["compare", before, after]) == status
        assert capsys.readouterr().out.startswith("slower") == bool(status)


def trained(path, rates, part="both"):
    key = {"model": "resnet50", "method": "crsam sgd", "data": "folder:here", "decoder": "pillow", "part": part}
    entry = {**key, "images_per_second": rates, "parts_percent": [{"data": 10.0, "gradients": 90.0}] * len(rates)}
    path.write_text(json.dumps({"device": "any", "options": {"batch_size": len(rates)}, "training": [entry]}))
    return str(path)


def test_comparison_of_training_reports_regressions(tmp_path, capsys):
    """A rate is a regression if it is lower by more than the spread and 5 %."""
    spread = [0.95, 0.98, 1.0, 1.0, 1.01, 1.02, 1.06]
    before = trained(tmp_path / "before.json", [1000 * x for x in spread])
    for factor, status in ((1.0, 0), (0.97, 0), (0.8, 1), (1.3, 0)):
        after = trained(tmp_path / "after.json", [1000 * factor * x for x in spread])
        assert bench.main(["compare", before, after]) == status
        assert capsys.readouterr().out.startswith("slower: resnet50") == bool(status)
    # Other parts are not compared, and different options are reported.
    other = trained(tmp_path / "other.json", [1.0, 1.0], part="compute")
    assert bench.main(["compare", before, other]) == 0
    assert "note: batch_size differs: 7 and 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpu-1", "nvidia-h200", "gpu"])
def test_result_files_can_be_read(name):
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    results = json.loads(file.read_text())
    assert bench.compare(results, results) == []
    assert bool(bench.table(results)) == ("results" in results or "training" in results)


@pytest.mark.parametrize(
    ("compute", "data", "devices", "workers", "of_core", "cores"),
    [
        (2500, 417, 1, 1, 417, 6),
        (2500, 1668, 1, 4, 417, 6),
        (20000, 3336, 8, 1, 417, 6),
        (834, 417, 1, 0, 417, 2),  # without workers, the main process prepares images
        (835, 417, 1, 0, 417, 3),
        (1, 417, 1, 4, 104.25, 1),
    ],
)
def test_cores_for_a_device_are_computed(compute, data, devices, workers, of_core, cores):
    of_data = {"images_per_second": [data / 2, data, 3 * data], "devices": devices, "workers": workers}
    of_compute = {"images_per_second": [compute], "devices": devices, "workers": workers}
    assert bench.rate_of_core(of_data) == of_core
    assert bench.cores_per_device(of_compute, of_data) == cores


def test_imagenet_benchmark_runs(tmp_path, capsys, monkeypatch):
    """It measures every method and decoder with a small network, and reports what the time limit leaves out."""
    line = "--seconds 0.2 --image-size 32 --batch-size 4 --workers 1 --models test_resnet --limit 600"
    file = tmp_path / "imagenet.json"
    monkeypatch.setattr("sys.argv", ["imagenet", *line.split(), "--output", str(file)])
    imagenet.main()
    results = json.loads(file.read_text())
    keys = [tuple(r[k] for k in ("model", "method", "decoder", "part")) for r in results["training"]]
    decoders = [key[2] for key in keys if key[3] == "data"]
    assert "pillow" in decoders
    assert len(set(keys)) == len(keys) == len(decoders) + 2 * len(imagenet.METHODS) + torch.cuda.is_available()
    assert ("decoding, nvJPEG" in results["skipped"]) == (not torch.cuda.is_available())
    assert all(rate > 0 for r in results["training"] for rate in r["images_per_second"])
    passes = [r["passes"] for r in results["training"] if r["part"] == "compute"]
    assert passes[:3] == [1, 2, 3]
    assert 1.2 <= passes[3] <= 1.4  # 1.22 over whole cycles
    assert all(r["cores_per_device"] >= 1 for r in results["training"] if r["part"] == "compute")
    assert bench.main(["compare", str(file), str(file)]) == 0
    assert bench.main(["table", str(file)]) == 0
    assert "cores per device: ceil(" in capsys.readouterr().out


def test_imagenet_benchmark_keeps_to_its_limit():
    results = imagenet.run(imagenet.parser().parse_args(["--limit", "0"]))
    assert results["training"] == []
    assert len(results["skipped"]) == 2 + 1 + 4 * 4
    # The default cells and decoders fit, including their start times.
    defaults = imagenet.parser().parse_args([])
    expected = 16 * (defaults.seconds + imagenet.START) + 3 * (defaults.seconds / 2 + imagenet.START)
    assert expected < defaults.limit < 600


def test_methods_of_the_imagenet_benchmark_have_the_right_options():
    arguments = imagenet.parser().parse_args([])
    for model, base in imagenet.MODELS.items():
        names = [method(imagenet.options_of(arguments, model, name, "pillow")) for name in imagenet.METHODS]
        full = f"crsam {base}"
        assert names == [base, f"sam {base}", full, f"{full}, interval 5, reuse, curvature interval 10"]


def test_slower_kernel_is_noticed(tmp_path, monkeypatch):
    """Check from measurement to exit status, with a backend that perturbs ten times: 80 N bytes instead of 17.

    Other tests run at the same time, so the slowdown is this large and processor time is measured.
    """
    monkeypatch.setattr(record, "time", SimpleNamespace(perf_counter=time.thread_time))
    monkeypatch.setitem(MODELS, "small", lambda: [(300, 1000)] * 4)
    perturb_, paths = TorchOperators.perturb_, []

    def slow(*arguments):
        for _ in range(10):
            perturb_(*arguments)

    for name, kernel in (("before", perturb_), ("after", slow)):
        monkeypatch.setattr(TorchOperators, "perturb_", kernel)
        entry = record.measure(
            "small", "crsam_ext torch", Case("crsam", "sgd"), torch.float32, torch.device("cpu"), rounds=15
        )
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"device": "cpu", "results": [entry], "host": [], "shares": []}))
    assert bench.main(["compare", *map(str, paths)]) == 1


def test_host_time_exceeds_its_floor():
    """With few parameters, a step takes longer than its floor."""
    times = host.measure("cuda", "sgd", [(3,), (4, 5)], "closure", rounds=5)
    assert len(times.step) == len(times.floor) == 5
    assert 0 < min(times.floor) < min(times.step)


def test_decoding_compares_all_pipelines_on_the_same_images(tmp_path):
    from benchmarks import decoding

    files = decoding.photographs(2)
    rates = decoding.measure({"500x375": files, "prepared": decoding.shrunk(files, tmp_path)}, 2)
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    assert {"timm, 500x375", "crsam-train, pillow, prepared"} <= rates.keys()
    assert " 1.00 1.00 1.00" in decoding.table(rates)
