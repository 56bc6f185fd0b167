"""Defines the packages and the extension; all other metadata is in pyproject.toml.

The extension `crsam_ext._C` is built from csrc/ if torch is a CUDA build and nvcc has the same major version. If there
is only torch and a C++ compiler, it is built without kernels, and only reduces the host time of backend "triton".
Otherwise the package is pure Python. `crsam_ext.available_backends()` reports why there are no kernels. `pip install`
builds in an isolated environment without torch, unless `--no-build-isolation` is given.

Environment variables:
    CRSAM_FORCE_CUDA=1    fail if the kernels cannot be built
    CRSAM_NO_CUDA=1       do not build the extension
    TORCH_CUDA_ARCH_LIST  the architectures to build for, for example "9.0;10.0+PTX"
    MAX_JOBS              the number of compilers that run in parallel
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import setuptools
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ARCHITECTURES = "8.0;8.6;9.0;10.0;12.0+PTX"


if int(setuptools.__version__.split(".")[0]) < 77:  # with --no-build-isolation, pip does not check build requirements
    raise SystemExit(f"setuptools is {setuptools.__version__}; run: pip install 'setuptools>=77.0.3'")


def packages() -> list[str]:
    """Return the names under which the packages are installed."""
    kernels = find_packages(include=["triton_kernels", "triton_kernels.*"])
    return find_packages(include=["crsam_ext", "crsam_ext.*"]) + [f"crsam_ext.{name}" for name in kernels]


class Unavailable(Exception):
    """Why the kernels cannot be built here."""


def extension() -> dict[str, Any]:
    """Return the arguments of `setup` that build `crsam_ext._C`; none if that is impossible.

    If the kernels are not built, the reason is written to crsam_ext/_build.py.
    """
    reason = ""
    try:
        cuda = toolkit()
    except Unavailable as error:
        if os.environ.get("CRSAM_FORCE_CUDA") == "1":
            raise SystemExit(f"CRSAM_FORCE_CUDA=1, but {error}") from None
        cuda, reason = "", f"the CUDA extension was not built: {error}"
    text = '"""Why the CUDA extension was not built; written by setup.py."""\n\nREASON = ' + f"{reason!r}\n"
    (ROOT / "crsam_ext" / "_build.py").write_text(text)
    return module(cuda) if cuda or can_compile() else {}


def can_compile() -> bool:
    """Return whether the extension can be built without kernels."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return os.environ.get("CRSAM_NO_CUDA") != "1" and find_spec("torch") is not None and compiler is not None


def toolkit() -> str:
    """Return the release of the CUDA toolkit, and set CUDA_HOME to its folder."""
    if os.environ.get("CRSAM_NO_CUDA") == "1":
        build = "pip install --force-reinstall --no-deps --no-build-isolation --no-binary crsam_ext crsam_ext"
        raise Unavailable(f"CRSAM_NO_CUDA=1 was set, as it is for wheels; to build it: {build}")
    try:
        import torch
    except ImportError:
        raise Unavailable("torch is not installed in the build environment; use --no-build-isolation") from None
    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} was built without CUDA")
    home, cuda = nvcc()
    if cuda.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise Unavailable(f"nvcc is from CUDA {cuda}, but torch was built with CUDA {torch.version.cuda}")
    os.environ["CUDA_HOME"] = home
    return cuda


def nvcc() -> tuple[str, str]:
    """Return the folder and the release of the CUDA toolkit. nvcc reports both; its path may be a link or a script."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(path).exists():
        raise Unavailable("no nvcc was found; set CUDA_HOME")
    said = ""
    for question in (["--version"], ["--dryrun", "-x", "cu", "-c", os.devnull]):
        done = subprocess.run([path, *question], capture_output=True, text=True)
        said += done.stdout + done.stderr
    release, top = re.search(r"release ([\d.]+)", said), re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    if release is None or top is None:
        raise Unavailable(f"{path} does not report its release and folder")
    return str(Path(top[1]).resolve()), release[1]


def write_build_info(info: dict[str, str]) -> Path:
    """Write a header for bindings.cpp and return its folder; a change of flags would recompile all sources instead."""
    header = ROOT / "build" / "generated" / "build_info.h"
    text = "".join(f'#define CRSAM_{name} "{value}"\n' for name, value in info.items())
    text += "#define CRSAM_WITH_KERNELS\n" if info["CUDA"] else ""
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return header.parent


def module(cuda: str) -> dict[str, Any]:
    """Return the arguments of `setup` that build the extension, with kernels if `cuda` is not empty."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES) if cuda else ""
    version = re.search(r'__version__ = "(.+)"', (ROOT / "crsam_ext" / "__init__.py").read_text())
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() if (ROOT / ".git").exists() else ""
    info = {
        "VERSION": version[1] if version else "unknown",
        "REVISION": revision or "unknown",
        "TORCH": torch.__version__,
        "CUDA": cuda,
        "ARCHITECTURES": architectures.replace(" ", ";"),
    }
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu"))
    extension = (CUDAExtension if cuda else CppExtension)(
        "crsam_ext._C",
        sources if cuda else ["csrc/bindings.cpp", "csrc/host.cpp"],
        depends=[str(p) for p in (ROOT / "csrc").rglob("*.*h")],
        include_dirs=[str(write_build_info(info))],
        extra_compile_args={
            # pybind11 has hidden visibility; a class with a member of its types must not be more visible than they are.
            "cxx": ["-O2", "-Wall", "-fvisibility=hidden"],
            # No --use_fast_math: a step must equal that of PyTorch.
            "nvcc": ["-O3", "-lineinfo", "-Werror", "all-warnings"],
        },
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":  # build backends run this file as a program; tests import its functions
    setup(
        packages=packages(),
        # At the top level, `triton_kernels` would collide with the package of that name that Triton ships. The mapping
        # works in a wheel and also in `pip install -e .`, through the import finder that setuptools writes. A checkout
        # that is only on sys.path has no crsam_ext.triton_kernels.
        package_dir={"crsam_ext.triton_kernels": "triton_kernels"},
        **extension(),
    )
