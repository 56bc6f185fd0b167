r"""Measures the curvature of any model and loss over all batches of a loader, on any device.

L(w) is the mean loss over the loader, g its gradient and H its Hessian with respect to all parameters that require a
gradient.

=============================  ====================================================================
:func:`hessian_trace`          Tr H
:func:`normalized_trace`       Tr H / ‖g‖, the C(w) of CR-SAM (Wu, Luo, Wunsch, AAAI 2024)
:func:`top_eigenvalues`        the largest eigenvalues of H
:func:`gradient_norm`          ‖g‖
:func:`directional_curvature`  vᵀHv along v = g/‖g‖, the curvature that the optimizer uses
:func:`ascent_gap`             the loss increase of one ascent step, relative to that of many
=============================  ====================================================================

All functions take ``(model, loss_fn, loader)`` and these options:

``model, loss_fn``
    The loss of a batch is ``loss_fn(model(input), target)``, a scalar and a mean over samples. A tuple or list as input
    is passed as positional arguments, a dictionary as keyword arguments. Batches are weighted by their number of
    samples. :class:`torch.nn.CrossEntropyLoss` and :class:`torch.nn.NLLLoss` with class indices as targets divide by
    the number of targets that are not ignored, or by the sum of their class weights, so batches are weighted by this
    divisor. Any other loss with another kind of mean needs batches of equal size.
``loader``
    Batches ``(input, target)``, on any device: a DataLoader, a list, or any other iterable that can be iterated more
    than once and yields the same batches each time. The number of samples of a batch is the length of the first
    dimension of its target or, if the target contains no tensor, of its input.
``training``
    By default the model is measured in evaluation mode: no dropout, and batch norm with running statistics. With
    ``training=True`` it is measured in training mode: batch norm couples the samples of a batch, and each batch uses
    one fixed draw of dropout masks.
``progress``
    Show a progress bar; needs rich.

An autocast context around the call applies to it. Functions compiled with ``torch.compile`` run in eager mode.
Afterwards the model is unchanged to the bit: parameters, ``.grad``, buffers, the mode of every module, and the random
number generators (those of :class:`crsam_ext.noise.RandomState`).

Hessian-vector products differentiate the gradient again, with one graph for all vectors of a batch, so they need the
device memory of one product. Fused kernels have no second derivative, so attention uses PyTorch's math kernels and
recurrent layers do not use cuDNN during a measurement.

Activation checkpoints with ``use_reentrant=True`` are rejected, because ``torch.autograd.grad`` ignores them. If second
derivatives are needed, functions whose backward is marked ``once_differentiable`` are rejected too. A function without
this mark that hides the inputs of its backward from autograd cannot be detected: it looks like a constant backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .model_buffers import Snapshot
from .noise import RandomState

__all__ = [
    "AscentGap",
    "Eigenvalues",
    "Measurement",
    "NormalizedTrace",
    "ascent_gap",
    "directional_curvature",
    "gradient_norm",
    "hessian_trace",
    "normalized_trace",
    "top_eigenvalues",
]

Vector = list[Tensor] | tuple[Tensor, ...]  # one tensor per parameter, of its shape, dtype and device


@dataclass(frozen=True)
class Measurement:
    """An estimate with its standard error."""

    value: float
    standard_error: float  #: estimated from the spread over the probes; 0 without probes, NaN for a single probe
    probes: int  #: number of random vectors; 0 if the value is not an estimate
    samples: int  #: number of samples in the loader

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if not 0 < self.standard_error < math.inf:
            return f"{self.value:.6g}"
        places = max(0, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.value:.{places}f} ± {self.standard_error:.{places}f}"


@dataclass(frozen=True)
class NormalizedTrace(Measurement):
    """Tr H / ‖g‖, with its numerator and denominator."""

    trace: Measurement
    gradient_norm: Measurement


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues, largest first. H has an eigenvalue within ``residuals[i]`` = ‖Hu − λu‖ of ``values[i]``."""

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    products: int  #: number of Hessian-vector products
    samples: int


@dataclass(frozen=True)
class AscentGap:
    """The loss increase within the ball of radius rho; ``ratio`` is 1 if a single step reaches the largest one."""

    ratio: float  #: one_step / many_steps; NaN if the loss does not increase
    one_step: float  #: L(w + rho g/‖g‖) − L(w)
    many_steps: float  #: the largest L − L(w) that was found in the ball
    loss: float  #: L(w)
    rho: float
    steps: int
    samples: int


def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    *,
    probes: int = 16,
    distribution: str = "rademacher",
    estimator: str = "hessian",
    rho: float = 0.1,
    seed: int = 0,
    training: bool = False,
    progress: bool = False,
) -> Measurement:
    r"""Estimate the trace of the Hessian with Hutchinson's estimator: the mean of :math:`v^T H v` over random v.

    All batches use the same v, so the result is an estimate for the Hessian of the loader's mean loss. Its variance
    per probe is :math:`2 \sum_{i \ne j} H_{ij}^2` (Rademacher) or :math:`2 \|H\|_F^2` (Gaussian; Hutchinson 1989, Avron
    and Toledo 2011).

    Args:
        model, loss_fn, loader, training, progress: see :mod:`crsam_ext.curvature`.
        probes: number of random vectors, the same in every batch.
        distribution: "rademacher" (±1) or "gaussian".
        estimator: "hessian" for Hessian-vector products; "gradient" or "loss" for central differences of gradients or
            losses at :math:`w \pm \rho v/\|v\|`, which add an error of order rho² to the statistical one; "exact" for
            one product with each unit vector (one per parameter element), without probes.
        rho: length of the perturbation in the finite differences.
        seed: seed of the probes.
    Raises:
        ValueError, TypeError: if an argument is invalid; the message names it.
    """
    _check_choice("estimator", estimator, ("hessian", "gradient", "loss", "exact"))
    with _Objective(model, loss_fn, loader, training, progress, "Hessian trace") as objective:
        return _trace(objective, probes, distribution, estimator, rho, seed)[0]


def normalized_trace(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    *,
    probes: int = 16,
    distribution: str = "rademacher",
    estimator: str = "hessian",
    rho: float = 0.1,
    seed: int = 0,
    training: bool = False,
    progress: bool = False,
) -> NormalizedTrace:
    r"""Estimate CR-SAM's measure of curvature, :math:`C(w) = \mathrm{Tr}\,\nabla^2 L(w) / \|\nabla L(w)\|_2`.

    The arguments and errors are those of :func:`hessian_trace`. Numerator and denominator are computed in one iteration
    over the loader. The result is NaN or infinite if the gradient is zero.
    """
    _check_choice("estimator", estimator, ("hessian", "gradient", "loss", "exact"))
    with _Objective(model, loss_fn, loader, training, progress, "normalized trace") as objective:
        trace, gradient = _trace(objective, probes, distribution, estimator, rho, seed, with_gradient=True)
        norm = _norm(gradient)
    value, error = (_divide(x, norm) for x in (trace.value, trace.standard_error))
    return NormalizedTrace(value, error, trace.probes, trace.samples, trace, Measurement(norm, 0.0, 0, trace.samples))


def gradient_norm(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    *,
    training: bool = False,
    progress: bool = False,
) -> Measurement:
    """Return the norm of the gradient of the loader's mean loss. Arguments: see :mod:`crsam_ext.curvature`."""
    with _Objective(model, loss_fn, loader, training, progress, "gradient") as objective:
        _, gradient = objective.gradient()
        return Measurement(_norm(gradient), 0.0, 0, objective.samples)


def directional_curvature(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    *,
    direction: Sequence[Tensor] | None = None,
    estimator: str = "hessian",
    rho: float = 0.1,
    training: bool = False,
    progress: bool = False,
) -> Measurement:
    r"""Return the curvature :math:`v^T H v` along :math:`v = g/\|g\|` or along a given direction.

    For a loader with a single batch, ``training=True`` and ``estimator="gradient"``, the result equals
    ``optimizer.stats.directional_curvature``.

    Args:
        model, loss_fn, loader, training, progress: see :mod:`crsam_ext.curvature`.
        direction: one tensor for each parameter that requires a gradient, with its shape; the norm does not matter.
        estimator: "hessian" for the exact value, "gradient" or "loss" for central differences at w ± rho v.
        rho: length of the perturbation in the finite differences.
    Raises:
        ValueError, TypeError: if an argument is invalid, or if the direction is zero.
    """
    _check_choice("estimator", estimator, ("hessian", "gradient", "loss"))
    with _Objective(model, loss_fn, loader, training, progress, "curvature") as objective:
        if direction is None:
            _, v = objective.gradient()
        else:
            shapes, expected = [d.shape for d in direction], [p.shape for p in objective.params]
            if shapes != expected:
                raise ValueError(f"direction must have the parameters' shapes {expected}, but has {shapes}")
            v = [d.detach().to(p) for d, p in zip(direction, objective.params, strict=True)]
        norm = _norm(v)
        if not 0 < norm < math.inf:
            raise ValueError(f"the direction must have a finite, nonzero norm, but its norm is {norm}")
        v = [d / norm for d in v]
        (value,) = _quadratic_forms(objective, [lambda: v], estimator, rho)[0]
        return Measurement(value, 0.0, 0, objective.samples)


def top_eigenvalues(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    *,
    count: int = 1,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
    seed: int = 0,
    training: bool = False,
    progress: bool = False,
) -> Eigenvalues:
    """Compute the largest eigenvalues of the Hessian with ARPACK's Lanczos iteration through SciPy.

    ARPACK stores its basis, max(2 count + 1, 20) vectors, in host memory, in float64 if a parameter is float64 and
    otherwise in float32. Device memory holds one product.

    Args:
        model, loss_fn, loader, training, progress: see :mod:`crsam_ext.curvature`.
        count: number of eigenvalues; less than the number of parameter elements.
        tolerance: relative accuracy at which the iteration stops.
        max_iterations: maximum number of restarts; SciPy's default is ten per parameter element.
        seed: seed of the start vector.
    Raises:
        ValueError, TypeError: if an argument is invalid.
        RuntimeError: if the iteration does not converge, or if a product is not finite.
    """
    numpy, linalg = _import("numpy"), _import("scipy.sparse.linalg")
    with _Objective(model, loss_fn, loader, training, progress, "eigenvalues") as objective:
        size = sum(p.numel() for p in objective.params)
        if not 1 <= count < size:
            raise ValueError(f"count must be from 1 to {size - 1} with {size} parameters, but is {count}")
        double = any(p.dtype == torch.float64 for p in objective.params)
        dtype = torch.float64 if double else torch.float32
        products = 0

        def matvec(x: Any) -> Any:
            nonlocal products
            products += 1
            flat = torch.as_tensor(x.reshape(-1), dtype=dtype)
            pieces = flat.split([p.numel() for p in objective.params])
            vector = [piece.reshape(p.shape).to(p) for piece, p in zip(pieces, objective.params, strict=True)]
            result = torch.cat([h.reshape(-1).to("cpu", dtype) for h in objective.product(vector)])
            if not result.isfinite().all():
                raise RuntimeError("a Hessian-vector product is not finite: check the loss and its gradient")
            return result.numpy()

        numpy_dtype = numpy.float64 if double else numpy.float32
        operator = linalg.LinearOperator((size, size), matvec=matvec, dtype=numpy_dtype)
        start = numpy.random.default_rng(seed).standard_normal(size).astype(numpy_dtype)
        try:
            values, vectors = linalg.eigsh(
                operator, k=count, which="LA", tol=tolerance, maxiter=max_iterations, v0=start
            )
        except linalg.ArpackNoConvergence as error:
            raise RuntimeError(f"the eigenvalues did not converge in {products} products: {error}") from error
        order = numpy.argsort(values)[::-1]
        residuals = [float(numpy.linalg.norm(matvec(vectors[:, i]) - values[i] * vectors[:, i])) for i in order]
        return Eigenvalues(tuple(float(values[i]) for i in order), tuple(residuals), products, objective.samples)


def ascent_gap(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[Any],
    *,
    rho: float = 0.1,
    steps: int = 20,
    training: bool = False,
    progress: bool = False,
) -> AscentGap:
    r"""Measure how much of the maximum loss increase within a ball SAM's single ascent step achieves.

    SAM uses :math:`w + \rho\, g/\|g\|` as the worst point within rho of w. This function searches for a worse point by
    normalized gradient ascent. It starts at SAM's point, takes steps of length rho, and projects each result onto the
    surface of the ball. If the loss is convex, every step increases it. The search gives a lower bound of the maximum,
    so the ratio is an upper bound.

    Args:
        model, loss_fn, loader, training, progress: see :mod:`crsam_ext.curvature`.
        rho: radius of the ball.
        steps: number of ascent steps after the first one.
    Raises:
        ValueError, TypeError: if an argument is invalid.
    """
    _check_positive("rho", rho)
    _check_count("steps", steps)
    with _Objective(model, loss_fn, loader, training, progress, "ascent") as objective:
        loss, gradient = objective.gradient()
        e = _scaled(gradient, rho)
        rises = []
        for step in range(steps + 1):
            with objective.moved(e):
                if step == steps:
                    rises.append(objective.loss() - loss)
                    break
                there, gradient = objective.gradient()
            rises.append(there - loss)
            e = _scaled(torch._foreach_add(e, _scaled(gradient, rho)), rho)
        one, many = rises[0], max(rises)
        return AscentGap(one / many if many > 0 else math.nan, one, many, loss, rho, steps, objective.samples)


# Implementation ----------------------------------------------------------------------------------------------------


class _Batch:
    """A batch of the objective; its loss uses the same random numbers in every call."""

    def __init__(self, objective: _Objective, batch: Any) -> None:
        try:
            inputs, target = batch
        except (TypeError, ValueError):
            raise TypeError(f"loader must yield pairs (input, target), but yielded a {type(batch).__name__}") from None
        self._objective = objective
        self._input, self._target = (_to(x, objective.params[0].device) for x in (inputs, target))
        self._random = RandomState(objective.devices)
        lengths = (n for n in map(_length, (self._target, self._input)) if n is not None)
        self.size = next(lengths, 1)
        self.weight = _weight(objective.loss_fn, self._target, self.size)

    def loss(self) -> Tensor:
        """Return the mean loss of the batch, 0-dim, with its graph if gradients are enabled."""
        self._random.restore()
        if self._objective.training:
            self._objective.reset_buffers()
        torch.clear_autocast_cache()  # it may contain low-precision weights of another w or of a freed graph
        model, x = self._objective.model, self._input
        args = x if isinstance(x, (tuple, list)) else () if isinstance(x, Mapping) else (x,)
        output = model(*args, **(x if isinstance(x, Mapping) else {}))
        loss = self._objective.loss_fn(output, self._target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, the mean over the batch, but returned a {what}")
        return loss.reshape(())

    def gradient(self, twice: bool = False) -> tuple[Tensor, Vector]:
        """Return the loss and its gradient; if ``twice``, the gradient can be differentiated again."""
        with torch.enable_grad():
            loss = self.loss()
            if not loss.requires_grad:
                raise ValueError("the loss does not depend on the model's parameters")
            _check_graph(loss, twice)
            grads = torch.autograd.grad(
                loss, self._objective.params, create_graph=twice, allow_unused=True, materialize_grads=True
            )
        return loss.detach(), list(grads)

    def products(self, vectors: Iterable[Vector]) -> Iterator[tuple[Vector, Vector]]:
        """Yield (v, Hv) for each vector, from one graph."""
        _, grads = self.gradient(twice=True)
        pairs = [(i, g) for i, g in enumerate(grads) if g.requires_grad]  # H is zero for the others
        for v in vectors:
            if not pairs:
                yield v, [torch.zeros_like(p) for p in self._objective.params]
                continue
            hv = torch.autograd.grad(
                [g for _, g in pairs],
                self._objective.params,
                [v[i] for i, _ in pairs],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            yield v, list(hv)


class _Objective:
    """The mean loss over a loader as a function of the parameters; on exit, the context restores the model."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        loader: Iterable[Any],
        training: bool,
        progress: bool,
        label: str,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(output, target), but is a {type(loss_fn).__name__}")
        reduction = getattr(loss_fn, "reduction", "mean")
        if reduction != "mean":
            raise ValueError(f"loss_fn must return the mean over the batch, but its reduction is {reduction!r}")
        if not isinstance(loader, Iterable):
            raise TypeError(f"loader must be an iterable of batches, but is a {type(loader).__name__}")
        if isinstance(loader, Iterator):
            raise TypeError("loader is an iterator, which can be used only once: pass a list or a DataLoader")
        self.model, self.loss_fn, self._loader = model, loss_fn, loader
        self.training, self._progress, self._label = training, progress, label
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("the model has no parameter that requires a gradient")
        self.devices = {p.device for p in self.params}
        self.samples, self.weight = 0, 0.0
        self._buffers = Snapshot(model)

    def __enter__(self) -> _Objective:
        self._modes = {module: module.training for module in self.model.modules()}
        self._buffers.take()
        self._random = RandomState(self.devices)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # Compiled functions have no second derivative, and evaluation mode would trigger a recompilation.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if any(isinstance(module, nn.RNNBase) for module in self._modes):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            self._advance = stack.enter_context(_bar(self._label)) if self._progress else None
            self._stack = stack.pop_all()
        self.model.train(self.training)
        return self

    def __exit__(self, *exception: object) -> None:
        for module, mode in self._modes.items():
            module.training = mode
        self.reset_buffers()
        self._random.restore()
        torch.clear_autocast_cache()
        self._stack.close()

    def reset_buffers(self) -> None:
        self._buffers.put()

    def batches(self) -> Iterator[_Batch]:
        """Iterate over the loader, with the same random numbers every time."""
        self._random.restore()
        self.samples, self.weight, index = 0, 0.0, -1
        try:
            length = len(self._loader) if isinstance(self._loader, Sized) else None
        except TypeError:  # a DataLoader whose data set has no length
            length = None
        for index, content in enumerate(self._loader):
            batch = _Batch(self, content)
            self.samples += batch.size
            self.weight += batch.weight
            if batch.weight:  # otherwise all its targets are ignored, and its loss is an empty mean
                yield batch
            if self._advance is not None:
                self._advance(index + 1, length)
        if not self.samples:
            raise ValueError("the loader has no samples" if index >= 0 else "the loader has no batches")
        if not self.weight:
            raise ValueError("the loss ignores all targets of the loader, or gives their classes a weight of 0")

    def loss(self) -> float:
        return math.fsum(batch.weight * batch.loss().item() for batch in self.batches()) / self.weight

    def gradient(self) -> tuple[float, Vector]:
        """Return the mean loss and its gradient."""
        losses, total = [], [torch.zeros_like(p) for p in self.params]
        for batch in self.batches():
            loss, grads = batch.gradient()
            losses.append(batch.weight * loss.item())
            torch._foreach_add_(total, grads, alpha=batch.weight)
        return math.fsum(losses) / self.weight, torch._foreach_div(total, self.weight)

    def product(self, vector: Vector) -> Vector:
        """Return the product of the Hessian of the mean loss with a vector."""
        total = [torch.zeros_like(p) for p in self.params]
        for batch in self.batches():
            for _, product in batch.products([vector]):
                torch._foreach_add_(total, product, alpha=batch.weight)
        return torch._foreach_div(total, self.weight)

    @contextmanager
    def moved(self, e: Vector, factor: float = 1.0) -> Iterator[None]:
        """Move the parameters to w + factor e within this context, and restore w to the bit afterwards."""
        kept = [p.clone() for p in self.params]
        try:
            torch._foreach_add_(self.params, e, alpha=factor)
            yield
        finally:
            torch._foreach_copy_(self.params, kept)


def _trace(
    objective: _Objective,
    probes: int,
    distribution: str,
    estimator: str,
    rho: float,
    seed: int,
    with_gradient: bool = False,
) -> tuple[Measurement, Vector]:
    _check_count("probes", probes)
    _check_choice("distribution", distribution, ("rademacher", "gaussian"))
    if estimator == "exact":
        lengths = [p.numel() for p in objective.params]
        units = [lambda i=i, j=j: _unit(objective.params, i, j) for i, n in enumerate(lengths) for j in range(n)]
        diagonal, gradient = _quadratic_forms(objective, units, "hessian", rho, with_gradient)
        return Measurement(math.fsum(diagonal), 0.0, 0, objective.samples), gradient
    drawn = [lambda k=k: _draw(objective, distribution, seed, k) for k in range(probes)]
    forms, gradient = _quadratic_forms(objective, drawn, estimator, rho, with_gradient)
    mean = math.fsum(forms) / probes
    variance = math.fsum((f - mean) ** 2 for f in forms) / (probes - 1) if probes > 1 else math.nan
    return Measurement(mean, math.sqrt(variance / probes), probes, objective.samples), gradient


def _quadratic_forms(
    objective: _Objective,
    vectors: Sequence[Callable[[], Vector]],
    estimator: str,
    rho: float,
    with_gradient: bool = False,
) -> tuple[list[float], Vector]:
    """Return vᵀHv of the mean loss for each vector, and optionally the gradient, in one iteration over the loader.

    Vectors are passed as functions that create them. They are created again for each batch, so that only one vector is
    in memory at a time.
    """
    _check_positive("rho", rho)
    home = objective.params[0].device
    sums = torch.zeros(len(vectors), dtype=_wide(home), device=home)
    total = [torch.zeros_like(p) for p in objective.params] if with_gradient else []
    for batch in objective.batches():
        made = (make() for make in vectors)
        if estimator == "hessian":
            forms: Iterator[Tensor] = (_dot(v, hv) for v, hv in batch.products(made))
        else:
            forms = _differences(objective, batch, made, estimator, rho)
        for k, form in enumerate(forms):
            sums[k] += batch.weight * form
        if with_gradient:
            torch._foreach_add_(total, batch.gradient()[1], alpha=batch.weight)
    return (sums / objective.weight).tolist(), torch._foreach_div(total, objective.weight) if total else total


def _differences(
    objective: _Objective, batch: _Batch, vectors: Iterable[Vector], estimator: str, rho: float
) -> Iterator[Tensor]:
    r"""Yield vᵀHv of a batch from finite differences.

    That is :math:`v \cdot (g_+ - g_-)/2r` or :math:`(L_+ + L_- - 2L)/r^2`, with :math:`r = \rho/\|v\|`.
    """
    loss = batch.loss().to(_wide(objective.params[0].device)) if estimator == "loss" else None
    for v in vectors:
        r = rho / _norm(v)
        if loss is not None:
            rise = -2 * loss
            for sign in (1, -1):
                with objective.moved(v, sign * r):
                    rise += batch.loss()
            yield rise / r**2
        else:
            with objective.moved(v, r):
                _, change = batch.gradient()
            with objective.moved(v, -r):
                torch._foreach_sub_(change, batch.gradient()[1])
            yield _dot(v, change) / (2 * r)


def _draw(objective: _Objective, distribution: str, seed: int, index: int) -> Vector:
    """Draw probe number ``index`` of a seed; the factor is a large prime, so that nearby seeds share no probes."""
    number = (seed + 1_000_003 * index) % 2**63
    generators = {device: torch.Generator(device).manual_seed(number) for device in objective.devices}
    drawn = []
    for p in objective.params:
        generator = generators[p.device]
        if distribution == "gaussian":
            drawn.append(torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device))
        else:
            bits = torch.randint(2, p.shape, generator=generator, device=p.device)
            drawn.append(bits.to(p.dtype).mul_(2).sub_(1))
    return drawn


def _unit(params: Vector, i: int, j: int) -> Vector:
    unit = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in params]
    unit[i].view(-1)[j] = 1
    return unit


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64


def _dot(x: Vector, y: Vector) -> Tensor:
    """Return the inner product, summed in float64, as a 0-dim tensor on the first device."""
    home = x[0].device
    terms = [torch.sum(a * b, dtype=_wide(a.device)).to(home) for a, b in zip(x, y, strict=True)]
    return torch.stack(terms).sum()


def _norm(x: Vector) -> float:
    return math.sqrt(_dot(x, x).item())


def _scaled(x: Vector, length: float) -> Vector:
    """Return the vector scaled to a length; zero stays zero."""
    norm = _norm(x)
    return torch._foreach_mul(x, length / norm if norm else 0.0)


def _divide(x: float, y: float) -> float:
    return x / y if y else x * math.inf  # NaN if both are zero


def _to(x: Any, device: torch.device) -> Any:
    if isinstance(x, Mapping):
        return {key: _to(value, device) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        return [_to(value, device) for value in x]
    return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x


def _length(x: Any) -> int | None:
    """Return the length of the first dimension of the first tensor in x; None if there is no tensor."""
    if isinstance(x, Tensor):
        return len(x) if x.ndim else 1
    values = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else ()
    return next((n for n in map(_length, values) if n is not None), None)


def _weight(loss_fn: Any, target: Any, size: int) -> float:
    """Return the divisor of a batch's mean loss: the number of samples, or the weighted number of counted targets."""
    indices = isinstance(target, Tensor) and not target.is_floating_point()
    if not indices or not isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return size
    counted = target[target != loss_fn.ignore_index]
    if loss_fn.weight is None:
        return counted.numel()
    return loss_fn.weight.to(counted.device)[counted].sum(dtype=_wide(counted.device)).item()


def _check_graph(loss: Tensor, twice: bool) -> None:
    """Raise ValueError if differentiation would silently ignore a part of the graph."""
    seen: set[Any] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
        function = getattr(node, "_forward_cls", None)  # only nodes of functions written in Python have it
        if function is None:
            continue
        if "Checkpoint" in function.__name__:
            raise ValueError(
                "the model has activation checkpoints with use_reentrant=True, whose parameters torch.autograd.grad "
                "ignores: use checkpoint(..., use_reentrant=False)"
            )
        # once_differentiable wraps backward in a function that torch.autograd.function defines.
        backward = getattr(function.backward, "__code__", None)
        if twice and backward is not None and backward.co_filename == torch.autograd.function.__file__:
            raise ValueError(
                f"the backward of {function.__name__} is marked once_differentiable, so the Hessian would lack its "
                'part: use hessian_trace(..., estimator="gradient"), which needs first derivatives only'
            )


def _import(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"this function needs {package}: pip install 'crsam_ext[curvature]'") from error


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a progress bar over the batches of an iteration over the loader, and count the iterations."""
    module = _import("rich.progress")
    columns = (
        module.TextColumn("{task.description}"),
        module.BarColumn(),
        module.MofNCompleteColumn(),
        module.TimeElapsedColumn(),
    )
    with module.Progress(*columns) as bar:
        task, runs = bar.add_task(label, total=None), 0

        def advance(done: int, total: int | None) -> None:
            nonlocal runs
            runs += done == 1
            bar.update(task, completed=done, total=total, description=f"{label}, run {runs} through the data")

        yield advance


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, but is {value!r}")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, but is {value}")
