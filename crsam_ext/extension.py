"""The compiled module `crsam_ext._C`: the functions of `crsam_ext.host` and, if they were built, the CUDA operators."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["load", "why_missing", "why_not_built"]


def why_missing() -> str | None:
    """Why the module cannot be loaded here; None if it can."""
    if find_spec("crsam_ext._C") is None:
        return why_not_built()
    try:
        info = load().build_info()
    except ImportError as error:
        return f"the extension does not load, build it again: {str(error).splitlines()[0]}"
    own = {"version": import_module("crsam_ext").__version__, "torch": torch.__version__}
    for name, version in own.items():
        if info[name] != version:
            return f"the extension was built for {name} {info[name]}, not {version}: build it again"
    return None


def why_not_built() -> str:
    """Why the CUDA C++ operators were not built."""
    built = find_spec("crsam_ext._build") is not None
    reason = str(import_module("crsam_ext._build").REASON) if built else ""  # setup.py keeps it
    return reason or "the CUDA extension is missing; install crsam_ext from its sources"


def load() -> Any:
    """The module."""
    return import_module("crsam_ext._C")
