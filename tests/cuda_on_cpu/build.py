"""Compile the unmodified sources of csrc/ for a CPU: as operators for CPU tensors, and as stand-alone programs.

The results are in build/cuda_on_cpu, named by a hash of all inputs.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

import crsam_ext

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc"
OUTPUT = ROOT / "build" / "cuda_on_cpu"
KERNELS = ("grad_norm.cu", "perturb.cu", "fd_gram.cu", "coefficients.cu", "step.cu")
# Contraction is disabled, so that only explicit calls of fma are fused.
FLAGS = ("-std=c++20", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas")


def _digest(*parts):
    sources = sorted(path for folder in (SOURCES, HERE) for path in folder.rglob("*") if path.suffix != ".pyc")
    text = repr((parts, torch.__version__)).encode()
    return hashlib.sha256(text + b"".join(p.read_bytes() for p in sources if p.is_file())).hexdigest()[:16]


@contextmanager
def _alone():
    """Hold a lock: one process builds at a time, and the others reuse the result."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(output, sources, objects_folder, compile_flags, link_flags):
    """Run one g++ process per source in parallel, then the linker; ``output`` appears when it is complete.

    Objects that are already in ``objects_folder`` are not compiled again.
    """
    compiler = os.environ.get("CXX", "g++")
    for folder in (output.parent, objects_folder):
        folder.mkdir(parents=True, exist_ok=True)
    objects = [objects_folder / f"{_digest(compile_flags, source.read_text())}.o" for source in sources]
    running = []
    for source, target in zip(sources, objects, strict=True):
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS, *compile_flags, f"-I{HERE}/shim", "-c", "-x", "c++", source, "-o", partial]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            running.append((process, source, partial, target))
    for process, source, partial, target in running:
        _, errors = process.communicate()
        assert process.returncode == 0, f"{source}:\n{errors}"
        os.replace(partial, target)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        linked = f"{folder}/{output.name}"
        subprocess.run([compiler, *objects, *link_flags, "-pthread", "-o", linked], check=True)
        os.replace(linked, output)


def _torch_flags(*flags):
    """Return the compiler and linker flags of a library that uses torch."""
    isystem = [f"-isystem{p}" for p in (*include_paths(), sysconfig.get_path("include"))]
    folders = library_paths()
    libraries = ["-ltorch_python", "-ltorch_cpu", "-lc10"]
    link = ["-shared", *(f"-L{p}" for p in folders), *(f"-Wl,-rpath,{p}" for p in folders), *libraries]
    return [*flags, *isystem, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"], link


@cache
def library():
    """Return the Python module of csrc/ with its kernels, for CPU tensors."""
    return load(extension(*(SOURCES / "cuda" / name for name in (*KERNELS, "ops_cuda.cpp")), HERE / "control.cpp"))


def install(monkeypatch, module):
    """Make a module the CUDA extension of this process, and return it."""
    monkeypatch.setattr(crsam_ext.extension, "why_missing", lambda: None)
    monkeypatch.setattr(crsam_ext.extension, "load", lambda: module)
    return module


def extension(*sources):
    """Return the path of the Python module of csrc/ with other sources in place of the kernels."""
    own = ["host.cpp", "operators.cpp", "bindings.cpp"]
    flags = ["-O2", f"-I{SOURCES}/cuda", "-DTORCH_EXTENSION_NAME=_C", "-DCRSAM_DISPATCH_KEY=CPU"]
    if hasattr(torch.ops.crsam, "grad_norm"):  # another extension, for a GPU, increments versions for all devices
        flags.append("-DCRSAM_NO_VERSIONS")
    path = OUTPUT / _digest("extension", flags, *(p.read_text() for p in sources)) / "_C.so"
    with _alone():
        if not path.exists():
            # The extensions share their own sources, which include PyTorch and take half a minute each.
            _build(path, [*(SOURCES / name for name in own), *sources], OUTPUT / "objects", *_torch_flags(*flags))
    return path


def load(path):
    """Load the Python module at a path."""
    spec = spec_from_file_location("_C", path, loader=ExtensionFileLoader("_C", str(path)))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counted(shim, body):
    """Return launches, bytes read and bytes written by ``body``; ``shim`` is the library as a ctypes object."""
    counters = (ctypes.c_uint64 * 3)()
    shim.crsam_take_counters(counters)
    body()
    shim.crsam_take_counters(counters)
    return list(counters)


def program(*flags, replaced=()):
    """Build a stand-alone program that runs every kernel once, and return its path.

    Args:
        flags: flags of the compiler and the linker.
        replaced: tuples (file in csrc/cuda, text, new text): replacements in a copy of the sources.
    """
    path = OUTPUT / _digest("program", flags, replaced) / "program"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as copy:
        sources = Path(copy) / "cuda"
        shutil.copytree(SOURCES / "cuda", sources)
        for name, text, other in replaced:
            original = (sources / name).read_text()
            assert original.count(text) == 1, f"{name} does not contain {text!r} exactly once"
            (sources / name).write_text(original.replace(text, other))
        kernels = [sources / name for name in KERNELS]
        _build(path, [*kernels, HERE / "program.cpp"], Path(copy) / "objects", [f"-I{sources}", *flags], flags)
    return path
