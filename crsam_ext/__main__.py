"""``python -m crsam_ext`` prints the environment for a bug report, as a block of text to paste into an issue."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from . import __version__, available_backends, extension

# Installed versions come from metadata: an import of all of these would take half a minute.
_PACKAGES = ("numpy", "timm", "torchvision", "torchcodec", "lightning", "accelerate", "transformers")
# Packages whose compiled parts often do not match torch. They load fast enough for a trial import.
_IMPORTED = ("numpy", "torchcodec", "torchvision", "triton")
_VARIABLES = (
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET",
)
_HOMES = r"(?:/home|/Users|/var/home|[A-Za-z]:\\Users)[/\\][^/\\\s:]+"
_FOLDERS = r"(?<![\w./])(?:~|[A-Za-z]:)?[/\\](?:[^/\\\s:;'\"]+[/\\])+"


def main() -> int:
    """Print the report and return the exit code, 0. If a part of the report fails, its error is printed instead."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # a terminal or pipe may be unable to encode a character of a message
        reconfigure(errors="replace")
    print(report())
    return 0


def report() -> str:
    """Return the environment as a Markdown code block without user names and folders."""
    parts: list[tuple[str, Callable[[], Iterator[tuple[str, object]]]]] = [
        ("versions", _versions),
        ("backends", lambda: iter(available_backends().items())),
        ("extension", _extension),
        ("hardware", _hardware),
        ("torch.distributed", _distributed),
        ("environment variables", _variables),
    ]
    lines = []
    for title, part in parts:
        lines.append(f"{title}:")
        rows: list[tuple[str, object]] = []
        try:
            rows.extend(part())
        except Exception as error:
            rows.append(("failed", _line(error)))
        lines += [f"  {f'{name}:':<20} {_shortened(str(value))}" for name, value in rows] or ["  none"]
    return "\n".join(["```text", *lines, "```"])


def _versions() -> Iterator[tuple[str, object]]:
    installed = {"site-packages", "dist-packages"} & set(Path(__file__).parts)
    yield "crsam_ext", f"{__version__} ({'installed' if installed else 'editable or a checkout'})"
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()}, {platform.python_compiler()})"
    yield "OS", platform.platform()
    yield "libc", " ".join(platform.libc_ver()).strip() or "unknown"
    yield "torch", torch.__version__
    yield "CUDA of torch", torch.version.cuda or "none: torch was built without CUDA"
    if torch.version.hip:
        yield "HIP of torch", torch.version.hip
    yield "cuDNN", _tried(torch.backends.cudnn.version)
    yield "triton", _package("triton")
    for name in _PACKAGES:
        yield name, _package(name)


def _package(name: str) -> str:
    """Return the version of an installed package and, for those in ``_IMPORTED``, the error of a failed import."""
    try:
        version = metadata.version(name) or "unknown version"
    except Exception as error:  # damaged metadata raises more than PackageNotFoundError
        version = "" if isinstance(error, metadata.PackageNotFoundError) else f"unknown version: {_line(error)}"
    if name in _IMPORTED and (version or find_spec(name) is not None):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = import_module(name)
        except Exception as error:  # a missing shared library raises OSError
            return f"{version or 'installed'}, but its import fails: {_line(error)}"
        version = version or str(getattr(module, "__version__", "unknown version"))
    return version or "not installed"


def _extension() -> Iterator[tuple[str, object]]:
    reason = extension.why_missing()
    yield "crsam_ext._C", "loads" if reason is None else f"not used: {reason}"
    if find_spec("crsam_ext._C") is not None:
        info = extension.load().build_info()
        yield "kernels for", info["architectures"] or f"nothing: {extension.why_not_built()}"
        for name, value in info.items():
            if name != "architectures":
                yield f"built with {name}" if name in ("torch", "cuda", "compiler") else name, value or "none"


def _hardware() -> Iterator[tuple[str, object]]:
    yield "CPU", _tried(_cpu)
    yield "memory", _tried(lambda: _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    # nvidia-smi may find what torch does not: often the driver is too old, or torch was built without CUDA.
    yield "driver", _tried(_driver)
    yield "CUDA usable", _tried(torch.cuda.is_available)
    for index in range(torch.cuda.device_count()):
        yield f"GPU {index}", _tried(partial(_gpu, index))


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1] if found else name
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {usable} of {os.cpu_count()} cores usable, {instructions}, {torch.get_num_threads()} torch threads"


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {_gib(properties.total_memory)}, {capability}"


def _driver() -> str:
    columns = "driver_version,name,memory.total,memory.used"
    command = ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except FileNotFoundError:
        return "unknown: no nvidia-smi was found"
    return "; ".join((done.stdout or done.stderr).strip().splitlines()) or f"nvidia-smi exited with {done.returncode}"


def _distributed() -> Iterator[tuple[str, object]]:
    from torch import distributed

    yield "available", distributed.is_available()
    if distributed.is_available():
        for name in ("gloo", "nccl", "mpi"):
            yield name, _tried(getattr(distributed, f"is_{name}_available"))
        if distributed.is_nccl_available():
            yield "NCCL", _tried(lambda: ".".join(map(str, torch.cuda.nccl.version())))


def _variables() -> Iterator[tuple[str, object]]:
    for name, value in sorted(os.environ.items()):
        if name in _VARIABLES or name.startswith("CRSAM_"):
            yield name, value


def _tried(value: Callable[[], object]) -> object:
    try:
        return value()
    except Exception as error:
        return f"failed: {_line(error)}"


def _line(error: Exception) -> str:
    """Return type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _shortened(text: str) -> str:
    """Return the text in one line, with only the last part of each absolute path: the other parts may name a user."""
    text, home = " ".join(text.split()), os.path.expanduser("~")
    if home not in ("~", os.sep):
        text = text.replace(home, "~")
    return re.sub(_FOLDERS, ".../", re.sub(_HOMES, "~", text))


if __name__ == "__main__":
    sys.exit(main())
