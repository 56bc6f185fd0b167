"""The compiled module ``crsam_ext._C``: host functions of ``crsam_ext.host`` and, if built, the CUDA operators."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["load", "why_missing", "why_not_built"]


def why_missing() -> str | None:
    """Return why the module cannot be loaded, or None if it can."""
    if find_spec("crsam_ext._C") is None:
        return why_not_built()
    try:
        info = load().build_info()
    except ImportError as error:
        return f"the extension cannot be loaded, rebuild it: {str(error).splitlines()[0]}"
    own = {"version": import_module("crsam_ext").__version__, "torch": torch.__version__}
    for name, version in own.items():
        if info[name] != version:
            return f"the extension was built for {name} {info[name]}, not {version}: rebuild it"
    return None


def why_not_built() -> str:
    """Return why the CUDA C++ operators were not built."""
    built = find_spec("crsam_ext._build") is not None
    reason = str(import_module("crsam_ext._build").REASON) if built else ""  # written by setup.py
    return reason or "the CUDA extension is missing: install crsam_ext from source"


def load() -> Any:
    """Import and return the module."""
    return import_module("crsam_ext._C")
