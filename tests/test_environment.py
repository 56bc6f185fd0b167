"""`python -m crsam_ext`: the environment report, also with missing or broken packages."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crsam_ext import __main__ as environment
from crsam_ext import __version__, extension

ROOT = Path(__file__).parents[1]
TITLES = ["versions", "backends", "extension", "hardware", "torch.distributed", "environment variables"]


def parts(report):
    """Return the rows of each part of a report, by name."""
    first, *lines, last = report.strip().splitlines()
    assert (first, last) == ("```text", "```")
    assert [line.rstrip(":") for line in lines if not line.startswith(" ")] == TITLES
    found, rows = SimpleNamespace(), {}
    for line in lines:
        name, _, value = line.partition(":")
        if line.startswith(" "):
            rows[name.strip()] = value.strip()
        else:
            rows = {}
            setattr(found, name.replace(" ", "_").replace(".", "_"), rows)
    return found


def run(*arguments, **variables):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_report_has_all_parts(tmp_path):
    variables = {"HOME": str(tmp_path), "CRSAM_OF_A_TEST": f"{tmp_path}/a b/c", "OMP_NUM_THREADS": "1", "USER": "ann"}
    output = run("-m", "crsam_ext", **variables)
    found = parts(output)
    assert found.versions["crsam_ext"].startswith(__version__)
    assert found.versions["torch"] == torch.__version__
    assert found.environment_variables["OMP_NUM_THREADS"] == "1"
    assert found.environment_variables["CRSAM_OF_A_TEST"] == "~/a b/c"
    assert str(tmp_path) not in output
    assert str(ROOT) not in output
    assert "failed" not in output


@pytest.mark.slow
def test_large_packages_are_not_imported():
    large = ("accelerate", "lightning", "timm", "transformers")
    code = "import sys; from crsam_ext.__main__ import main; main(); print(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(large) & set(done.stderr.splitlines())
    assert parts(done.stdout).versions["timm"] == metadata.version("timm")


@pytest.mark.slow
def test_broken_packages_are_reported(tmp_path):
    """Stub packages shadow the installed ones: missing or incompatible shared libraries, damaged metadata."""
    missing = "libnvrtc.so.13: cannot open shared object file"
    broken = {"torchcodec": f"OSError({missing!r})", "torchvision": "RuntimeError('no torchvision::nms\\nand more')"}
    for name, error in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise {error}\n")
        (tmp_path / f"{name}-9.9.dist-info").mkdir()
        (tmp_path / f"{name}-9.9.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 9.9\n")
    (tmp_path / "timm-9.9.dist-info").mkdir()
    (tmp_path / "timm-9.9.dist-info" / "METADATA").write_text("")
    found = parts(run("-m", "crsam_ext", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"))
    assert found.versions["torchcodec"] == f"9.9, but its import fails: OSError: {missing}"
    assert found.versions["torchvision"] == "9.9, but its import fails: RuntimeError: no torchvision::nms"
    assert found.versions["timm"].startswith("unknown version")
    assert found.versions["torch"] == torch.__version__


def test_missing_packages_are_reported(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment.metadata, "version", version)
    names = ("numpy", "triton", "timm", "torchvision", "torchcodec", "lightning", "accelerate", "transformers")
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    found = parts(environment.report())
    assert {found.versions[name] for name in names} == {"not installed"}
    assert found.backends["triton"] == "unavailable: the triton package is not installed"


def without_extension(name):
    return None if name == "crsam_ext._C" else object()


def test_missing_extension_is_reported(monkeypatch):
    for module in (environment, extension):
        monkeypatch.setattr(module, "find_spec", without_extension)
    monkeypatch.setitem(sys.modules, "crsam_ext._build", SimpleNamespace(REASON="no nvcc was found; set CUDA_HOME"))
    found = parts(environment.report())
    assert found.extension["crsam_ext._C"] == "not used: no nvcc was found; set CUDA_HOME"
    assert found.backends["cuda"] == "unavailable: no nvcc was found; set CUDA_HOME"
    assert "kernels for" not in found.extension


@pytest.mark.parametrize("architectures", ["8.0;9.0+PTX", ""])
def test_extension_is_reported(architectures, monkeypatch):
    for module in (environment, extension):
        monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "crsam_ext._build", SimpleNamespace(REASON="no nvcc was found"))
    info = {"version": __version__, "revision": "1234567", "torch": torch.__version__, "cuda": "13.0"}
    info |= {"compiler": "12.2.0", "architectures": architectures}
    monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(build_info=lambda: info))
    found = parts(environment.report())
    assert found.extension["crsam_ext._C"] == "loads"
    assert found.extension["kernels for"] == (architectures or "nothing: no nvcc was found")
    assert (found.extension["built with torch"], found.extension["built with cuda"]) == (torch.__version__, "13.0")
    assert found.extension["revision"] == "1234567"


def test_extension_that_does_not_load_is_reported(monkeypatch):
    def load():
        raise ImportError("/home/ann/lib/crsam_ext/_C.so: undefined symbol: _ZN3c10\nand more")

    for module in (environment, extension):
        monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(extension, "load", load)
    found = parts(environment.report())
    expected = "the extension cannot be loaded, rebuild it: .../_C.so: undefined symbol: _ZN3c10"
    assert found.extension["crsam_ext._C"] == f"not used: {expected}"
    assert found.extension["failed"] == "ImportError: .../_C.so: undefined symbol: _ZN3c10"


def test_failing_part_does_not_end_the_report(monkeypatch):
    def fails():
        raise RuntimeError("no\nmore")

    monkeypatch.setattr(environment, "available_backends", fails)
    monkeypatch.setattr(torch.backends.cudnn, "version", fails)
    found = parts(environment.report())
    assert found.backends["failed"] == "RuntimeError: no"
    assert found.versions["cuDNN"] == "failed: RuntimeError: no"
    assert "gloo" in found.torch_distributed


def test_gpus_and_driver_are_reported(tmp_path, monkeypatch):
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho '580.1, NVIDIA H200, 143771 MiB, 3 MiB'\n")
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = parts(environment.report())
    assert found.hardware["driver"] == "580.1, NVIDIA H200, 143771 MiB, 3 MiB"
    assert found.hardware["GPU 0"] == "NVIDIA H200, 140.0 GiB, compute capability 9.0"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/opt/cuda-13.0/bin/nvcc does not run", ".../nvcc does not run"),
        ("/usr/local/cuda-13.0", ".../cuda-13.0"),
        ("/home/ann", "~"),
        ("/home/ann/lib:/opt/cuda/lib64", "~/lib:.../lib64"),
        ("/srv/people/ann/lib", "~/lib"),  # HOME in this test
        (r"C:\Users\Ann\torch\lib\c10.dll", r".../c10.dll"),
        ("File '/data/ann/x.py', line 3", "File '.../x.py', line 3"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("and/or 9.0;10.0+PTX\nline 2", "and/or 9.0;10.0+PTX line 2"),
    ],
)
def test_paths_are_shortened(text, short, monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/ann")
    monkeypatch.setenv("USERPROFILE", "/srv/people/ann")
    assert environment._shortened(text) == short
