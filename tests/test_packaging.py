"""The installation: contents and metadata of the wheel, and what importing the package imports."""

import os
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "MANIFEST.in", "setup.py", "README.md", "LICENSE", "crsam_ext", "triton_kernels", "csrc")
# Also copied, so that the test would notice them in the wheel.
NOT_FOR_WHEELS = ("tests", "benchmarks", "examples")


def run(*args, cwd):
    env = os.environ | {"CRSAM_NO_CUDA": "1"}  # the extension takes minutes to build, and has its own tests
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, because setuptools packs files of earlier builds."""
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


def test_wheel_holds_every_module_and_recipe_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "crsam_ext").rglob("*.py")}
    kernels = {f"crsam_ext/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "crsam_ext").rglob("*.yaml")}

    assert "crsam_ext/training/recipes/resnet50-gsam-90.yaml" in recipes
    assert {"crsam_ext/training/__main__.py", "crsam_ext/triton_kernels/__init__.py"} <= modules | kernels
    assert packed == modules | kernels | recipes | {"crsam_ext/py.typed", "crsam_ext/_build.py"}


def test_wheel_is_pure_even_if_compilers_exist(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_needs_only_torch(distribution):
    assert [need for need in distribution.requires if "extra ==" not in need] == ["torch>=2.11"]


def test_wheel_has_the_right_metadata(distribution):
    assert distribution.metadata["Name"] == "crsam_ext"
    assert distribution.metadata["License-Expression"] == "MIT"
    assert distribution.metadata["Requires-Python"] == ">=3.10"
    scripts = {entry.name: entry.value for entry in distribution.entry_points if entry.group == "console_scripts"}
    assert scripts == {"crsam-bench": "crsam_ext.bench:main", "crsam-train": "crsam_ext.training.__main__:main"}


KERNELS_ARE_A_SUBPACKAGE = "import crsam_ext.triton_kernels, importlib.util as u; print(u.find_spec('triton_kernels'))"


def test_triton_kernels_are_a_subpackage_of_an_editable_installation(tmp_path):
    """The editable installation finds the renamed folder through an import hook."""
    assert run("-I", "-c", KERNELS_ARE_A_SUBPACKAGE, cwd=tmp_path).strip() == "None"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return a folder that contains the installed wheel, to be put first on the path."""
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_wheel_is_installed_and_trains(installed, tmp_path):
    """The program runs outside of the sources; torch and Triton are those of this environment."""
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
{KERNELS_ARE_A_SUBPACKAGE}
import torch, crsam_ext
param = torch.nn.Parameter(torch.ones(3))
optimizer = crsam_ext.CRSAM([param], torch.optim.SGD, lr=0.1)
optimizer.step(lambda: param.square().sum().backward())
print(crsam_ext.__file__, crsam_ext.triton_kernels.__file__, bool((param < 1).all()))
"""
    spec, (package, kernels, moved) = (line.split() for line in run("-c", code, cwd=tmp_path).splitlines())
    assert spec == ["None"]
    assert Path(package) == installed / "crsam_ext" / "__init__.py"
    assert Path(kernels) == installed / "crsam_ext" / "triton_kernels" / "__init__.py"
    assert moved == "True"


@pytest.mark.parametrize("program", ["crsam-train", "crsam-bench"])
def test_programs_of_the_wheel_start(program, installed):
    env = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([installed / "bin" / program, "--help"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert program in done.stdout


FOLDERS = ("benchmarks", "crsam_ext", "csrc", "docs", "examples", "tests", "triton_kernels")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "setup.py")
LEFT_BY_RUNS = ("__pycache__", "*.pyc", "*.so", "*.o", "_build.py")


def test_source_distribution_is_a_whole_checkout_and_builds_the_same_wheel(wheel, tmp_path):
    """It contains everything that is needed to build the extension, the tests and the files that they read, but no
    generated files."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=ignored)
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()

    def files(root):
        paths = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()]
        return {path.relative_to(root).as_posix() for path in paths}

    tracked = {
        path for path in files(ROOT) if not any(fnmatch(part, p) for part in path.split("/") for p in LEFT_BY_RUNS)
    }
    assert {"csrc/bindings.cpp", "tests/conftest.py", "crsam_ext/training/recipes/resnet50-gsam-90.yaml"} <= tracked
    assert files(unpacked) == tracked
    assert all((unpacked / name).is_file() for name in FILES)

    run("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "wheels", cwd=unpacked)
    (path,) = (tmp_path / "wheels").iterdir()
    names = [set(zipfile.ZipFile(p).namelist()) for p in (path, wheel)]
    assert names[0] == names[1]


def test_import_loads_no_package_but_torch(tmp_path):
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
    # torch imports parts of itself lazily; any other package would be an undeclared dependency.
    assert set(new) <= {"crsam_ext", "torch"}
