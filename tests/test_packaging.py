"""What is installed: the contents and the metadata of the wheel, and what importing the package costs."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "crsam_ext", "triton_kernels", "csrc")
# Copied so that a wheel that took them along would be seen.
NOT_FOR_WHEELS = ("tests", "benchmarks", "examples")


def run(*args, cwd):
    env = os.environ | {"CRSAM_NO_CUDA": "1"}  # the extension takes minutes, and has tests of its own
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: setuptools packs what an earlier build left in the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES + NOT_FOR_WHEELS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.npz", "*.so"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    wheels = tmp_path_factory.mktemp("wheels")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, cwd=source)
    (path,) = wheels.iterdir()
    return path


@pytest.fixture(scope="module")
def distribution(wheel):
    name, version, *_ = wheel.name.split("-")
    return metadata.PathDistribution(zipfile.Path(wheel) / f"{name}-{version}.dist-info")


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "crsam_ext").rglob("*.py")}
    kernels = {f"crsam_ext/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "triton_kernels").rglob("*.py")}

    assert {"crsam_ext/training/__main__.py", "crsam_ext/triton_kernels/__init__.py"} <= modules | kernels
    assert packed == modules | kernels | {"crsam_ext/py.typed", "crsam_ext/_build.py"}


def test_wheel_needs_only_torch(distribution):
    assert [need for need in distribution.requires if "extra ==" not in need] == ["torch>=2.9"]


def test_wheel_metadata(distribution):
    assert distribution.metadata["Name"] == "crsam_ext"
    assert distribution.metadata["License-Expression"] == "MIT"
    assert distribution.metadata["Requires-Python"] == ">=3.10"
    scripts = {entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert scripts == {"crsam-bench": "crsam_ext.bench:main", "crsam-train": "crsam_ext.training.__main__:main"}


def test_triton_kernels_are_a_subpackage_of_the_installation(tmp_path):
    """From a wheel and from an editable install: the latter finds the renamed folder through an import hook."""
    code = "import crsam_ext.triton_kernels, importlib.util as u; print(u.find_spec('triton_kernels'))"
    assert run("-I", "-c", code, cwd=tmp_path).strip() == "None"


def test_import_brings_in_nothing_but_torch(tmp_path):
    code = """
import sys
import torch
before = set(sys.modules)
import crsam_ext
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - sys.stdlib_module_names))
"""
    new = run("-c", code, cwd=tmp_path).split()
    assert "crsam_ext" in new
    # torch imports parts of itself lazily; what else crsam_ext drags in would be a dependency nobody declared.
    assert set(new) <= {"crsam_ext", "torch"}
