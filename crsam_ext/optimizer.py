"""The optimizer: groups, options and state, and the order in which the operators are called."""

from __future__ import annotations

import inspect
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from . import backends
from ._compat import attributes_of, compiled_from, gathered_by_fully_shard, is_part_of_zero, mark_stepped
from .base_optimizer import SeparateGroups, completed, make_base
from .flat import FlatParameters, check_parameter
from .model_buffers import ModelBuffers
from .noise import SharedNoise
from .ops import PASSES, REGULARIZERS, Operators, scalar
from .parallel import gradients_at
from .precision import compute_dtype, has_master
from .replicas import Pass, Replicas, check_equal, in_several_processes
from .reuse import DIRECTION, SharpnessDirection
from .second_difference import SECOND_DIFFERENCE, SecondDifference
from .shards import as_shard_of, check_state, is_sharded, local
from .stats import Stats
from .step import Located, Step, StepSettings, is_loss
from .updates import ProvisionalState, Update, update_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CRSAM"]

# What a copy or a pickle of the optimizer leaves behind: it is made again when needed. (A scheduler puts a function
# named ``step`` on the instance, which refers to that very instance.)
_TRANSIENT = (
    "operators", "replicas", "_flat", "_step", "_last_loss", "_combined", "_provisional", "_direction", "step",
)  # fmt: skip

# Options that pickles of earlier versions lack.
_ADDED_OPTIONS = (
    "interval", "reuse", "curvature_interval", "sync_perturbation", "shard_state", "replay_rng", "stochastic_rounding",
    "compile", "flatten",
)  # fmt: skip

# In the groups of an optimizer with intervals: how many steps it has taken or skipped.
_STEPS = "crsam_steps"


class CRSAM(Optimizer):
    r"""Curvature regularized sharpness-aware minimization (Wu, Luo, Wunsch, AAAI 2024, arXiv 2312.13555).

    .. math::
        \begin{aligned}
        e &= \rho\, g_0 / (\|g_0\| + \varepsilon), \quad g_0 = \nabla L(w),
            \quad g_+ = \nabla L(w + e), \quad g_- = \nabla L(w - e) \\
        \hat g &= g_+ + a\,(g_+ + g_- - 2 g_0) + b\,(g_+ - g_-) \\
        w &\leftarrow \text{base optimizer}(w, \hat g)
        \end{aligned}

    ``alpha = beta = 0`` is SAM and takes two passes; ``rho = 0`` is the base optimizer and takes one.

    Args:
        params: parameters, named parameters or group dictionaries, as for any torch optimizer.
        base_optimizer: a class or an instance of :class:`torch.optim.Optimizer`. SGD, Adam and AdamW are computed here,
            on flat state; any other optimizer receives :math:`\hat g` as the gradient at w. Options of the same name
            (RMSprop has an ``alpha``) are CRSAM's here: give such a base optimizer as an instance to set its own.
        rho: radius of the perturbation. Per group, as are alpha, beta and adaptive.
        alpha: weight of the curvature term; default 0.1 for the linear and 0.01 for the log regularizer.
        beta: weight of the gradient-norm term; default 0.01.
        gamma: another name of alpha, the one that the authors' code uses. (In a group, a base optimizer's own gamma
            comes first.)
        regularizer: "linear", a = alpha and b = beta, as the authors' code computes it; or "log", the regularizer
            :math:`\alpha \log \mathrm{Tr}\nabla^2 L + \beta \log\|\nabla L\|` of the paper, a = alpha / kappa and
            b = beta / sigma, see :meth:`crsam_ext.ops.Operators.coefficients`.
        estimator: where the log regularizer takes kappa and sigma from: "gradient" (no cancellation, no losses needed)
            or "loss". On three small networks (``benchmarks/finite_differences.py``, batches of 128) kappa from
            gradients is within 10 % of the exact value for rho from 0.01 to 0.1, in float32 and under bf16 autocast;
            kappa from losses for 0.01 to 0.2 in float32, but under bf16 autocast only near 0.2: its rounding error
            grows as 1/rho², that from gradients as 1/rho.
        adaptive: perturb as ASAM does (Kwon et al., ICML 2021):
            :math:`e = \rho\, w^2 g_0 / (\||w| g_0\| + \varepsilon)`.
        max_grad_norm: clip :math:`\hat g` to this norm.
        max_regularizer_ratio: cap the norm of :math:`a d_2 + b d_1` at this multiple of :math:`\|g_+\|`; default 1 for
            the log regularizer, whose weights are unbounded near kappa = 0, and no cap for the linear one.
        interval: perturb in every ``interval``-th step only, beginning with the first; the others take one pass, and
            are the base optimizer's.
        reuse: in the steps between, add to the gradient what the last perturbation has added to its own,
            :math:`\hat g = g_0 + \omega h` with :math:`h = \hat g - g_0` of that step and
            :math:`\omega = \min(0.9^j, \|g_0\| / 2\|h\|)` if it was j steps ago, see :mod:`crsam_ext.reuse`. h is kept
            in the state.
        curvature_interval: of the steps that perturb, take the pass at w - e in every ``curvature_interval``-th only;
            the others take two passes, and :math:`d_2` from the last step that had three, which is kept for them.
            (Not with ``estimator="loss"``, which needs the loss at w - e.)
        model: if given, everything that a forward changes in its buffers (running statistics, observers, vectors of
            spectral norm) follows the first pass only. In ``step(closure)`` every pass starts from the buffers that the
            first one found; in calls, the later passes start from those that it left. A DistributedDataParallel also
            hands over when gradients are reduced: once a step, see :mod:`crsam_ext.replicas`. :attr:`model` can be set
            until the first step.
        sync_perturbation: with a DistributedDataParallel as ``model``: False, every rank perturbs with the e of its own
            batch; True, all with the e of the whole one, for a second all-reduce a step; or a process group, in which
            the ranks (of one node, say) share theirs.
        shard_state: with a DistributedDataParallel as ``model`` and SGD, Adam or AdamW: every rank keeps the base
            optimizer's state of a part of each parameter, updates that part, and sends it to the others, see
            :mod:`crsam_ext.sharded_state`. The parameters are to the bit what they would be without.
        replay_rng: give every pass of ``step(closure)`` the same random numbers (dropout masks, for instance): those of
            the global generators of torch, Python's ``random`` and ``numpy.random``, see
            :class:`crsam_ext.noise.RandomState`.
        stochastic_rounding: round perturbed float16 and bfloat16 parameters up or down at random, so that the model
            moves by e on average: rounded to nearest, most bfloat16 parameters do not move at all. (w itself is kept
            in float32 and rounded to nearest, either way.)
        backend: "cuda", "triton", "torch", or "auto" for the first that is available.
        compile: run the torch backend through ``torch.compile``.
        flatten: move parameters into flat buffers, those that own their memory alone. A parameter stays where it is if
            its memory is shared, mapped, part of something larger, or held by another tensor; with False, all stay.
        **base_kwargs: lr, momentum and whatever else the base optimizer takes.

    Raises:
        ValueError, TypeError, RuntimeError: for arguments that make no sense, saying which; for an unavailable backend.

    Example::

        optimizer = CRSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, model=model)

        def closure():
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    Note:
        From the first step on, parameters lie in flat buffers (:mod:`crsam_ext.flat`), and ``p.grad`` holds
        :math:`g_0` between steps. Holders of a parameter's memory that torch does not know of, such as raw pointers or
        another process's view of CUDA memory, need ``flatten=False``; so does a storage that is resized later. A
        wrapped base optimizer costs one synchronisation a step: whether to call it is decided on the device.
    """

    operators: Operators
    _flat: FlatParameters | None  # where parameters and state are, once there has been a step
    # A step is in progress from step(closure) or first_step() to the update or combine(); then _step holds it, and
    # _step.collected says which pass is due. After combine(), until the next step begins, _combined is set.
    _step: Step | None
    _combined: bool
    _last_loss: Any  # of the pass that step() will end, which takes no such argument
    _step_supports_amp_scaling = True  # torch's GradScaler leaves scale and found_inf to the step

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] | Optimizer = SGD,
        *,
        rho: float | Tensor = 0.1,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        regularizer: str = "linear",
        estimator: str = "gradient",
        adaptive: bool = False,
        max_grad_norm: float | None = None,
        max_regularizer_ratio: float | None = None,
        interval: int = 1,
        reuse: bool = False,
        curvature_interval: int = 1,
        model: torch.nn.Module | None = None,
        sync_perturbation: bool | ProcessGroup = False,
        shard_state: bool = False,
        replay_rng: bool = True,
        stochastic_rounding: bool = False,
        backend: str = "auto",
        compile: bool = False,
        flatten: bool = True,
        **base_kwargs: Any,
    ) -> None:
        if is_part_of_zero():
            raise TypeError(
                "ZeroRedundancyOptimizer(params, CRSAM) would perturb the parameters of each rank by themselves: "
                "make it CRSAM(params, ZeroRedundancyOptimizer(params, SGD))"
            )
        if type(self).__module__.startswith("horovod"):
            raise TypeError("Horovod counts the backwards of a step: use DistributedDataParallel")
        _check_choice("regularizer", regularizer, tuple(REGULARIZERS))
        _check_choice("estimator", estimator, ("gradient", "loss"))
        if gamma is not None and alpha is not None:
            raise TypeError("gamma is another name of alpha: give one of them")
        alpha = gamma if alpha is None else alpha
        if alpha is None:
            alpha = REGULARIZERS[regularizer].alpha
        if max_regularizer_ratio is None:
            max_regularizer_ratio = REGULARIZERS[regularizer].max_ratio
        if not max_regularizer_ratio >= 0:
            raise ValueError(f"max_regularizer_ratio must be at least 0, but is {max_regularizer_ratio}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, but is {max_grad_norm}")
        interval, curvature_interval = (
            _positive_integer(name, value)
            for name, value in (("interval", interval), ("curvature_interval", curvature_interval))
        )
        if curvature_interval > 1 and estimator == "loss":
            raise ValueError('curvature_interval leaves out losses that estimator="loss" needs: use "gradient"')
        if reuse and interval == 1:
            raise ValueError("reuse=True is about the steps between two that perturb: there are none with interval=1")
        self.interval, self.curvature_interval, self.reuse = interval, curvature_interval, reuse
        self.regularizer, self.estimator = regularizer, estimator
        self.max_grad_norm, self.max_regularizer_ratio = max_grad_norm, max_regularizer_ratio
        self.replay_rng, self.compile, self.flatten = replay_rng, compile, flatten
        self.stochastic_rounding = stochastic_rounding
        self.stats = Stats()
        self._difference = SecondDifference()
        self._requested_backend = backend
        self.sync_perturbation, self.shard_state = sync_perturbation, shard_state
        self.model = model
        backends.load(backend, compile=compile)  # what is asked for in vain is said first

        self._own = {"rho": rho, "alpha": alpha, "beta": 0.01 if beta is None else beta, "adaptive": adaptive}
        base, own_groups = make_base(params, base_optimizer, base_kwargs, self._own.keys())
        self._separate: SeparateGroups | None = SeparateGroups([], base, self._own)
        super().__init__(own_groups or base.param_groups, {**base.defaults, **self._own})
        self.base_optimizer = base
        if own_groups is None:
            self._separate = None
        self._check_sharing_state(self._update())
        self._attach()

    # What the optimizer is -------------------------------------------------------------------------------------------

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """For each parameter its state: that of the base optimizer."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if hasattr(self, "base_optimizer"):  # torch's constructor comes first, with an empty one
            self.base_optimizer.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the base optimizer, with our options; our own list where the two share names of options.

        With ``interval`` or ``curvature_interval``, "crsam_steps" in each is the number of steps taken or skipped.
        """
        if self._separate is not None:
            return self._counting(self._separate.groups)
        groups = self.base_optimizer.param_groups
        for group in groups:
            if not group.keys() >= self._own.keys():  # it was handed to the base optimizer
                group.update({**self._own, **group})
        return self._counting(groups)

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._separate is not None:
            self._separate.groups = groups
        else:
            self.base_optimizer.param_groups = groups

    def _counting(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``groups``; where intervals decide on the next step, with the count that they go by."""
        if max(self.interval, self.curvature_interval) > 1:
            for group in groups:
                group[_STEPS] = self.stats.steps
        return groups

    @property
    def backend(self) -> str:
        """Name of the backend that runs the operators."""
        return self.operators.name

    @property
    def model(self) -> torch.nn.Module | None:
        """The model, for its buffers and its replicas. It can be set until the first step: trainers wrap models late.

        Raises:
            RuntimeError: when it is set after that.
            ValueError, TypeError: for a model that cannot be stepped with, saying what to use instead.
        """
        return self._model

    @model.setter
    def model(self, model: torch.nn.Module | None) -> None:
        if self.stats.steps or getattr(self, "_step", None) is not None:
            raise RuntimeError("model can be set until the first step only")
        refusal = _refusal(model)
        if refusal is not None:
            raise ValueError(refusal)
        self._model = model
        self.model_buffers = None if model is None else ModelBuffers(model)
        self.replicas = self._replicas_of(model)
        if self.replicas is None and self.sync_perturbation is not False:
            raise ValueError("sync_perturbation is about ranks: give a DistributedDataParallel as model=")
        if self.replicas is None and self.shard_state:
            raise ValueError(
                "shard_state=True is about the ranks of a DistributedDataParallel: give that as model= (the state of "
                "parameters that are sharded themselves, by fully_shard, is so already)"
            )

    def _replicas_of(self, model: torch.nn.Module | None) -> Replicas | None:
        inner = compiled_from(model)
        return Replicas(inner, self.sync_perturbation) if isinstance(inner, DistributedDataParallel) else None

    def follow_wrapper(self, wrapper: Any) -> None:
        """Make a DistributedDataParallel the ``model``, if it is around the one that was given; trainers wrap late."""
        if self._model is not None and getattr(wrapper, "module", None) is self._model:
            self.model = wrapper

    @property
    def passes(self) -> int:
        """How many passes the next step takes, or the one in progress: 3, 2 where alpha = beta = 0, 1 where rho = 0.

        With ``interval`` and ``curvature_interval`` it differs from step to step.
        """
        return self._calls if self._perturbs and self.stats.steps % self.interval == 0 else 1

    @property
    def pass_index(self) -> int:
        """The pass that is running, or comes next: 0 at w, 1 at w + e, 2 at w - e. Metrics belong to pass 0."""
        return 0 if self._step is None else self._step.collected

    @property
    def _calls(self) -> int:
        """How many of first_step, second_step, third_step make a step."""
        return PASSES if self._curved and self.stats.steps // self.interval % self.curvature_interval == 0 else 2

    @property
    def _perturbs(self) -> bool:
        return any(_nonzero(group["rho"]) for group in self.param_groups)

    @property
    def _curved(self) -> bool:
        return any(_nonzero(group[name]) for group in self.param_groups for name in ("alpha", "beta"))

    def capture_blocker(self) -> str | None:
        """Why steps cannot be captured in a CUDA graph; None if they can."""
        devices = sorted(map(str, self._devices()))
        if len(devices) != 1 or not devices[0].startswith("cuda"):
            return f"the parameters are on {', '.join(devices)}, not on one CUDA device"
        if in_several_processes() or self._is_sharded:
            return "its gradients or sums are reduced over several processes"
        if self.backend not in ("cuda", "triton"):
            return f"backend {self.backend!r} reads numbers on the host; use cuda or triton"
        if not self._update().native:
            return f"whether {type(self.base_optimizer).__name__} makes its step is decided on the host"
        return None

    @property
    def in_place(self) -> bool:
        """Whether parameters and state are where the last step left them: the next one finds them by address."""
        return self._flat is not None and self._flat.matches(self.param_groups, self.state, self._update())

    @property
    def state_is_complete(self) -> bool:
        """Whether the state holds all that the last step used."""
        return self._flat is not None and self._flat.published

    def __repr__(self) -> str:
        head, _, groups = super().__repr__().partition("(")
        base, backend = type(self.base_optimizer).__name__, self.backend
        if self._requested_backend == "auto":
            reasons = backends.passed_over(compile=self.compile, devices=self._device_types())
            if reasons:
                backend += f" ({', '.join(f'{name} {why}' for name, why in reasons.items())})"
        return f"{head}(base_optimizer={base}, regularizer={self.regularizer}, backend={backend},{groups}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for any torch optimizer; it may have its own rho, alpha (or gamma), beta and adaptive.

        Raises:
            ValueError: for a rho, alpha or beta that is negative or not finite, and for parameters that are complex,
                not floating point, expanded, or no plain tensors.
        """
        if isinstance(param_group, dict):
            if "gamma" in param_group and "gamma" not in self.defaults:
                param_group["alpha"] = param_group.pop("gamma")
            for name, default in self._own.items():
                value = param_group.setdefault(name, default)
                if name != "adaptive" and not isinstance(value, Tensor) and not 0 <= value < math.inf:
                    raise ValueError(f"{name} must be a finite number that is not negative, but is {value}")
        super().add_param_group(param_group)
        gathered = gathered_by_fully_shard()
        try:
            for param in param_group["params"]:
                if id(param) in gathered:
                    raise ValueError(
                        f"a parameter of shape {tuple(param.shape)} is one that fully_shard has gathered for a "
                        "forward, and will free: call model.reshard() and take model.parameters() again"
                    )
                if param.requires_grad:
                    check_parameter(param)
                if is_sharded(param) and self.stochastic_rounding:
                    raise ValueError(
                        "stochastic_rounding rounds where parameters are perturbed, and each rank in its own way; "
                        "sharded ones are rounded when they are gathered: leave param_dtype=None in "
                        "MixedPrecisionPolicy, and use torch.autocast"
                    )
        except ValueError:
            self.param_groups.pop()  # what is refused does not stay
            raise
        self._sync()

    # A step ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | Sequence[Callable[[], Any]] | None = None,
        *,
        parallel: torch.nn.Module | None = None,
        sync_perturbation: bool = True,
        grad_scaling: tuple[Tensor, Tensor] | None = None,
        noise: SharedNoise | None = None,
    ) -> Any:
        """Take a step.

        Args:
            closure: computes the loss of the batch, calls ``backward()`` on it and returns it. It is called once for
                each pass, at w, w + e and w - e, with gradients cleared and the same random numbers. It may return
                anything; ``estimator="loss"`` needs a loss, which is a tensor of one element or a number. A list of
                closures accumulates the gradients of its micro-batches: every pass calls them all, and each returns a
                loss, or all return None. Without a closure, the step that ``first_step`` or ``combine`` began is
                finished.
            parallel: the model, to compute the gradients at w + e and w - e at once, by ``torch.func.vmap``, on twice
                the memory for activations; a step of fewer passes is as without. The closure only returns the loss
                and leaves ``backward()`` to the step. Hooks on gradients do not see the two; random numbers, which
                ``vmap`` would draw anew, are refused unless ``replay_rng`` is off.
            sync_perturbation: of a list of closures. True: all share the perturbation of the sum of their gradients;
                False: each has its own (m-sharpness, Foret et al., ICLR 2021, section 4.1, m being the micro-batch),
                and their regularized gradients are added.
            grad_scaling: what the closure multiplied its losses with, 0-dim, and a 0-dim tensor that becomes 1 if the
                step is skipped, else 0: :class:`crsam_ext.GradScaler` gives them.
            noise: replays the random numbers, those of the global generators by default. A CUDA graph has its own.
        Returns:
            What the closure returned at w (a tensor without its graph), of several the sum; None without a closure.
        Raises:
            RuntimeError: if no gradient was computed, a gradient is sparse, a step is in progress already, or torch's
                own GradScaler was given a closure; with ``parallel``, if the loss draws random numbers.
            TypeError: if ``parallel`` is no module, is a DistributedDataParallel, or comes with a list of closures;
                if a closure in a list returns something other than a loss.
            ValueError: if ``estimator="loss"`` needs a loss and the closure returned none.

        Whatever the closure raises passes through, after the parameters are bit for bit w again.
        """
        if closure is None:
            return self._finish(grad_scaling)
        if self._step is not None:
            raise RuntimeError(f"step(closure) called in the middle of a step: {self._due()}")
        if hasattr(self, "found_inf"):
            raise RuntimeError("torch's GradScaler takes no closure: use crsam_ext.GradScaler")
        loss_of: Any = closure
        if parallel is not None:
            if in_several_processes() or self._is_sharded:
                raise TypeError("parallel= evaluates a model without what reduces its gradients: step without it")
            closure = _with_backward(closure, parallel)
        closures = _accumulating(closure, self._locally)
        if not sync_perturbation and self.passes > 1:
            return self._step_in_parts(closure, grad_scaling, noise)
        with self._restoring():
            step = self._begin(self.passes, num_points=1 if parallel is None or self.passes < PASSES else 2)
            result = self._take_passes(step, closures, noise, None if parallel is None else (parallel, loss_of))
            self._end(step, *(grad_scaling or (None, None)))
        return result

    def _take_passes(
        self, step: Step, closure: Callable[[], Any], noise: SharedNoise | None, parallel: tuple[Any, Any] | None
    ) -> Any:
        """Take all passes of a step that was begun; returns what the closure returned at w.

        Args:
            step: the step.
            closure: computes gradients.
            noise: replays the random numbers, those of the global generators by default.
            parallel: the model and the function of the loss, where the points w + e and w - e are evaluated at once.
        """
        passes = step.passes
        if passes == 1 or not self.replay_rng:
            noise = None
        elif noise is None:
            noise = SharedNoise(self._devices() if self._flat is None else self._flat.devices())
        if passes > 1 and self.model_buffers is not None:
            self.model_buffers.begin()

        def run() -> Any:  # what is returned here must not stay alive during the next pass: it may hold a graph
            with self.no_sync():
                value = _with_gradients(closure)
            step.collect(value, keep=False)
            return value

        result = None
        for index in range(passes):
            if index == 0:
                self._clear_gradients()  # later, they were taken
                result = run()
            else:
                if noise is not None:
                    noise.repeat()
                run()
            if parallel is not None and passes == PASSES:
                if noise is not None and noise.drawn:
                    raise RuntimeError(
                        "the loss draws random numbers (dropout?), and vmap would draw others: "
                        "step without parallel=, or set replay_rng=False"
                    )
                points = gradients_at(step.move_apart(), *parallel, step.flat)
                step.flat.follow()
                for point in points:
                    step.add(*point)
                break
            if index < passes - 1:
                step.move()
        if noise is not None:
            noise.end()
        return result

    def _step_in_parts(
        self, closures: Any, grad_scaling: tuple[Tensor, Tensor] | None, noise: SharedNoise | None
    ) -> Any:
        """A step in which every closure has a perturbation of its own, and the regularized gradients are added."""
        if callable(closures):
            raise TypeError("sync_perturbation=False is about a list of closures: there is one")
        if self.replicas is not None or self.curvature_interval > 1 or self.reuse:
            raise ValueError(
                "sync_perturbation=False goes with none of DistributedDataParallel, curvature_interval and reuse"
            )
        params = [param for group in self.param_groups for param in group["params"]]
        total: dict[Tensor, Tensor] = {}

        def part(closure: Callable[[], Any]) -> Any:
            with self._restoring():
                step = self._begin(self.passes, counted=False)
                loss = self._take_passes(step, closure, noise, None)
                step.combine(None if grad_scaling is None else grad_scaling[0])
                self._step = None
            for param in params:
                if param.grad is not None:
                    total[param] = total[param].add_(param.grad) if param in total else param.grad.clone()
            return loss

        loss = _accumulating([partial(part, closure) for closure in closures], nullcontext)()
        for param in params:
            param.grad = total.get(param)
        with self._restoring():
            step = self._begin(1, is_sum=True)
            step.collect(loss, keep=False)
            self._end(step, *(grad_scaling or (None, None)))
        return loss

    def first_step(self, zero_grad: bool = False, loss: Any = None) -> None:
        """After ``backward()`` at w: save w and move the parameters to w + e.

        Args:
            zero_grad: clear the gradients. Otherwise they stay in ``p.grad``, which costs a copy of them.
            loss: the loss of this pass, needed where the log regularizer has ``estimator="loss"``.
        Raises:
            RuntimeError: if another call is due, no gradient was computed, or ``interval`` makes this step one of a
                single pass, which ``step()`` finishes: see :attr:`passes`.
        """
        if self._step is not None:
            raise RuntimeError(f"first_step() called in the middle of a step: {self._due()}")
        if self.stats.steps % self.interval:
            raise RuntimeError(
                f"interval={self.interval} leaves this step one pass: call step() instead of first_step() where "
                "optimizer.passes is 1"
            )
        with self._restoring():
            self._begin(self._calls)
            self._call(zero_grad, loss)

    def second_step(self, zero_grad: bool = False, loss: Any = None) -> None:
        """After ``backward()`` at w + e: move to w - e; in a step of two passes, update w instead.

        Arguments and errors as for :meth:`first_step`.
        """
        self._require("second_step", 1)
        self._call(zero_grad, loss)

    def third_step(self, zero_grad: bool = False, loss: Any = None) -> None:
        """After ``backward()`` at w - e: update w. Arguments and errors as for :meth:`first_step`."""
        self._require("third_step", 2)
        self._call(zero_grad, loss)

    def no_sync(self) -> AbstractContextManager[Any]:
        """In which forward and backward of a pass are run, in the form of calls: reduced in the last pass only.

        With a DistributedDataParallel as ``model`` it is that one's ``no_sync()`` in all other passes; it does nothing
        in the last, and without such a model. (Without it, too, gradients stay local; DDP copies them in vain.)

        Example::

            for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
                with optimizer.no_sync():
                    criterion(model(x), y).backward()
                call(zero_grad=True)
        """
        if self.replicas is None:
            return nullcontext()
        if self._step is None:
            self.replicas.prepare(self)
        return self.replicas.context(self.next_pass()[0])

    def next_pass(self) -> tuple[Pass, Step | None]:
        """What happens to the gradients of the pass that is running or comes next, and the step in progress."""
        if self._step is not None:
            return self._step.kind, self._step
        if self.replicas is None:
            return Pass.LOCAL, None
        passes = self.passes
        keeps = self._kept_difference() is not None or self._kept_direction(passes) is not None
        return self.replicas.kind(0, passes, self._settings().weights_known(passes, keeps)), None

    def _locally(self) -> AbstractContextManager[Any]:
        """In which a micro-batch is run that is not the last of its pass."""
        return nullcontext() if self.replicas is None else self.replicas.ddp.no_sync()

    def check_replicas(self) -> None:
        """See whether all ranks hold the same parameters, to the bit: one all-reduce of a checksum of each.

        Of the ranks of the DistributedDataParallel that is ``model``, else of all; of a DTensor, of the ranks that hold
        the same shard. Nothing where there is one process.

        Raises:
            RuntimeError: on all ranks, if they do not, naming the first that differs.
        """
        if not in_several_processes():
            return
        params = [param for group in self.param_groups for param in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", [])]
        if len(names) != len(params):
            names = [f"parameter {index} of shape {tuple(param.shape)}" for index, param in enumerate(params)]
        check_equal(params, names, None if self.replicas is None else self.replicas.group)

    def give_loss(self, loss: Any) -> None:
        """Give the loss of the last pass where ``step()`` ends a step of calls: it takes no argument for it."""
        self._last_loss = loss

    @torch.no_grad()
    def combine(self, loss: Any = None, grad_scale: Tensor | float | None = None) -> None:
        r"""Instead of the last of these calls: go back to w, with :math:`\hat g` in ``p.grad``; ``step()`` follows.

        In between, whatever is usually done to a gradient can be done to it: clip it, look at it, unscale it.

        Args:
            loss: the loss of this pass.
            grad_scale: what the losses were multiplied with before ``backward()``; :math:`\hat g` still is. Needed for
                the log regularizer only, whose kappa and sigma have the units of the loss.
        Raises:
            RuntimeError: if another call is due, or no gradient was computed.
        """
        step = self._step
        if step is None or step.collected != step.passes - 1:
            raise RuntimeError(f"combine() called too early: {'first_step() is due' if step is None else self._due()}")
        with self._restoring():
            step.collect(loss, keep=False)
            step.combine(None if grad_scale is None else scalar(grad_scale))
        self._step, self._combined = None, True

    @torch.no_grad()
    def restore(self) -> None:
        """Abandon the step in progress, if there is one: the parameters are bit for bit w again."""
        if self._step is not None:
            self._step.restore()
            self._step = None

    def _begin(
        self, passes: int, combined: bool = False, num_points: int = 1, counted: bool = True, is_sum: bool = False
    ) -> Step:
        """Begin a step; arguments as for :class:`crsam_ext.step.Step`."""
        self._combined = False
        if self._provisional.drop(self.state) and self._flat is not None:
            self._flat.recount(self.state)
        self._sync()
        params = (param for group in self.param_groups for param in group["params"])
        if not any(param.requires_grad or param.grad is not None for param in params):
            raise RuntimeError("no parameter requires a gradient: there is nothing to optimize")
        replicas = None if combined else self.replicas
        if replicas is None and passes == PASSES and self._settings().needs_losses and in_several_processes():
            raise ValueError(
                'estimator="loss" knows the losses of this rank only: use estimator="gradient" or, for means over the '
                "ranks of a DistributedDataParallel, give that as model="
            )
        if replicas is not None:
            replicas.prepare(self)
            replicas.agree(lambda: self._signature(passes))
        self._step = Step(
            self._settings(),
            self._locate,
            self.stats,
            self.model_buffers,
            passes,
            counted=counted and not combined,
            is_sum=is_sum,
            difference=self._kept_difference(),
            direction=None if combined or is_sum else self._begin_direction(passes),
            num_points=num_points,
            replicas=replicas,
        )
        return self._step

    def _settings(self) -> StepSettings:
        return StepSettings(
            self.regularizer, self.estimator, self.max_grad_norm, self.max_regularizer_ratio, self.stochastic_rounding
        )

    def _kept_difference(self) -> SecondDifference | None:
        return self._difference if self.curvature_interval > 1 and self._curved else None

    def _kept_direction(self, passes: int) -> SharpnessDirection | None:
        """What a step of so many passes makes for later ones, or goes on with; None where nothing is perturbed."""
        between = self.stats.steps % self.interval > 0
        return self._direction if self.reuse and (passes > 1) != between and self._perturbs else None

    def _begin_direction(self, passes: int) -> SharpnessDirection | None:
        direction, age = self._kept_direction(passes), self.stats.steps % self.interval
        if direction is not None:
            direction.begin_step(age)
        elif self.reuse and age == 0:  # a perturbation was due, and rho is 0: h would be taken for a new one
            for state in self.state.values():
                if DIRECTION in state:
                    state[DIRECTION].zero_()
        return direction

    def prepare_replay(self, device: torch.device) -> None:
        """Call before a CUDA graph captures or repeats the next step: what only the host knows is put on the device."""
        if self.reuse:
            self._direction.prepare_replay(self.stats.steps % self.interval, device)

    def _signature(self, passes: int) -> dict[str, Any]:
        """What must be the same on all ranks of the model: how a step is made, and of what."""
        groups = {
            f"{name} of group {index}": value
            for index, group in enumerate(self.param_groups)
            for name, value in group.items()
            if name != "params" and isinstance(value, (int, float, str, tuple))
        }
        return {
            "passes": passes,
            "steps": self.stats.steps,
            "base optimizer": type(self.base_optimizer).__name__,
            "backend": self.backend,
            "reuse": self.reuse,
            "shard_state": self.shard_state,
            "sync_perturbation": self.sync_perturbation if isinstance(self.sync_perturbation, bool) else "a group",
            **asdict(self._settings()),
            "shapes": [tuple(param.shape) for group in self.param_groups for param in group["params"]],
            **groups,
        }

    def _locate(self, num_points: int) -> Located:
        """Parameters and state where they are now, and the update with the options that there are now."""
        update, flat = self._update(), self._flat
        if flat is not None:
            num_points = max(num_points, flat.num_points)
        if flat is None or flat.num_points < num_points or not flat.matches(self.param_groups, self.state, update):
            operators = self._load_operators()
            if operators.name != self.operators.name:  # the parameters have moved to another kind of device
                self.operators = operators
            self._check_sharing_state(update)
            moved = {} if flat is None else flat.moved()
            self._flat = flat = None  # whatever it holds of parameters in place must not count as another holder
            flat = FlatParameters(
                self.param_groups,
                self.state,
                update,
                self.operators,
                num_points,
                self.flatten,
                moved,
                [DIRECTION] if self.reuse else [],
                self.replicas.group if self.shard_state and self.replicas is not None else None,
            )
            if not flat.buckets:
                raise RuntimeError("no parameter requires a gradient: there is nothing to optimize")
            if flat.is_sharded and self.replicas is not None:
                raise RuntimeError(
                    "DistributedDataParallel has parameters that are DTensors: use fully_shard on a mesh of two "
                    "dimensions, replicas and shards, instead"
                )
            self._flat = flat
        flat.begin_step()
        return Located(flat, update, self.operators, self.param_groups, self.state)

    def _check_sharing_state(self, update: Update) -> None:
        """Raise ValueError if ranks are to share a state that is not made here."""
        if self.shard_state and not update.native:
            name = type(self.base_optimizer).__name__
            raise ValueError(
                "shard_state=True is for SGD, Adam and AdamW (without amsgrad), whose updates are made here: for "
                f"{name}, use CRSAM(params, ZeroRedundancyOptimizer(params, {name}))"
            )

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """Restore the parameters if anything goes wrong within."""
        try:
            yield
        except BaseException as error:
            self.restore()
            if self._flat is not None and self._flat.is_gathered and hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(
                    "CRSAM has restored the parameters. fully_shard needs model.reset_iter_state() before it can go on "
                    "after an exception in a forward or backward."
                )
            raise

    @torch.no_grad()
    def _call(self, zero_grad: bool, loss: Any) -> None:
        step = self._step
        assert step is not None
        if step.collected < step.passes - 1:
            with self._restoring():
                step.collect(loss, keep=not zero_grad)
                # In calls, a GradScaler looks at the gradients of the last pass only.
                step.move(show_overflow=True)
        else:
            self.give_loss(loss)
            self.step()  # through the public method: hooks and schedulers watch it
            if zero_grad:
                self._clear_gradients()

    def _finish(self, grad_scaling: tuple[Tensor, Tensor] | None) -> None:
        """Take the last pass of a step of calls, and make the update."""
        if self._step is None:
            if not self._combined and (self.passes > 1 or self._is_stateless) and self._enters_state():
                self._enter_state()
                return
            if not self._combined and self.passes > 1:
                raise RuntimeError(
                    "step() without a closure finishes what first_step() began: call first_step(), or step(closure)"
                )
            self._begin(1, combined=self._combined)
        step = self._step
        assert step is not None
        if step.collected != step.passes - 1:
            raise RuntimeError(f"step() called too early: {self._due()}")
        loss, self._last_loss = self._last_loss, None
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scaling is not None:
            grad_scale, found_inf = grad_scaling
        with self._restoring():
            if found_inf is not None and grad_scaling is None and step.reduces_late:
                raise RuntimeError(
                    "torch's GradScaler decides on each rank by itself, before gradients are reduced: "
                    "use crsam_ext.GradScaler"
                )
            if found_inf is not None and grad_scale is None and step.passes > 1:
                raise RuntimeError(
                    "unscale_() was called in the middle of a step, whose earlier gradients are scaled: "
                    "call combine() before it, or clip with max_grad_norm"
                )
            step.collect(loss, keep=False)
            self._end(step, grad_scale, found_inf)

    @property
    def _is_stateless(self) -> bool:
        """Whether there is no state, however many steps there have been: it is asked for in the same way each time."""
        update = self._update()
        return not self.state and update.native and not any(update.buffers or ())

    def _enters_state(self) -> bool:
        """Whether ``step()`` is only to enter the state: torch.distributed.checkpoint calls it with rates of 0."""
        rates = [group.get("lr", 1.0) for group in self.param_groups]
        on_host = not any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates)
        params = (param for group in self.param_groups for param in group["params"])
        return on_host and not any(map(float, rates)) and any(param.grad is not None for param in params)

    def _enter_state(self) -> None:
        """Enter the state of parameters that have a gradient, as it is before the first step; nothing else changes."""
        self._sync()
        flat, update, *_ = self._locate(1)

        def publish() -> None:
            for bucket in flat.buckets:
                mask = tuple(slot.param.grad is not None for slot in bucket.slots)
                bucket.publish(bucket.plan(mask), self.state)

        if not update.native:
            self._provisional.make(self.state, self.param_groups, lambda: self._call_base("step"))
            publish()
        elif update.shows_steps:
            self._provisional.make(self.state, self.param_groups, publish)
        else:
            publish()
        if self.curvature_interval > 1 and self._curved:
            self._difference.enter(flat.buckets)
            self._difference.publish(self.state)

    def _end(self, step: Step, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Make the update with the gradients that the step has collected; it is over."""
        step.update(grad_scale, found_inf)
        self._step = None
        # For a scheduler that watches the base optimizer, whose own step() need not have been called.
        mark_stepped(self.base_optimizer)

    def _due(self) -> str:
        assert self._step is not None
        call = ("first_step", "second_step", "third_step")[self._step.collected]
        return f"{call}() or restore() is due"

    def _require(self, call: str, collected: int) -> None:
        if self._step is None:
            sam = " (in a step of two passes, second_step() makes the update)" if call == "third_step" else ""
            raise RuntimeError(f"{call}() called outside a step: first_step() is due{sam}")
        if self._step.collected != collected:
            raise RuntimeError(f"{call}() called out of order: {self._due()}")

    def train(self) -> None:
        """Put the base optimizer into training mode, if it has one, as schedule-free optimizers do.

        Nothing happens in the middle of a step, which was begun in training mode.
        """
        if self._step is None and hasattr(self.base_optimizer, "train"):
            self._call_base("train")

    def eval(self) -> None:
        """Put the base optimizer into evaluation mode, if it has one, as schedule-free optimizers do.

        Raises:
            RuntimeError: in the middle of a step, because it moves the parameters.
        """
        if hasattr(self.base_optimizer, "eval"):
            if self._step is not None:
                raise RuntimeError(f"eval() called in the middle of a step: {self._due()}")
            self._call_base("eval")

    def _call_base(self, method: str) -> None:
        """Call a method of the base optimizer, with our options before and its own changes of them after."""
        self._sync()
        getattr(self.base_optimizer, method)()
        self._sync()

    def _sync(self) -> None:
        """Bring our groups and those of the base optimizer in line, where they are separate."""
        if self._separate is not None and hasattr(self, "base_optimizer"):
            self._separate.sync()

    def _update(self) -> Update:
        """How the base optimizer's update is made, with the options that the groups have now."""
        return update_of(self.base_optimizer, self.param_groups, lambda: self._call_base("step"))

    def _clear_gradients(self) -> None:
        for group in self.param_groups:
            self.operators.host.clear_gradients(group["params"])

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer, and "base_optimizer" where that has a form of its own.

        With intervals, the groups hold "crsam_steps", the number of steps, which decides on the next one; the state of
        a parameter holds its "second_difference" with ``curvature_interval``, its "sharpness_direction" with ``reuse``.
        """
        self._enter_kept()
        result = super().state_dict()
        # In the order of the parameters: all ranks gather full tensors in the order in which they find them. (That in
        # which they were entered depends on the sizes of shards.)
        order = {key: number for number, key in enumerate(k for g in result["param_groups"] for k in g["params"])}
        result["state"] = dict(sorted(result["state"].items(), key=lambda item: order.get(item[0], len(order))))
        if type(self.base_optimizer).state_dict is not Optimizer.state_dict:
            result["base_optimizer"] = self.base_optimizer.state_dict()
        return result

    def _enter_kept(self) -> None:
        """Enter zeros for what is kept for later steps and is not there yet, where a parameter has state.

        A base optimizer may have made its state without a step, and a checkpoint of it lacks what is ours. What is
        asked for before a checkpoint is loaded must name all that there is in it.
        """
        names = [DIRECTION] if self.reuse else []
        names += [SECOND_DIFFERENCE] if self._kept_difference() is not None else []
        for group in self.param_groups if names else ():
            for param in group["params"]:
                state = self.state.get(param)
                if not state or not param.requires_grad:
                    continue
                for name in names:
                    if name not in state:
                        zeros = torch.zeros_like(local(param), dtype=compute_dtype(param.dtype), requires_grad=False)
                        state[name] = as_shard_of(param, zeros)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, here or of torch's SGD, Adam or AdamW.

        Options that the groups of ``state_dict`` lack (rho, say) stay as they are.

        Raises:
            ValueError: for full tensors where parameters are DTensors; torch.distributed.checkpoint loads those.
        """
        loaded: dict[str, Any] = {}
        counts: list[int] = []

        def complete(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            loaded.update(completed(given, self.param_groups))
            self._check_state(loaded)
            counts.extend(group.pop(_STEPS) for group in loaded["param_groups"] if _STEPS in group)
            return loaded

        self.restore()
        if self.replicas is not None:
            self.replicas.forget()
        hook = self.register_load_state_dict_pre_hook(complete)  # the last to run: after the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        if counts:
            self.stats.steps = counts[0]
        self._difference = SecondDifference()
        self._own_state(loaded)
        base = self.base_optimizer
        if type(base).load_state_dict is not Optimizer.load_state_dict:  # it knows best what its state is made of
            shared = self._separate is None
            theirs = [
                {**new, **({} if shared else {k: old[k] for k in self._own if k in old})}
                for old, new in zip(base.param_groups, loaded["param_groups"], strict=True)
            ]
            base.load_state_dict(loaded.get("base_optimizer", {**loaded, "param_groups": theirs}))

    def _check_state(self, loaded: dict[str, Any]) -> None:
        """Raise ValueError for state that is not placed as its parameter is; nothing has been loaded yet."""
        if self.shard_state:  # there a state is cut, or is to be
            return
        native = self._update().native
        for param, name, value in self._values(loaded):
            if not value.dim() or value.shape != param.shape:
                continue
            # A wrapped optimizer may place its own as it likes, but not as full tensors: it mixes them with gradients.
            ours = native or name in (SECOND_DIFFERENCE, DIRECTION)
            if ours or is_sharded(param) != is_sharded(value):
                check_state(name, value, param)

    def _values(self, loaded: dict[str, Any]) -> Iterator[tuple[Tensor, str, Tensor]]:
        """The tensors of a state that is loaded: for which parameter, and under which name."""
        for own, group in zip(self.param_groups, loaded["param_groups"], strict=False):  # torch compares their lengths
            for param, key in zip(own["params"], group["params"], strict=False):
                for name, value in loaded["state"].get(key, {}).items():
                    if isinstance(value, Tensor):
                        yield param, name, value

    def _own_state(self, loaded: dict[str, Any]) -> None:
        """Own the tensors of a state that was just loaded: training does not write into a checkpoint.

        torch also casts floating state to the parameter's dtype; ours is float32 where that is float16 or bfloat16.
        """
        for param, name, value in self._values(loaded):
            narrowed = has_master(param.dtype) and value.is_floating_point()
            if narrowed or self.state[param].get(name) is value:
                self.state[param][name] = value.detach().to(param.device, copy=True)

    def _attach(self) -> None:
        """Prepare for steps with the base optimizer, whose state may also be loaded by itself."""
        loaded: dict[str, Any] = {}

        def complete(base: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self.restore()
            loaded.clear()
            loaded.update(completed(given, base.param_groups))
            self._check_state(loaded)
            return loaded

        if type(self.base_optimizer).load_state_dict is Optimizer.load_state_dict:  # others need not know of hooks
            self.base_optimizer.register_load_state_dict_pre_hook(complete)
            self.base_optimizer.register_load_state_dict_post_hook(lambda _: self._own_state(loaded))
        self._sync()
        self._reset()

    @property
    def _is_sharded(self) -> bool:
        return any(is_sharded(param) for group in self.param_groups for param in group["params"])

    def _devices(self) -> set[torch.device]:
        return {param.device for group in self.param_groups for param in group["params"]}

    def _device_types(self) -> set[str]:
        return {device.type for device in self._devices()}

    def _load_operators(self) -> Operators:
        return backends.load(self._requested_backend, compile=self.compile, devices=self._device_types())

    def _reset(self) -> None:
        self.operators = self._load_operators()
        self._flat = self._step = self._last_loss = None
        self._combined, self._provisional, self._direction = False, ProvisionalState(), SharpnessDirection()

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in attributes_of(self).items() if k not in _TRANSIENT}
        # torch's __getstate__ of the base optimizer leaves attributes behind that its class has added.
        return {**kept, "_base_attributes": attributes_of(self.base_optimizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" not in state:  # called by torch's load_state_dict
            if self._separate is None:
                self.base_optimizer.__setstate__(state)
            else:
                self._separate.groups = state["param_groups"]
                self.base_optimizer.__setstate__({**state, "param_groups": self.base_optimizer.param_groups})
            self._reset()
            return
        attributes = state.pop("_base_attributes", {})
        # Pickles of earlier versions hold what are properties now, and lack what has been added since.
        groups, _ = state.pop("param_groups", None), state.pop("state", None)
        base = state["base_optimizer"]
        shares_names = bool(state["_own"].keys() & base.defaults.keys())
        later: dict[str, Any] = {
            "_separate": SeparateGroups(groups, base, state["_own"]) if shares_names else None,
            "_difference": SecondDifference(),
            "model_buffers": None,
            "_model": None,
        }
        options = inspect.signature(CRSAM).parameters
        for name in _ADDED_OPTIONS:
            later[name] = options[name].default
        super().__setstate__({**later, **state})
        self.replicas = self._replicas_of(self._model)
        base.__dict__.update(attributes)
        base.__setstate__({"state": base.state, "param_groups": base.param_groups})
        self._attach()


def _refusal(model: Any) -> str | None:
    """Why a step cannot be made with a model; None where it can."""
    home = type(model).__module__.partition(".")[0]
    if home == "deepspeed":
        return "DeepSpeed's engine takes no closure and frees gradients in its step: use DistributedDataParallel"
    if type(model).__name__ == "FullyShardedDataParallel":
        return "FullyShardedDataParallel moves parameters in every pass: use torch.distributed.fsdp.fully_shard"
    return None


def _with_gradients(closure: Callable[[], Any]) -> Any:
    """What the closure returns; a tensor without its graph, so that it does not live on while the next one is made."""
    with torch.enable_grad():
        value = closure()
    return value.detach() if isinstance(value, Tensor) else value


def _accumulating(
    closures: Callable[[], Any] | Sequence[Callable[[], Any]], locally: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], Any]:
    """One closure that calls them all, but the last within ``locally()``, and returns the sum of what they return."""
    if callable(closures):
        return closures
    if not closures or not all(map(callable, closures)):
        raise TypeError("step() takes a closure or a list of closures")

    def closure() -> Any:
        total = None
        for index, part in enumerate(closures):
            with nullcontext() if index == len(closures) - 1 else locally():
                loss = part()
            if loss is not None and not is_loss(loss):
                raise TypeError(
                    "a closure in a list must return its loss, a tensor of one element or a number, or None, but "
                    f"returned a {type(loss).__name__}"
                )
            if index and (loss is None) != (total is None):
                raise TypeError("of a list of closures, all must return a loss, or all None")
            loss = loss.detach() if isinstance(loss, Tensor) else loss
            total = loss if total is None else total + loss
        return total

    return closure


def _with_backward(closure: Any, model: Any) -> Callable[[], Any]:
    """A closure that calls ``backward()`` on the loss of one that does not."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(f"parallel= takes the model, but was given a {type(model).__name__}")
    if not callable(closure):
        raise TypeError("with parallel=, step() takes one closure")

    def with_backward() -> Any:
        loss = closure()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise TypeError("with parallel=, the closure returns the loss and leaves backward() to the step")
        loss.backward()
        return loss

    return with_backward


def _positive_integer(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive integer, but is {value}")
    return number


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


def _nonzero(value: float | Tensor) -> bool:
    """Whether a hyper-parameter can be nonzero: a tensor may change on its device, so it is not asked."""
    return isinstance(value, Tensor) or value != 0
