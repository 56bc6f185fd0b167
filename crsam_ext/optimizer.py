"""The optimizer: its parameter groups, options and state, and the calls that make up a step."""

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

# Attributes that copies and pickles leave out; they are rebuilt on demand. (``step`` is a function that a scheduler
# sets on the instance; it refers to that instance.)
_TRANSIENT = (
    "operators", "replicas", "_flat", "_step", "_last_loss", "_combined", "_provisional", "_direction", "step",
)  # fmt: skip

# Options that pickles of earlier versions lack.
_ADDED_OPTIONS = (
    "interval", "reuse", "curvature_interval", "sync_perturbation", "shard_state", "replay_rng", "stochastic_rounding",
    "compile", "flatten",
)  # fmt: skip

# Key in the groups of an optimizer with intervals: the number of steps taken or skipped.
_STEPS = "crsam_steps"


class CRSAM(Optimizer):
    r"""Implements CR-SAM: sharpness-aware minimization with curvature regularization.

    A step computes the gradient at the weights w, and then at w + e and at w - e, where the perturbation e points along
    the first gradient and has length ``rho``. It combines the three into a regularized gradient that favors flat
    minima, and the base optimizer updates w with that gradient.

    .. math::
       \begin{aligned}
            &\rule{120mm}{0.4pt}                                                                          \\
            &\textbf{input}: \: w_0 \text{ (params)}, \: L(w) \text{ (loss)},
                \: \rho \text{ (rho)}, \: \alpha \text{ (alpha)}, \: \beta \text{ (beta)},                \\
            &\hspace{13mm} r \text{ (max regularizer ratio)}, \: c \text{ (max grad norm)}                \\
            &\rule{120mm}{0.4pt}                                                                          \\
            &\textbf{for} \: t = 1 \: \textbf{to} \: \ldots \: \textbf{do}                                \\
            &\hspace{5mm} w \leftarrow w_{t-1}, \quad g_0 \leftarrow \nabla L(w)                          \\
            &\hspace{5mm} \textbf{if} \: \textit{adaptive}                                                \\
            &\hspace{10mm} e \leftarrow \rho \, w^2 g_0 \, / \, (\| \, |w| \, g_0 \| + 10^{-12})          \\
            &\hspace{5mm} \textbf{else}                                                                   \\
            &\hspace{10mm} e \leftarrow \rho \, g_0 \, / \, (\| g_0 \| + 10^{-12})                        \\
            &\hspace{5mm} g_+ \leftarrow \nabla L(w + e), \quad g_- \leftarrow \nabla L(w - e)            \\
            &\hspace{5mm} d_1 \leftarrow g_+ - g_-, \quad d_2 \leftarrow g_+ + g_- - 2 g_0                \\
            &\hspace{5mm} \textbf{if} \: \textit{regularizer} = \text{"log"}                              \\
            &\hspace{10mm} \kappa \leftarrow L(w + e) + L(w - e) - 2 L(w), \quad
                \sigma \leftarrow L(w + e) - L(w - e)                                                     \\
            &\hspace{10mm} a \leftarrow \alpha / \kappa \: \textbf{if} \: \kappa > 0 \: \textbf{else} \: 0, \quad
                b \leftarrow \beta / \sigma \: \textbf{if} \: \sigma > 0 \: \textbf{else} \: 0            \\
            &\hspace{5mm} \textbf{else}                                                                   \\
            &\hspace{10mm} a \leftarrow \alpha, \quad b \leftarrow \beta                                  \\
            &\hspace{5mm} s \leftarrow \min(1, \: r \, \| g_+ \| \, / \, \| a \, d_2 + b \, d_1 \|)       \\
            &\hspace{5mm} \hat g \leftarrow g_+ + s \, (a \, d_2 + b \, d_1)                              \\
            &\hspace{5mm} \textbf{if} \: c \neq \text{None}                                               \\
            &\hspace{10mm} \hat g \leftarrow \min(1, \: c \, / \, (\| \hat g \| + 10^{-6})) \: \hat g     \\
            &\hspace{5mm} w_t \leftarrow \text{base optimizer}(w, \hat g)                                 \\
            &\rule{120mm}{0.4pt}                                                                          \\
            &\textbf{return} \: w_t                                                                       \\
            &\rule{120mm}{0.4pt}                                                                          \\
       \end{aligned}

    Norms are taken over all parameters of all groups. In a group with ``maximize=True``, the sign of e is reversed.
    ``alpha = beta = 0`` is SAM (Foret et al., ICLR 2021), which takes two passes instead of three; ``rho = 0`` is the
    base optimizer, which takes one. A step with a NaN or Inf in a gradient is skipped: it changes neither parameters
    nor state. CR-SAM is described in `CR-SAM: Curvature Regularized Sharpness-Aware Minimization
    <https://arxiv.org/abs/2312.13555>`_ (Wu, Luo, Wunsch, AAAI 2024).

    Args:
        params: parameters, named parameters, or dictionaries of parameter groups, as for any torch optimizer. A group
            may set its own ``rho``, ``alpha``, ``beta`` and ``adaptive``.
        base_optimizer: class or instance of :class:`torch.optim.Optimizer` (default: SGD). SGD, Adam and AdamW (without
            ``amsgrad``) run fused on flat state; any other optimizer takes its own step, with :math:`\hat g` in
            ``p.grad``. If the base optimizer and CRSAM have an option of the same name (RMSprop has an ``alpha``), the
            keyword argument sets that of CRSAM. To set that of the base optimizer, pass an instance.
        rho: radius of the perturbation, finite and at least 0 (default: 0.1). A larger value favors flatter minima. On
            CIFAR-10, the papers use 0.05 for SAM and 0.5 for ASAM.
        alpha: weight of the curvature term, finite and at least 0 (default: 0.1 with ``regularizer="linear"``, 0.01
            with ``"log"``). A larger value penalizes curvature more.
        beta: weight of the gradient-norm term, finite and at least 0 (default: 0.01). A larger value penalizes the norm
            of the gradient more.
        gamma: another name for ``alpha``, as in the authors' code (default: None). ``gamma`` in a group also sets
            alpha, unless the base optimizer has an option ``gamma``.
        regularizer: "linear" (default) uses alpha and beta as weights, like the authors' code. "log" is the regularizer
            of the paper, :math:`\alpha \log \mathrm{Tr} \nabla^2 L + \beta \log \|\nabla L\|`: it divides alpha by
            kappa and beta by sigma, see :meth:`crsam_ext.ops.Operators.coefficients`.
        estimator: how the log regularizer computes kappa and sigma. "gradient" (default) uses inner products of e with
            the gradients: it needs no losses, and its rounding error grows as 1/rho. "loss" uses the losses, as in the
            algorithm above; its rounding error grows as 1/rho². On three small networks with batches of 128
            (``benchmarks/finite_differences.py``), kappa from gradients is within 10 % of the exact value for rho from
            0.01 to 0.1, in float32 and under bfloat16 autocast. The same holds for kappa from losses for rho from 0.01
            to 0.2 in float32, but under bfloat16 autocast only near 0.2.
        adaptive: if True, perturb each weight in proportion to its magnitude, as ASAM does (Kwon et al., ICML 2021)
            (default: False).
        max_grad_norm: clip :math:`\hat g` to this norm, greater than 0; None does not clip (default: None).
        max_regularizer_ratio: limit the norm of :math:`a \, d_2 + b \, d_1` to this multiple of :math:`\|g_+\|`, at
            least 0 (default: 1 with ``regularizer="log"``, whose weights grow without bound as kappa goes to 0;
            infinity with ``"linear"``).
        interval: perturb only in every ``interval``-th step, beginning with the first, an integer of at least 1
            (default: 1). The other steps take one pass and use :math:`\hat g = g_0`, like the base optimizer alone.
        reuse: with ``interval`` greater than 1, add the sharpness direction of the last perturbed step to the gradient
            of the steps between (default: False): :math:`\hat g = g_0 + \omega h`, where :math:`h = \hat g - g_0` comes
            from j steps ago and :math:`\omega = \min(0.9^j, \|g_0\| / 2\|h\|)`. The state holds h, which takes the
            memory of one more gradient. See :mod:`crsam_ext.reuse`.
        curvature_interval: among the steps that perturb, compute the gradient at w - e only in every
            ``curvature_interval``-th, an integer of at least 1 (default: 1). The others take two passes and use
            :math:`d_2` of the last step that took three; the state holds it. It must be 1 with ``estimator="loss"``,
            which needs the loss at w - e.
        model: the model whose parameters are optimized (default: None). If given, buffers that the forward changes
            (running statistics of batch norm, quantization observers, vectors of spectral norm) are updated by the
            first pass only. In ``step(closure)`` every pass starts from the buffers as they were before the step; with
            :meth:`first_step`, :meth:`second_step` and :meth:`third_step`, the later passes start from those that the
            first pass left. If the model is a DistributedDataParallel, gradients are reduced once per step, see
            :mod:`crsam_ext.replicas`. The attribute :attr:`model` can also be set later, before the first step.
        sync_perturbation: with a DistributedDataParallel as ``model``: False (default) perturbs each rank along the
            gradient of its own batch. True perturbs all ranks along the gradient of the global batch, which costs a
            second all-reduce per step. A process group averages the gradient at w over its ranks only, for instance
            those of one node.
        shard_state: with a DistributedDataParallel as ``model`` and SGD, Adam or AdamW: shard the state of the base
            optimizer over the ranks (default: False). Each rank updates its shard of the parameters and sends it to the
            others; the resulting parameters are bitwise the same. See :mod:`crsam_ext.sharded_state`.
        replay_rng: if True (default), every pass of ``step(closure)`` draws the same random numbers, for instance the
            same dropout masks, from the global generators of torch, Python's ``random`` and ``numpy.random``. See
            :class:`crsam_ext.noise.RandomState`.
        stochastic_rounding: if True, round perturbed float16 and bfloat16 parameters up or down at random, so that the
            model moves by e on average (default: False). With rounding to nearest, most bfloat16 parameters do not move
            at all. w itself is kept in float32 and is always rounded to nearest.
        backend: "cuda", "triton" or "torch"; "auto" (default) takes the first of these that is available on the devices
            of the parameters.
        compile: if True, run the torch backend through ``torch.compile`` (default: False).
        flatten: if True (default), move parameters into flat buffers. A parameter that does not own its memory alone
            stays where it is: one whose memory is shared, memory-mapped, part of a larger tensor, or held by another
            tensor. If False, all parameters stay.
        **base_kwargs: arguments of the base optimizer, such as ``lr``, ``momentum`` and ``weight_decay``.

    Raises:
        ValueError: if an argument is out of range, if two arguments exclude each other, or if ``model`` is a DeepSpeed
            engine or a FullyShardedDataParallel.
        TypeError: if an argument is unknown or has the wrong type, or if ZeroRedundancyOptimizer or Horovod constructs
            CRSAM.
        RuntimeError: if ``backend`` is unavailable.

    Example::

        import torch
        from crsam_ext import CRSAM

        model = torch.nn.Linear(20, 5)
        x, y = torch.randn(64, 20), torch.randint(5, (64,))
        optimizer = CRSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, model=model)

        def closure():
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)  # calls the closure at w, w + e and w - e; returns the loss at w

    Note:
        The first step moves the parameters into flat buffers (:mod:`crsam_ext.flat`). Set ``flatten=False`` if the
        memory of a parameter is referred to by something that torch does not know of, such as a raw pointer or another
        process, or if the storage of a parameter is resized later.

    Note:
        Between steps, ``p.grad`` holds :math:`g_0`. A base optimizer other than SGD, Adam and AdamW costs one device
        synchronization per step, because the host must know whether the step is skipped.
    """

    operators: Operators
    _flat: FlatParameters | None  # the flat buffers; None before the first step
    # A step is in progress from step(closure) or first_step() until the update or combine(). _step then holds it, and
    # _step.collected tells which pass is due. _combined is set from combine() until the next step begins.
    _step: Step | None
    _combined: bool
    _last_loss: Any  # loss given to the last first/second/third_step call; step() has no argument for it
    _step_supports_amp_scaling = True  # torch's GradScaler then leaves unscaling and skipping to the step

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
                "ZeroRedundancyOptimizer(params, CRSAM) would perturb each rank's parameters separately: "
                "use CRSAM(params, ZeroRedundancyOptimizer(params, SGD))"
            )
        if type(self).__module__.startswith("horovod"):
            raise TypeError(
                "Horovod expects one backward per step, but CRSAM takes several: use DistributedDataParallel"
            )
        _check_choice("regularizer", regularizer, tuple(REGULARIZERS))
        _check_choice("estimator", estimator, ("gradient", "loss"))
        if gamma is not None and alpha is not None:
            raise TypeError("gamma is another name of alpha: give only one of them")
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
            raise ValueError(
                'curvature_interval > 1 leaves out losses that estimator="loss" needs: use estimator="gradient"'
            )
        if reuse and interval == 1:
            raise ValueError("reuse=True applies to the steps between two perturbed steps: set interval to 2 or more")
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
        backends.load(backend, compile=compile)  # fail early if the backend is unavailable

        self._own = {"rho": rho, "alpha": alpha, "beta": 0.01 if beta is None else beta, "adaptive": adaptive}
        base, own_groups = make_base(params, base_optimizer, base_kwargs, self._own.keys())
        self._separate: SeparateGroups | None = SeparateGroups([], base, self._own)
        super().__init__(own_groups or base.param_groups, {**base.defaults, **self._own})
        self.base_optimizer = base
        if own_groups is None:
            self._separate = None
        self._check_sharing_state(self._update())
        self._attach()

    # Attributes ------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of each parameter: the base optimizer's own ``state``."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if hasattr(self, "base_optimizer"):  # torch's constructor sets an empty state before there is a base
            self.base_optimizer.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the base optimizer, with CRSAM's options added.

        If the base optimizer has an option of the same name, CRSAM keeps groups of its own. With ``interval`` or
        ``curvature_interval`` greater than 1, each group has an entry "crsam_steps": the number of steps so far.
        """
        if self._separate is not None:
            return self._counting(self._separate.groups)
        groups = self.base_optimizer.param_groups
        for group in groups:
            if not group.keys() >= self._own.keys():  # added through the base optimizer
                group.update({**self._own, **group})
        return self._counting(groups)

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._separate is not None:
            self._separate.groups = groups
        else:
            self.base_optimizer.param_groups = groups

    def _counting(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return ``groups``, with the step count written into each if an interval greater than 1 uses it."""
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
        """The model whose buffers and replicas are handled.

        It can be set until the first step, for example after the model was wrapped.

        Raises:
            RuntimeError: if it is set after the first step.
            ValueError: if it is a DeepSpeed engine or a FullyShardedDataParallel, or if it is not a
                DistributedDataParallel and ``sync_perturbation`` or ``shard_state`` needs one.
        """
        return self._model

    @model.setter
    def model(self, model: torch.nn.Module | None) -> None:
        if self.stats.steps or getattr(self, "_step", None) is not None:
            raise RuntimeError("model can only be set before the first step")
        refusal = _refusal(model)
        if refusal is not None:
            raise ValueError(refusal)
        self._model = model
        self.model_buffers = None if model is None else ModelBuffers(model)
        self.replicas = self._replicas_of(model)
        if self.replicas is None and self.sync_perturbation is not False:
            raise ValueError("sync_perturbation needs several ranks: pass a DistributedDataParallel as model=")
        if self.replicas is None and self.shard_state:
            raise ValueError(
                "shard_state=True needs the ranks of a DistributedDataParallel: pass one as model= (fully_shard "
                "already shards the state along with the parameters)"
            )

    def _replicas_of(self, model: torch.nn.Module | None) -> Replicas | None:
        inner = compiled_from(model)
        return Replicas(inner, self.sync_perturbation) if isinstance(inner, DistributedDataParallel) else None

    def follow_wrapper(self, wrapper: Any) -> None:
        """Replace ``model`` by ``wrapper`` if ``wrapper.module`` is ``model``, because trainers wrap models late.

        Otherwise this is a no-op. Errors as for :attr:`model`.
        """
        if self._model is not None and getattr(wrapper, "module", None) is self._model:
            self.model = wrapper

    @property
    def passes(self) -> int:
        """Number of passes of the step in progress or, between steps, of the next one.

        It is 3, or 2 if alpha = beta = 0, or 1 if rho = 0. With ``interval`` and ``curvature_interval`` it varies from
        step to step.
        """
        return self._calls if self._perturbs and self.stats.steps % self.interval == 0 else 1

    @property
    def pass_index(self) -> int:
        """Index of the pass that is running or comes next: 0 at w, 1 at w + e, 2 at w - e. Log metrics in pass 0."""
        return 0 if self._step is None else self._step.collected

    @property
    def _calls(self) -> int:
        """How many of first_step, second_step and third_step make up a step."""
        return PASSES if self._curved and self.stats.steps // self.interval % self.curvature_interval == 0 else 2

    @property
    def _perturbs(self) -> bool:
        return any(_nonzero(group["rho"]) for group in self.param_groups)

    @property
    def _curved(self) -> bool:
        return any(_nonzero(group[name]) for group in self.param_groups for name in ("alpha", "beta"))

    def capture_blocker(self) -> str | None:
        """Return why steps cannot be captured in a CUDA graph, or None if they can."""
        devices = sorted(map(str, self._devices()))
        if len(devices) != 1 or not devices[0].startswith("cuda"):
            return f"the parameters are on {', '.join(devices)}, not on one CUDA device"
        if in_several_processes() or self._is_sharded:
            return "gradients or norms are reduced over several processes"
        if self.backend not in ("cuda", "triton"):
            return f"backend {self.backend!r} reads numbers on the host; use backend cuda or triton"
        if not self._update().native:
            return f"the host decides whether {type(self.base_optimizer).__name__} takes its step"
        return None

    @property
    def in_place(self) -> bool:
        """Whether parameters and state are still in the memory where the last step left them."""
        return self._flat is not None and self._flat.matches(self.param_groups, self.state, self._update())

    @property
    def state_is_complete(self) -> bool:
        """Whether ``state`` holds everything that the last step used."""
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
        """Add a group, as with any torch optimizer. It may set rho, alpha (or gamma), beta and adaptive.

        Raises:
            ValueError: if rho, alpha or beta is negative or not finite, or if a parameter is complex, not floating
                point, expanded, or not a plain tensor.
        """
        if isinstance(param_group, dict):
            if "gamma" in param_group and "gamma" not in self.defaults:
                param_group["alpha"] = param_group.pop("gamma")
            for name, default in self._own.items():
                value = param_group.setdefault(name, default)
                if name != "adaptive" and not isinstance(value, Tensor) and not 0 <= value < math.inf:
                    raise ValueError(f"{name} must be finite and at least 0, but is {value}")
        super().add_param_group(param_group)
        gathered = gathered_by_fully_shard()
        try:
            for param in param_group["params"]:
                if id(param) in gathered:
                    raise ValueError(
                        f"a parameter of shape {tuple(param.shape)} was gathered by fully_shard for a forward and "
                        "will be freed: call model.reshard(), then take model.parameters() again"
                    )
                if param.requires_grad:
                    check_parameter(param)
                if is_sharded(param) and self.stochastic_rounding:
                    raise ValueError(
                        "stochastic_rounding=True does not apply to sharded parameters, which are rounded when they "
                        "are gathered: keep param_dtype=None in MixedPrecisionPolicy, and use torch.autocast"
                    )
        except ValueError:
            self.param_groups.pop()  # a rejected group must not remain registered
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

        An exception in the closure propagates, after the parameters have been restored to w, bit for bit.

        Args:
            closure: computes the loss of the batch, calls ``backward()`` on it and returns it. Every pass clears the
                gradients and calls the closure once, at w, w + e and w - e, with the same random numbers. The closure
                may return anything, but ``estimator="loss"`` needs a loss: a tensor of one element or a number. A list
                of closures accumulates the gradients of micro-batches: every pass calls all of them, and either each
                returns a loss or each returns None. Without a closure, finish the step that ``first_step`` or
                ``combine`` began.
            parallel: the model. The gradients at w + e and w - e are then computed together, by ``torch.func.vmap``,
                which doubles the memory of activations. A step of one or two passes is not affected. The closure must
                return the loss without calling ``backward()``. Hooks on gradients are not called in these two passes.
                With ``replay_rng=True``, the loss must not draw random numbers, because ``vmap`` would draw new ones.
            sync_perturbation: applies to a list of closures. If True, all micro-batches share the perturbation along
                the sum of their gradients. If False, each has its own (m-sharpness with the micro-batch as m, Foret et
                al., ICLR 2021, section 4.1), and their regularized gradients are added.
            grad_scaling: two 0-dim tensors, which :class:`crsam_ext.GradScaler` passes: the scale of the losses, and a
                tensor that is set to 1 if the step is skipped and to 0 otherwise.
            noise: replays the random numbers; by default those of the global generators. GraphedStep passes its own.
        Returns:
            What the closure returned at w, with a tensor detached; the sum of the losses for a list of closures; None
            without a closure.
        Raises:
            RuntimeError: if no gradient was computed, a gradient is sparse, a step is already in progress, or torch's
                own GradScaler was given a closure; with ``parallel``, if the loss draws random numbers.
            TypeError: if ``parallel`` is not a module, is a DistributedDataParallel, or is combined with a list of
                closures; if a closure in a list returns something other than a loss.
            ValueError: if ``estimator="loss"`` needs a loss and the closure returned none.
        """
        if closure is None:
            return self._finish(grad_scaling)
        if self._step is not None:
            raise RuntimeError(f"step(closure) called in the middle of a step: {self._due()}")
        if hasattr(self, "found_inf"):
            raise RuntimeError("torch's GradScaler does not support closures: use crsam_ext.GradScaler")
        loss_of: Any = closure
        if parallel is not None:
            if in_several_processes() or self._is_sharded:
                raise TypeError("parallel= does not reduce gradients over processes: call step() without parallel=")
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
        """Take all passes of a step that has begun, and return what the closure returned at w.

        Args:
            step: the step.
            closure: computes gradients.
            noise: replays the random numbers; by default those of the global generators.
            parallel: the model and the closure that returns the loss, if w + e and w - e are evaluated together.
        """
        passes = step.passes
        if passes == 1 or not self.replay_rng:
            noise = None
        elif noise is None:
            noise = SharedNoise(self._devices() if self._flat is None else self._flat.devices())
        if passes > 1 and self.model_buffers is not None:
            self.model_buffers.begin()

        def run() -> Any:  # the value may hold a graph, so drop it before the next pass
            with self.no_sync():
                value = _with_gradients(closure)
            step.collect(value, keep=False)
            return value

        result = None
        for index in range(passes):
            if index == 0:
                self._clear_gradients()  # later passes find them cleared by collect()
                result = run()
            else:
                if noise is not None:
                    noise.repeat()
                run()
            if parallel is not None and passes == PASSES:
                if noise is not None and noise.drawn:
                    raise RuntimeError(
                        "the loss draws random numbers (dropout?), and vmap would draw different ones: "
                        "call step() without parallel=, or set replay_rng=False"
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
        """Take a step that perturbs each closure separately and adds the regularized gradients."""
        if callable(closures):
            raise TypeError("sync_perturbation=False needs a list of closures, but was given a single closure")
        if self.replicas is not None or self.curvature_interval > 1 or self.reuse:
            raise ValueError(
                "sync_perturbation=False cannot be combined with DistributedDataParallel, curvature_interval and reuse"
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
        """Save w and move the parameters to w + e, after ``backward()`` at w.

        Args:
            zero_grad: if True, clear the gradients. If False, they stay in ``p.grad``, which costs a copy.
            loss: the loss of this pass; required with ``regularizer="log", estimator="loss"``.
        Raises:
            RuntimeError: if another call is due, if no gradient was computed, or if ``interval`` gives this step a
                single pass. Call only ``step()`` in such a step, see :attr:`passes`.
            ValueError: if the loss is required and missing.
        """
        if self._step is not None:
            raise RuntimeError(f"first_step() called in the middle of a step: {self._due()}")
        if self.stats.steps % self.interval:
            raise RuntimeError(
                f"with interval={self.interval} this step has one pass: when optimizer.passes is 1, call step() "
                "instead of first_step()"
            )
        with self._restoring():
            self._begin(self._calls)
            self._call(zero_grad, loss)

    def second_step(self, zero_grad: bool = False, loss: Any = None) -> None:
        """Move the parameters to w - e or, in a step of two passes, update w, after ``backward()`` at w + e.

        Arguments and errors are those of :meth:`first_step`.
        """
        self._require("second_step", 1)
        self._call(zero_grad, loss)

    def third_step(self, zero_grad: bool = False, loss: Any = None) -> None:
        """Update w, after ``backward()`` at w - e. Arguments and errors are those of :meth:`first_step`."""
        self._require("third_step", 2)
        self._call(zero_grad, loss)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Return a context manager for the forward and backward of a pass, so that only the last pass is reduced.

        Use it with :meth:`first_step`, :meth:`second_step` and :meth:`third_step` if ``model`` is a
        DistributedDataParallel. It is the model's own ``no_sync()`` in all passes but the last; in the last pass, or
        without such a model, it is a no-op. If it is left out, the gradients of the earlier passes still stay local,
        but DDP copies them needlessly.

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
        """Return how the gradients of the current or next pass are treated, and the step in progress, if any."""
        if self._step is not None:
            return self._step.kind, self._step
        if self.replicas is None:
            return Pass.LOCAL, None
        passes = self.passes
        keeps = self._kept_difference() is not None or self._kept_direction(passes) is not None
        return self.replicas.kind(0, passes, self._settings().weights_known(passes, keeps)), None

    def _locally(self) -> AbstractContextManager[Any]:
        """Return the context manager for every micro-batch of a pass but the last."""
        return nullcontext() if self.replicas is None else self.replicas.ddp.no_sync()

    def check_replicas(self) -> None:
        """Check that all ranks hold bitwise equal parameters, with one all-reduce of their checksums.

        This compares the ranks of the DistributedDataParallel that is ``model``, or all ranks without one. The shards
        of a DTensor are compared over the ranks that hold the same shard. With one process it is a no-op.

        Raises:
            RuntimeError: on all ranks, if a parameter differs. The message names the first one.
        """
        if not in_several_processes():
            return
        params = [param for group in self.param_groups for param in group["params"]]
        names = [name for group in self.param_groups for name in group.get("param_names", [])]
        if len(names) != len(params):
            names = [f"parameter {index} of shape {tuple(param.shape)}" for index, param in enumerate(params)]
        check_equal(params, names, None if self.replicas is None else self.replicas.group)

    def give_loss(self, loss: Any) -> None:
        """Set the loss of the last pass, for a step that ``step()`` finishes: it has no argument for a loss."""
        self._last_loss = loss

    @torch.no_grad()
    def combine(self, loss: Any = None, grad_scale: Tensor | float | None = None) -> None:
        r"""Restore w and write :math:`\hat g` into ``p.grad``, after ``backward()`` in the last pass.

        Call it in place of the last of :meth:`first_step`, :meth:`second_step` and :meth:`third_step`, and then
        ``step()``. In between, the gradient can be clipped, inspected or unscaled like any other gradient.

        Args:
            loss: the loss of this pass.
            grad_scale: the loss scale, if the losses were scaled before ``backward()``. :math:`\hat g` remains scaled.
                Only the log regularizer needs it, because its kappa and sigma have the units of the loss.
        Raises:
            RuntimeError: if another call is due, or if no gradient was computed.
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
        """Abandon the step in progress, if any, and restore the parameters to w, bit for bit."""
        if self._step is not None:
            self._step.restore()
            self._step = None

    def _begin(
        self, passes: int, combined: bool = False, num_points: int = 1, counted: bool = True, is_sum: bool = False
    ) -> Step:
        """Begin a step; the arguments are those of :class:`crsam_ext.step.Step`."""
        self._combined = False
        if self._provisional.drop(self.state) and self._flat is not None:
            self._flat.recount(self.state)
        self._sync()
        params = (param for group in self.param_groups for param in group["params"])
        if not any(param.requires_grad or param.grad is not None for param in params):
            raise RuntimeError("no parameter requires a gradient, so there is nothing to optimize")
        replicas = None if combined else self.replicas
        if replicas is None and passes == PASSES and self._settings().needs_losses and in_several_processes():
            raise ValueError(
                'estimator="loss" knows only the losses of this rank: use estimator="gradient", or give the '
                "DistributedDataParallel as model= to average the losses over its ranks"
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
        """Return the direction h if a step with this number of passes writes or reads it, else None."""
        between = self.stats.steps % self.interval > 0
        return self._direction if self.reuse and (passes > 1) != between and self._perturbs else None

    def _begin_direction(self, passes: int) -> SharpnessDirection | None:
        direction, age = self._kept_direction(passes), self.stats.steps % self.interval
        if direction is not None:
            direction.begin_step(age)
        elif self.reuse and age == 0:  # a perturbation is due but rho is 0: an old h must not count as new
            for state in self.state.values():
                if DIRECTION in state:
                    state[DIRECTION].zero_()
        return direction

    def prepare_replay(self, device: torch.device) -> None:
        """Copy the numbers that only the host knows to the device, before a CUDA graph captures or replays a step."""
        if self.reuse:
            self._direction.prepare_replay(self.stats.steps % self.interval, device)

    def _signature(self, passes: int) -> dict[str, Any]:
        """Return everything about a step that must be the same on all ranks of the model."""
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
        """Find parameters and state in their current memory, and the update with the current options."""
        update, flat = self._update(), self._flat
        if flat is not None:
            num_points = max(num_points, flat.num_points)
        if flat is None or flat.num_points < num_points or not flat.matches(self.param_groups, self.state, update):
            operators = self._load_operators()
            if operators.name != self.operators.name:  # the parameters moved to another type of device
                self.operators = operators
            self._check_sharing_state(update)
            moved = {} if flat is None else flat.moved()
            self._flat = flat = None  # drop its references: they would make parameters count as shared
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
                raise RuntimeError("no parameter requires a gradient, so there is nothing to optimize")
            if flat.is_sharded and self.replicas is not None:
                raise RuntimeError(
                    "DistributedDataParallel has parameters that are DTensors: use fully_shard on a two-dimensional "
                    "mesh of replicas and shards instead"
                )
            self._flat = flat
        flat.begin_step()
        return Located(flat, update, self.operators, self.param_groups, self.state)

    def _check_sharing_state(self, update: Update) -> None:
        """Raise ValueError if the state is to be sharded and the base optimizer updates it itself."""
        if self.shard_state and not update.native:
            name = type(self.base_optimizer).__name__
            raise ValueError(
                "shard_state=True supports only SGD, Adam and AdamW (without amsgrad): for "
                f"{name}, use CRSAM(params, ZeroRedundancyOptimizer(params, {name}))"
            )

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """Restore the parameters if the body raises an exception."""
        try:
            yield
        except BaseException as error:
            self.restore()
            if self._flat is not None and self._flat.is_gathered and hasattr(error, "add_note"):  # needs Python 3.11
                error.add_note(
                    "CRSAM has restored the parameters. After an exception in a forward or backward, fully_shard needs "
                    "model.reset_iter_state() before the next forward."
                )
            raise

    @torch.no_grad()
    def _call(self, zero_grad: bool, loss: Any) -> None:
        step = self._step
        assert step is not None
        if step.collected < step.passes - 1:
            with self._restoring():
                step.collect(loss, keep=not zero_grad)
                # Between calls, a GradScaler checks only the gradients of the last pass.
                step.move(show_overflow=True)
        else:
            self.give_loss(loss)
            self.step()  # the public method, because hooks and schedulers wrap it
            if zero_grad:
                self._clear_gradients()

    def _finish(self, grad_scaling: tuple[Tensor, Tensor] | None) -> None:
        """Collect the last pass of a step made of calls, and update w."""
        if self._step is None:
            if not self._combined and (self.passes > 1 or self._is_stateless) and self._enters_state():
                self._enter_state()
                return
            if not self._combined and self.passes > 1:
                raise RuntimeError("step() without a closure only finishes a step: call first_step(), or step(closure)")
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
                    "torch's GradScaler checks the gradients of each rank before they are reduced: "
                    "use crsam_ext.GradScaler"
                )
            if found_inf is not None and grad_scale is None and step.passes > 1:
                raise RuntimeError(
                    "unscale_() was called in the middle of a step, while its earlier gradients are still scaled: "
                    "call combine() before unscale_(), or clip with max_grad_norm"
                )
            step.collect(loss, keep=False)
            self._end(step, grad_scale, found_inf)

    @property
    def _is_stateless(self) -> bool:
        """Whether the optimizer never has any state, so an empty state does not mean that no step was taken."""
        update = self._update()
        return not self.state and update.native and not any(update.buffers or ())

    def _enters_state(self) -> bool:
        """Whether ``step()`` must only create the state: torch.distributed.checkpoint calls it with an lr of 0."""
        rates = [group.get("lr", 1.0) for group in self.param_groups]
        on_host = not any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates)
        params = (param for group in self.param_groups for param in group["params"])
        return on_host and not any(map(float, rates)) and any(param.grad is not None for param in params)

    def _enter_state(self) -> None:
        """Create the initial state of all parameters that have a gradient; change nothing else."""
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
        """Update w with the gradients that the step has collected, and end the step."""
        step.update(grad_scale, found_inf)
        self._step = None
        # A scheduler may be attached to the base optimizer, whose own step() may not have been called.
        mark_stepped(self.base_optimizer)

    def _due(self) -> str:
        assert self._step is not None
        call = ("first_step", "second_step", "third_step")[self._step.collected]
        return f"{call}() or restore() is due"

    def _require(self, call: str, collected: int) -> None:
        if self._step is None:
            sam = " (in a step of two passes, second_step() updates w)" if call == "third_step" else ""
            raise RuntimeError(f"{call}() called outside a step: first_step() is due{sam}")
        if self._step.collected != collected:
            raise RuntimeError(f"{call}() called out of order: {self._due()}")

    def train(self) -> None:
        """Call ``train()`` of the base optimizer, if it has one, as schedule-free optimizers do.

        In the middle of a step this is a no-op, because the step began in training mode.
        """
        if self._step is None and hasattr(self.base_optimizer, "train"):
            self._call_base("train")

    def eval(self) -> None:
        """Call ``eval()`` of the base optimizer, if it has one, as schedule-free optimizers do.

        Raises:
            RuntimeError: in the middle of a step, because ``eval()`` of the base optimizer moves the parameters.
        """
        if hasattr(self.base_optimizer, "eval"):
            if self._step is not None:
                raise RuntimeError(f"eval() called in the middle of a step: {self._due()}")
            self._call_base("eval")

    def _call_base(self, method: str) -> None:
        """Call a method of the base optimizer, and synchronize the options with it before and after."""
        self._sync()
        getattr(self.base_optimizer, method)()
        self._sync()

    def _sync(self) -> None:
        """Synchronize our groups with those of the base optimizer, if they are separate."""
        if self._separate is not None and hasattr(self, "base_optimizer"):
            self._separate.sync()

    def _update(self) -> Update:
        """Return the update of the base optimizer, with the current options of the groups."""
        return update_of(self.base_optimizer, self.param_groups, lambda: self._call_base("step"))

    def _clear_gradients(self) -> None:
        for group in self.param_groups:
            self.operators.host.clear_gradients(group["params"])

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, in the format of any torch optimizer.

        It has an extra entry "base_optimizer" if the base optimizer overrides ``state_dict``. With an interval greater
        than 1, each group has an entry "crsam_steps", the number of steps so far. The state of a parameter has a
        "second_difference" with ``curvature_interval`` greater than 1, and a "sharpness_direction" with ``reuse``.
        """
        self._enter_kept()
        result = super().state_dict()
        # Sort by parameter: ranks gather full tensors in the order of this dictionary, so it must be the same on all of
        # them. The order of insertion depends on the sizes of shards.
        order = {key: number for number, key in enumerate(k for g in result["param_groups"] for k in g["params"])}
        result["state"] = dict(sorted(result["state"].items(), key=lambda item: order.get(item[0], len(order))))
        if type(self.base_optimizer).state_dict is not Optimizer.state_dict:
            result["base_optimizer"] = self.base_optimizer.state_dict()
        return result

    def _enter_kept(self) -> None:
        """Add zeros for a missing second difference or sharpness direction to every parameter that has state.

        They are missing if the base optimizer created its state without a step of CRSAM. The state dict that a
        checkpoint is loaded into must name everything that the checkpoint contains.
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
        """Load a state dict of CRSAM, or of torch's SGD, Adam or AdamW.

        Options that are missing in the groups of ``state_dict``, such as rho, keep their values.

        Raises:
            ValueError: if the state has full tensors for parameters that are DTensors; use
                torch.distributed.checkpoint to load those.
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
        hook = self.register_load_state_dict_pre_hook(complete)  # runs last, after the user's own hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        if counts:
            self.stats.steps = counts[0]
        self._difference = SecondDifference()
        self._own_state(loaded)
        base = self.base_optimizer
        if type(base).load_state_dict is not Optimizer.load_state_dict:  # then it loads its own state
            shared = self._separate is None
            theirs = [
                {**new, **({} if shared else {k: old[k] for k in self._own if k in old})}
                for old, new in zip(base.param_groups, loaded["param_groups"], strict=True)
            ]
            base.load_state_dict(loaded.get("base_optimizer", {**loaded, "param_groups": theirs}))

    def _check_state(self, loaded: dict[str, Any]) -> None:
        """Raise ValueError if a state tensor is not placed like its parameter; called before anything is loaded."""
        if self.shard_state:  # a full state is sharded when it is loaded
            return
        native = self._update().native
        for param, name, value in self._values(loaded):
            if not value.dim() or value.shape != param.shape:
                continue
            # A wrapped optimizer may choose placements, but not full tensors, which it would mix with sharded
            # gradients.
            ours = native or name in (SECOND_DIFFERENCE, DIRECTION)
            if ours or is_sharded(param) != is_sharded(value):
                check_state(name, value, param)

    def _values(self, loaded: dict[str, Any]) -> Iterator[tuple[Tensor, str, Tensor]]:
        """Yield the tensors of a loaded state: the parameter, the name and the tensor of each."""
        for own, group in zip(self.param_groups, loaded["param_groups"], strict=False):  # torch checks lengths
            for param, key in zip(own["params"], group["params"], strict=False):
                for name, value in loaded["state"].get(key, {}).items():
                    if isinstance(value, Tensor):
                        yield param, name, value

    def _own_state(self, loaded: dict[str, Any]) -> None:
        """Copy the tensors of a state that was just loaded, so that training does not write into a checkpoint.

        torch casts floating state to the dtype of the parameter. For float16 and bfloat16 parameters, undo that: their
        state is float32.
        """
        for param, name, value in self._values(loaded):
            narrowed = has_master(param.dtype) and value.is_floating_point()
            if narrowed or self.state[param].get(name) is value:
                self.state[param][name] = value.detach().to(param.device, copy=True)

    def _attach(self) -> None:
        """Connect to the base optimizer: its ``load_state_dict`` may also be called directly."""
        loaded: dict[str, Any] = {}

        def complete(base: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self.restore()
            loaded.clear()
            loaded.update(completed(given, base.param_groups))
            self._check_state(loaded)
            return loaded

        if type(self.base_optimizer).load_state_dict is Optimizer.load_state_dict:  # an override may not call hooks
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
        # torch's __getstate__ of the base optimizer leaves out attributes that its class has added.
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
        # Pickles of earlier versions contain attributes that are now properties, and lack attributes added since.
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
    """Return why CRSAM cannot train a model, or None if it can."""
    home = type(model).__module__.partition(".")[0]
    if home == "deepspeed":
        return "DeepSpeed's engine takes no closure, and its step frees the gradients: use DistributedDataParallel"
    if type(model).__name__ == "FullyShardedDataParallel":
        return "FullyShardedDataParallel moves the parameters in every pass: use torch.distributed.fsdp.fully_shard"
    return None


def _with_gradients(closure: Callable[[], Any]) -> Any:
    """Call the closure and return its value. A tensor is detached, which frees its graph before the next pass."""
    with torch.enable_grad():
        value = closure()
    return value.detach() if isinstance(value, Tensor) else value


def _accumulating(
    closures: Callable[[], Any] | Sequence[Callable[[], Any]], locally: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], Any]:
    """Return a closure that calls ``closures``, all but the last within ``locally()``, and returns the total loss."""
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
                    "a closure in a list must return its loss (a tensor of one element or a number) or None, but "
                    f"returned a {type(loss).__name__}"
                )
            if index and (loss is None) != (total is None):
                raise TypeError("in a list of closures, all must return a loss, or all None")
            loss = loss.detach() if isinstance(loss, Tensor) else loss
            total = loss if total is None else total + loss
        return total

    return closure


def _with_backward(closure: Any, model: Any) -> Callable[[], Any]:
    """Return a closure that also calls ``backward()`` on the loss that ``closure`` returns."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(f"parallel= takes the model itself, but was given a {type(model).__name__}")
    if not callable(closure):
        raise TypeError("with parallel=, step() takes one closure, not a list")

    def with_backward() -> Any:
        loss = closure()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            raise TypeError("with parallel=, the closure must return the loss and leave backward() to the step")
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
    """Whether a hyperparameter may be nonzero. A tensor counts as nonzero, because reading it would synchronize."""
    return isinstance(value, Tensor) or value != 0
