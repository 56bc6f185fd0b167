"""What setup.py builds, and why a backend is unavailable, on simulated machines."""

import os
import runpy
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crsam_ext import __version__, extension
from crsam_ext.backends import cuda, triton

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch):
    """Return the functions of setup.py, without the environment variables of the user."""
    for name in ("CRSAM_FORCE_CUDA", "CRSAM_NO_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Return a function that makes a CUDA toolkit whose nvcc prints the given values."""

    def make(release="13.0", top=True, home="cuda"):
        folder = tmp_path / home
        (folder / "bin").mkdir(parents=True)
        nvcc = folder / "bin" / "nvcc"
        lines = [f"echo 'Cuda compilation tools, release {release}, V{release}.88'"] if release else []
        lines += [f"echo '#$ TOP={folder}' >&2"] if top else []
        nvcc.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        return folder

    return make


def test_nvcc_of_cuda_home_is_used(setup, toolkit, monkeypatch):
    home = toolkit("12.8")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(home))
        assert setup["nvcc"]() == (str(home), "12.8")
        monkeypatch.delenv(name)


def test_nvcc_in_the_path_may_be_a_link(setup, toolkit, tmp_path, monkeypatch):
    """The folder is the one that nvcc reports, not the one of the link."""
    home = toolkit("13.0")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(home / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'links'}{os.pathsep}{os.environ['PATH']}")
    assert setup["nvcc"]() == (str(home), "13.0")


@pytest.mark.parametrize(("release", "top"), [("", True), ("13.0", False)])
def test_nvcc_without_release_or_folder_is_refused(release, top, setup, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(release, top)))
    with pytest.raises(setup["Unavailable"], match="does not report its release and folder"):
        setup["nvcc"]()


def test_missing_nvcc_is_reported(setup, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(setup["Unavailable"], match="no nvcc was found; set CUDA_HOME"):
        setup["nvcc"]()


@pytest.mark.parametrize(
    ("torch_cuda", "release", "reason"),
    [
        ("13.0", "13.2", None),  # the major version decides
        ("13.0", "12.8", "nvcc is from CUDA 12.8, but torch was built with CUDA 13.0"),
        ("12.8", "13.0", "nvcc is from CUDA 13.0, but torch was built with CUDA 12.8"),
        (None, "13.0", "was built without CUDA"),
    ],
)
def test_toolkit_must_match_torch(torch_cuda, release, reason, setup, toolkit, monkeypatch):
    home = toolkit(release)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    if reason is None:
        assert setup["toolkit"]() == release
        assert os.environ["CUDA_HOME"] == str(home)
    else:
        with pytest.raises(setup["Unavailable"], match=reason):
            setup["toolkit"]()


def test_toolkit_is_not_searched_if_disabled(setup, monkeypatch):
    monkeypatch.setenv("CRSAM_NO_CUDA", "1")
    with pytest.raises(setup["Unavailable"], match="CRSAM_NO_CUDA=1 was set"):
        setup["toolkit"]()
    assert not setup["can_compile"]()


def test_missing_torch_is_reported(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(setup["Unavailable"], match="use --no-build-isolation"):
        setup["toolkit"]()


def test_missing_compiler_is_reported(setup, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert not setup["can_compile"]()
    monkeypatch.setenv("CXX", shutil.which("sh"))
    assert setup["can_compile"]()


@pytest.fixture
def stored_reason(setup, tmp_path, monkeypatch):
    """Run extension() in a separate root; return its result for setup() and the stored reason."""
    namespace = setup["extension"].__globals__
    (tmp_path / "crsam_ext").mkdir()
    monkeypatch.setitem(namespace, "ROOT", tmp_path)
    monkeypatch.setitem(namespace, "module", lambda release: {"built for": release})

    def run():
        arguments = setup["extension"]()
        return arguments, runpy.run_path(str(tmp_path / "crsam_ext" / "_build.py"))["REASON"]

    run.namespace = namespace
    return run


def test_extension_is_built_with_kernels(stored_reason, monkeypatch):
    monkeypatch.setitem(stored_reason.namespace, "toolkit", lambda: "13.0")
    assert stored_reason() == ({"built for": "13.0"}, "")


@pytest.mark.parametrize("compiles", [True, False])
def test_extension_is_built_without_kernels(compiles, stored_reason, monkeypatch):
    """With a compiler it is built for the host; available_backends() reads the stored reason."""

    def fails():
        raise stored_reason.namespace["Unavailable"]("no nvcc was found; set CUDA_HOME")

    monkeypatch.setitem(stored_reason.namespace, "toolkit", fails)
    monkeypatch.setitem(stored_reason.namespace, "can_compile", lambda: compiles)
    expected = "the CUDA extension was not built: no nvcc was found; set CUDA_HOME"
    assert stored_reason() == ({"built for": ""} if compiles else {}, expected)
    monkeypatch.setenv("CRSAM_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="CRSAM_FORCE_CUDA=1, but no nvcc was found"):
        stored_reason()


@pytest.mark.parametrize("architectures", [None, "9.0 10.0+PTX"])
def test_extension_has_the_right_sources_and_options(architectures, setup, toolkit, tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit()))
    monkeypatch.setitem(setup["module"].__globals__, "write_build_info", lambda info: infos.append(info) or tmp_path)
    if architectures:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    infos = []
    for release in ("13.0", ""):
        (built,) = setup["module"](release)["ext_modules"]
        kernels = [source for source in built.sources if source.endswith(".cu")]
        assert bool(kernels) == bool(release)
        assert {"csrc/bindings.cpp", "csrc/host.cpp"} <= set(built.sources)
        assert "-use_fast_math" not in str(built.extra_compile_args)
    with_kernels, without = infos
    assert with_kernels["ARCHITECTURES"] == (architectures or setup["ARCHITECTURES"]).replace(" ", ";")
    assert (with_kernels["VERSION"], with_kernels["TORCH"]) == (__version__, torch.__version__)
    assert (without["ARCHITECTURES"], without["CUDA"]) == ("", "")


def test_build_info_is_only_written_if_it_changes(setup, tmp_path, monkeypatch):
    """Otherwise every build would recompile all sources."""
    monkeypatch.setitem(setup["write_build_info"].__globals__, "ROOT", tmp_path)
    header = setup["write_build_info"]({"CUDA": "13.0", "VERSION": "1"}) / "build_info.h"
    assert header.read_text() == '#define CRSAM_CUDA "13.0"\n#define CRSAM_VERSION "1"\n#define CRSAM_WITH_KERNELS\n'
    os.utime(header, (1, 1))
    setup["write_build_info"]({"CUDA": "13.0", "VERSION": "1"})
    assert header.stat().st_mtime == 1
    setup["write_build_info"]({"CUDA": "", "VERSION": "1"})
    assert header.read_text() == '#define CRSAM_CUDA ""\n#define CRSAM_VERSION "1"\n'


# Why a backend is not available --------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """Return a function that simulates an extension built with kernels for this torch, except for given attributes."""

    def make(**info):
        own = {"version": __version__, "torch": torch.__version__, "architectures": "8.0;9.0+PTX", **info}
        monkeypatch.setattr(extension, "find_spec", lambda name: object())
        monkeypatch.setattr(extension, "load", lambda: SimpleNamespace(build_info=lambda: own))

    return make


def with_gpu(monkeypatch, major, minor):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))


def test_missing_extension_is_reported(monkeypatch):
    monkeypatch.setattr(extension, "find_spec", lambda name: None)
    assert extension.why_missing() == "the CUDA extension is missing: install crsam_ext from source"
    assert cuda.why_unavailable() == extension.why_missing()


def test_reason_for_an_extension_that_was_not_built_is_reported(monkeypatch):
    monkeypatch.setattr(extension, "find_spec", lambda name: None if name.endswith("_C") else object())
    monkeypatch.setitem(sys.modules, "crsam_ext._build", SimpleNamespace(REASON="no nvcc was found"))
    assert extension.why_missing() == "no nvcc was found"


def test_extension_that_does_not_load_is_reported(built, monkeypatch):
    built()

    def fails():
        raise ImportError("undefined symbol: _ZN3c10\nand more")

    monkeypatch.setattr(extension, "load", fails)
    assert extension.why_missing() == "the extension cannot be loaded, rebuild it: undefined symbol: _ZN3c10"


@pytest.mark.parametrize("name", ["version", "torch"])
def test_extension_of_another_version_is_refused(name, built):
    built(**{name: "0.0.1"})
    own = {"version": __version__, "torch": torch.__version__}[name]
    reason = f"the extension was built for {name} 0.0.1, not {own}: rebuild it"
    assert extension.why_missing() == cuda.why_unavailable() == reason


@pytest.mark.parametrize(
    ("architectures", "capability", "reason"),
    [
        ("8.0;9.0+PTX", (9, 0), None),
        ("8.0;9.0+PTX", (12, 0), None),
        ("9.0;8.0", (8, 6), None),
        ("9.0;10.0+PTX", (8, 9), "the GPU has compute capability 8.9; the CUDA extension was built for 9.0;10.0+PTX"),
        ("10.0", (9, 0), "the GPU has compute capability 9.0; the CUDA extension was built for 10.0"),
        ("8.0", None, "torch finds no CUDA device"),
    ],
)
def test_kernels_must_match_the_gpu(architectures, capability, reason, built, monkeypatch):
    built(architectures=architectures)
    if capability is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    else:
        with_gpu(monkeypatch, *capability)
    assert cuda.why_unavailable() == reason


def test_extension_without_kernels_reports_why(built, monkeypatch):
    built(architectures="")
    monkeypatch.setitem(sys.modules, "crsam_ext._build", SimpleNamespace(REASON="nvcc is from CUDA 12.8"))
    assert extension.why_missing() is None
    assert cuda.why_unavailable() == "nvcc is from CUDA 12.8"


@pytest.mark.parametrize(
    ("missing", "interpreted", "capability", "reason"),
    [
        ("triton", False, (9, 0), "the triton package is not installed"),
        ("crsam_ext.triton_kernels", False, (9, 0), "crsam_ext.triton_kernels is missing; install crsam_ext"),
        (None, True, None, None),
        (None, False, None, "torch finds no CUDA device"),
        (None, False, (7, 5), "the GPU has compute capability 7.5; the Triton kernels need 8.0"),
        (None, False, (8, 0), None),
    ],
)
def test_reason_for_unavailable_triton_is_reported(missing, interpreted, capability, reason, monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda name: None if name == missing else object())
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if capability is not None:
        with_gpu(monkeypatch, *capability)
    found = triton.why_unavailable()
    assert found == reason or (reason is not None and found.startswith(reason))
