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
from .fused import FAKES, FusedOperators, no_device

__all__ = ["SCHEMAS", "TritonOperators", "interpreted", "why_unavailable"]

_STEP = (
    "Tensor[] grad, Tensor[] grad_ascent, Tensor[] grad_descent, int[] groups, Tensor[] steps, float[] options, "
    "Tensor?[] option_tensors, Tensor a, Tensor b, Tensor? factor, Tensor ok) -> ()"
)

#: Those of csrc/ops.cpp.
SCHEMAS = {
    "grad_norm": "(Tensor[] grads, int[] groups, int num_groups, Tensor?[] weights) -> Tensor",
    "perturbation_scale": "(Tensor squared_norm, Tensor rho, float epsilon) -> Tensor",
    "perturb_": "(Tensor(a!)[] live, Tensor(b!)[] saved, Tensor[] grads, int[] groups, Tensor scale, bool[] adaptive, "
    "int sign, bool stochastic=False) -> ()",
    "fd_gram": "(Tensor[] grad, Tensor[] grad_ascent, Tensor[] grad_descent, int[] groups, int num_groups, "
    "Tensor?[] weights) -> Tensor",
    "coefficients": "(Tensor? gram, Tensor[] squared_norms, Tensor scale, Tensor alpha, Tensor beta, "
    "Tensor(a!) counters, Tensor(b!)[] taken, Tensor[] part, int passes, bool log, Tensor[] losses, "
    "Tensor? grad_scale, float max_regularizer_ratio, float max_grad_norm) -> (Tensor, Tensor)",
    "sgd_step_": f"(Tensor(a!)[] live, Tensor(b!)[] saved, Tensor(c!)[] momentum_buffer, {_STEP}",
    "adamw_step_": f"(Tensor(a!)[] live, Tensor(b!)[] saved, Tensor(c!)[] exp_avg, Tensor(d!)[] exp_avg_sq, {_STEP}",
    "combine_": "(Tensor(a!)[] live, Tensor[] saved, Tensor(b!)[] grad, Tensor[] grad_ascent, "
    "Tensor(c!)[] grad_descent, int[] groups, Tensor a, Tensor b, Tensor? factor) -> ()",
}


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU rather than compiling them: for debugging, and very slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unavailable() -> str | None:
    """Why the kernels cannot run here; None if they can."""
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
        # The version says nothing: it goes up after the launch, and Ctrl-C may come between the two.
        return bool(self._implementations.last_perturbation(live.device) > before)


@cache
def _register() -> None:
    implementations = import_module("crsam_ext.triton_kernels.operators")
    for name, schema in SCHEMAS.items():
        define: Any = torch.library.custom_op(
            f"crsam_triton::{name}",
            getattr(implementations, name),
            mutates_args=[argument for argument, written in _arguments(schema) if written],
            schema=schema,
        )
        define.register_fake(FAKES[name])


@cache
def _direct(host: Any) -> SimpleNamespace:
    """The implementations, with the versions of what they write: torch's dispatcher would turn every list of tensors
    into one of its own and back, which takes longer than all the rest."""
    implementations = import_module("crsam_ext.triton_kernels.operators")
    return SimpleNamespace(
        **{name: _versioned(getattr(implementations, name), schema, host) for name, schema in SCHEMAS.items()}
    )


def _versioned(implementation: Callable[..., Any], schema: str, host: Any) -> Callable[..., Any]:
    positions = [i for i, (_, written) in enumerate(_arguments(schema)) if written]
    if not positions:
        return implementation
    written, mark_written = itemgetter(*positions), host.mark_written

    def operator(*arguments: Any) -> Any:
        result = implementation(*arguments)
        mark_written(*written(arguments))
        return result

    return operator


def _arguments(schema: str) -> list[tuple[str, bool]]:
    """Name of each argument of a schema, and whether it is marked as written."""
    arguments = schema[1:].split(") -> ")[0].split(", ")
    return [(argument.split()[-1], "!" in argument) for argument in arguments]
