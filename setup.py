"""The packages and the extension; the rest of the metadata is in pyproject.toml.

The extension `crsam_ext._C` is built from csrc/ where a CUDA build of torch and an nvcc of the same major version are
there. With torch and a C++ compiler alone it is built without kernels: backend "triton" takes less of the host's time
with it. Elsewhere the package is pure Python. `crsam_ext.available_backends()` tells why there are no kernels.
`pip install` builds in an environment of its own, without torch, unless it is told `--no-build-isolation`.

Environment variables:
    CRSAM_FORCE_CUDA=1    fail where the kernels cannot be built
    CRSAM_NO_CUDA=1       do not build the extension
    TORCH_CUDA_ARCH_LIST  the architectures to build for, for instance "9.0;10.0+PTX"
    MAX_JOBS              how many compilers run at once
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


if int(setuptools.__version__.split(".")[0]) < 77:  # with --no-build-isolation, nobody else sees to it
    raise SystemExit(f"setuptools is {setuptools.__version__}; run: pip install 'setuptools>=77.0.3'")


def packages() -> list[str]:
    """Names under which the packages are installed."""
    kernels = find_packages(include=["triton_kernels", "triton_kernels.*"])
    return find_packages(include=["crsam_ext", "crsam_ext.*"]) + [f"crsam_ext.{name}" for name in kernels]


class Unavailable(Exception):
    """Why the kernels cannot be built here."""


def extension() -> dict[str, Any]:
    """The arguments of `setup` that build `crsam_ext._C`, none where that is impossible; keeps why without kernels."""
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
    """Whether the extension can be built without kernels."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return os.environ.get("CRSAM_NO_CUDA") != "1" and find_spec("torch") is not None and compiler is not None


def toolkit() -> str:
    """The release of the CUDA toolkit, whose folder is put into CUDA_HOME."""
    if os.environ.get("CRSAM_NO_CUDA") == "1":
        build = "pip install --force-reinstall --no-deps --no-build-isolation --no-binary crsam_ext crsam_ext"
        raise Unavailable(f"CRSAM_NO_CUDA=1 was set, as it is for wheels; to build it: {build}")
    try:
        import torch
    except ImportError:
        raise Unavailable("torch was not there; install with --no-build-isolation") from None
    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} was built without CUDA")
    home, cuda = nvcc()
    if cuda.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise Unavailable(f"nvcc is of CUDA {cuda}, and torch was built with CUDA {torch.version.cuda}")
    os.environ["CUDA_HOME"] = home
    return cuda


def nvcc() -> tuple[str, str]:
    """Folder and release of the CUDA toolkit, as its nvcc tells them: what is in the path may be a link or a script."""
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
        raise Unavailable(f"{path} does not tell its release and folder")
    return str(Path(top[1]).resolve()), release[1]


def write_build_info(info: dict[str, str]) -> Path:
    """The folder of the header for bindings.cpp; a header, as other flags would compile all sources again."""
    header = ROOT / "build" / "generated" / "build_info.h"
    text = "".join(f'#define CRSAM_{name} "{value}"\n' for name, value in info.items())
    text += "#define CRSAM_WITH_KERNELS\n" if info["CUDA"] else ""
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return header.parent


def module(cuda: str) -> dict[str, Any]:
    """The arguments of `setup` that build the extension, with kernels if there is a release of CUDA for them."""
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
            # Hidden as pybind11 is itself: a class that holds one of its types would otherwise be more visible than it.
            "cxx": ["-O2", "-Wall", "-fvisibility=hidden"],
            # No --use_fast_math: a step must be the same as PyTorch's.
            "nvcc": ["-O3", "-lineinfo", "-Werror", "all-warnings"],
        },
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":  # build backends run it as a program; tests import its functions
    setup(
        packages=packages(),
        # Installed at the top level, `triton_kernels` would collide with the package of that name that Triton ships.
        # The mapping holds in a wheel and, through the import finder that setuptools writes, in `pip install -e .` as
        # well. A checkout that is merely on sys.path has no crsam_ext.triton_kernels.
        package_dir={"crsam_ext.triton_kernels": "triton_kernels"},
        **extension(),
    )
