"""The operators as Triton kernels (triton_kernels/)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import extension
from .fused import KERNELS, FusedOperators, Kernel, no_device

__all__ = ["TritonOperators", "interpreted", "why_unavailable"]


def interpreted() -> bool:
    """Return whether Triton interprets kernels on the CPU instead of compiling them (very slow, for debugging)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unavailable() -> str | None:
    """Return why the kernels cannot run on this machine; None if they can."""
    if find_spec("triton") is None:
        return "the triton package is not installed"
    if find_spec("crsam_ext.triton_kernels") is None:
        return "crsam_ext.triton_kernels is missing; install crsam_ext from its sources"
    if interpreted():
        return None
    reason = no_device()
    if reason is not None:
        return reason
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}; the Triton kernels need 8.0"
    return None


class TritonOperators(FusedOperators):
    """The operators of :mod:`crsam_ext.triton_kernels`."""

    name = "triton"

    def __init__(self) -> None:
        if extension.why_missing() is None:
            self.host = extension.load()
        _register()
        self._implementations = import_module("crsam_ext.triton_kernels.operators")
        self._ops = _direct(self.host)

    def _launch_mark(self, live: Tensor) -> int:
        return int(self._implementations.perturbations_launched())

    def _launched(self, live: Tensor, before: int) -> bool:
        # The version cannot tell: it is bumped after the launch, and an interrupt may come between the two.
        return bool(self._implementations.last_perturbation(live.device) > before)


@cache
def _register() -> None:
    implementations = import_module("crsam_ext.triton_kernels.operators")
    for name, kernel in KERNELS.items():
        arguments = kernel.arguments.split(", ")
        define: Any = torch.library.custom_op(
            f"crsam_triton::{name}",
            getattr(implementations, name),
            mutates_args=[arguments[i].split()[-1] for i in kernel.written],
            schema=kernel.schema,
        )
        define.register_fake(kernel.fake)


@cache
def _direct(host: Any) -> SimpleNamespace:
    """Return the implementations, wrapped to bump the versions of the tensors that they write.

    They bypass torch's dispatcher, which would convert every list of tensors twice. That takes longer than all other
    host work of the call.
    """
    implementations = import_module("crsam_ext.triton_kernels.operators")
    return SimpleNamespace(
        **{name: _versioned(getattr(implementations, name), kernel, host) for name, kernel in KERNELS.items()}
    )


def _versioned(implementation: Callable[..., Any], kernel: Kernel, host: Any) -> Callable[..., Any]:
    if not kernel.written:
        return implementation
    written, mark_written = itemgetter(*kernel.written), host.mark_written

    def operator(*arguments: Any) -> Any:
        result = implementation(*arguments)
        mark_written(*written(arguments))
        return result

    return operator
