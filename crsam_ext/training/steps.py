"""One training step: the loss, the optimizer, and all passes over a batch."""

from argparse import Namespace
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

from crsam_ext import CRSAM
from crsam_ext.graphs import GraphedStep

from .errors import TrainingError
from .measure import Parts


def criterion(logits: Tensor, y: Tensor, label_smoothing: float = 0.0, bce: bool = False) -> Tensor:
    """Return the mean loss of a batch.

    Args:
        logits: (N, classes).
        y: int64 (N,), or probabilities (N, classes).
        label_smoothing: s in the target (1 - s) y + s / classes.
        bce: use binary cross-entropy, summed over the classes (Beyer et al. 2020), instead of cross-entropy.
    """
    if not bce:
        return F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    classes = logits.shape[1]
    target = F.one_hot(y, classes).float() if y.ndim == 1 else y
    target = (1 - label_smoothing) * target + label_smoothing / classes
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="sum") / len(logits)


class Objective(nn.Module):
    """A model and its loss as one module, so that torch.compile and DistributedDataParallel cover both."""

    def __init__(self, model: nn.Module, options: Namespace) -> None:
        super().__init__()
        self.model = model
        self._label_smoothing, self._bce, self._amp = options.label_smoothing, options.bce_loss, options.amp

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, 0-dim, and the logits, (N, classes)."""
        with self.autocast(x.device):
            logits = self.model(x)
            return criterion(logits, y, self._label_smoothing, self._bce), logits

    def loss_to_test(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of validation samples, without label smoothing."""
        return criterion(logits, y, bce=self._bce)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context for forward passes: bfloat16 autocast with ``--amp``, otherwise a no-op."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self._amp)


def create_optimizer(objective: nn.Module, options: Namespace) -> CRSAM:
    """Create the optimizer of ``--optimizer`` over all parameters; ``objective`` may be a DistributedDataParallel.

    ``sgd`` and ``adamw`` are CRSAM with rho = 0, which runs one pass and equals its base optimizer. So all optimizers
    share the loop, the gradient clipping, the skipping of steps with NaN or Inf, and the measurements.

    Raises:
        TrainingError: the options contradict each other or do not fit the parameters, or ``--cuda-graph`` cannot
            capture the step.
    """
    if options.base == "adamw":
        base: type[torch.optim.Optimizer] = torch.optim.AdamW
        arguments = _pick(options, "lr", "weight_decay")
    else:
        base = torch.optim.SGD
        arguments = _pick(options, "lr", "momentum", "nesterov", "weight_decay")
    if options.optimizer == "crsam":
        arguments |= _pick(options, "rho", "alpha", "beta", "regularizer", "estimator", "adaptive")
        arguments |= _pick(options, "interval", "reuse", "curvature_interval")
    elif options.optimizer == "sam":
        arguments |= _pick(options, "rho", "adaptive", "interval", "reuse") | {"alpha": 0.0, "beta": 0.0}
    else:
        arguments |= {"rho": 0.0, "alpha": 0.0, "beta": 0.0}
    if isinstance(objective, nn.parallel.DistributedDataParallel):
        arguments |= _pick(options, "sync_perturbation")
    try:
        optimizer = CRSAM(
            _parameters(objective, options), base, model=objective, max_grad_norm=options.max_grad_norm, **arguments
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(str(error).splitlines()[0]) from error
    blocker = optimizer.capture_blocker() if options.cuda_graph else None
    if blocker is not None:
        raise TrainingError(f"--cuda-graph: the step cannot be captured: {blocker}")
    return optimizer


def _parameters(objective: nn.Module, options: Namespace) -> Any:
    if options.decay_of == "all":
        return objective.parameters()
    model: Any = objective.module if isinstance(objective, nn.parallel.DistributedDataParallel) else objective
    model = getattr(model, "model", model)
    kept = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=kept)


def _pick(options: Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


class Step:
    """Runs optimizer steps, each with all its passes.

    Args:
        objective: computes loss and logits.
        optimizer: the optimizer of its parameters.
        parts: records the time of each part.
        graph: whether to capture the step in a CUDA graph, once per batch shape.
    """

    def __init__(self, objective: nn.Module, optimizer: CRSAM, parts: Parts, graph: bool = False) -> None:
        self._objective, self._optimizer, self._parts, self._graph = objective, optimizer, parts, graph
        self._shapes: tuple[torch.Size, torch.Size] | None = None
        self._logits: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step.

        Returns:
            The loss, 0-dim, and the logits, (N, classes), at the weights before the step. With a graph, the next step
            overwrites them.
        """
        if self._graph:
            return self._replay(x, y)
        logits: list[Tensor] = []

        def closure() -> Tensor:
            self._parts.mark("optimizer")
            loss, outputs = self._objective(x, y)
            loss.backward()
            if not logits:
                logits.append(outputs.detach())
            self._parts.mark("gradients")
            return loss

        loss = self._optimizer.step(closure)
        self._parts.mark("optimizer")
        return loss.detach(), logits[0]

    def _replay(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self._shapes != (x.shape, y.shape):
            self._capture(x, y)
        self._x.copy_(x)
        self._y.copy_(y)
        loss = self._step()
        self._parts.mark("step")
        assert self._logits is not None
        return loss.detach(), self._logits

    def _capture(self, x: Tensor, y: Tensor) -> None:
        self._shapes, self._x, self._y = (x.shape, y.shape), torch.empty_like(x), torch.empty_like(y)
        optimizer, objective = self._optimizer, self._objective

        def closure() -> Tensor:
            loss, outputs = objective(self._x, self._y)
            loss.backward()
            if optimizer.pass_index == 0:
                if self._logits is None:  # in the first step, which is not captured
                    self._logits = torch.empty_like(outputs)
                self._logits.copy_(outputs.detach())
            return loss

        self._logits, self._step = None, GraphedStep(optimizer, closure)
