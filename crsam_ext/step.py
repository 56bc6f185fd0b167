"""One step: its passes, the perturbations between them, and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .flat import FlatParameters, Gradients, Plan
from .model_buffers import ModelBuffers
from .ops import COUNTERS, GRAM, PASSES, REGULARIZERS, Coefficients, Direction, Operators, pass_weights, scalar
from .precision import has_master
from .replicas import Pass, Replicas, parts, room
from .reuse import SharpnessDirection
from .second_difference import SecondDifference
from .shards import flattened
from .stats import Stats
from .updates import Update
from .updates.wrapped import combine

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

    from .sharded_state import OwnPlan

Rows = list[list[Sequence[Tensor]]]  # gradients, by bucket, pass and row

__all__ = ["Located", "Step", "StepSettings", "is_loss"]


@dataclass(frozen=True)
class StepSettings:
    """The options of a step that are not per group; see :class:`crsam_ext.CRSAM`."""

    regularizer: str
    estimator: str
    max_grad_norm: float | None
    max_regularizer_ratio: float
    stochastic_rounding: bool

    @property
    def needs_losses(self) -> bool:
        """Whether a step of three passes needs the losses of the passes."""
        return self.measures and self.estimator == "loss"

    @property
    def measures(self) -> bool:
        """Whether the coefficients a and b depend on kappa and sigma."""
        return REGULARIZERS[self.regularizer].measures

    @property
    def caps(self) -> bool:
        """Whether the norm of the regularizer's gradient is capped."""
        return self.max_regularizer_ratio < math.inf

    def weights_known(self, passes: int, keeps: bool) -> bool:
        """Whether the weights of the passes in the regularized gradient are known before the last pass.

        Return False if they depend on all gradients, or if the step ``keeps`` a second difference or a direction, which
        needs all gradients.
        """
        if keeps:
            return False
        return passes < PASSES or not (self.measures or self.caps)


class Located(NamedTuple):
    """The objects that a step works on, as they were found after the first pass."""

    flat: FlatParameters
    update: Update
    operators: Operators
    groups: list[dict[str, Any]]
    state: MutableMapping[Tensor, Any]


class Step:
    """One step in progress. It holds the gradients of the passes so far.

    The order of calls is ``collect, move`` (to w + e), ``collect, move`` (to w - e), ``collect``, and ``update`` or
    ``combine``. With fewer passes, moves are left out. ``collect, move_apart, add, add`` evaluates w + e and w - e
    together. ``restore`` may be called at any time instead.

    Parameters and state are located when the first pass is collected, because its forward may still move them, as
    ``flatten_parameters()`` of recurrent layers does.

    Args:
        settings: the options that are not per group.
        locate: finds parameters, state and options, given how many points are evaluated together.
        stats: receives the measurements.
        model_buffers: the buffers of the model, if only the first pass may change them.
        passes: number of passes, 1 to 3.
        counted: whether the step is recorded in ``stats``. It is not if it is a part of another step, or if it finishes
            a step that :meth:`combine` has recorded.
        is_sum: whether the gradient of its one pass is a sum of regularized gradients.
        difference: the second difference that is kept between steps, if not every step takes the third pass.
        direction: the sharpness direction of the last perturbed step, if steps of one pass reuse it.
        num_points: number of points that are evaluated together.
        replicas: the replicas of the model, if gradients are reduced over them.

    Attributes:
        flat: the flat buffers of the parameters.
        losses: for each pass so far its loss, a detached tensor or a number; None if the closure returned something
            else.
        grads: for each pass so far, by bucket and slot, the gradient in the layout of its parameter.
    """

    flat: FlatParameters
    home: torch.device  # the device of the numbers that concern all parameters
    _adaptive: list[bool]
    _maximizes: list[bool]

    def __init__(
        self,
        settings: StepSettings,
        locate: Callable[[int], Located],
        stats: Stats,
        model_buffers: ModelBuffers | None,
        passes: int,
        *,
        counted: bool = True,
        is_sum: bool = False,
        difference: SecondDifference | None = None,
        direction: SharpnessDirection | None = None,
        num_points: int = 1,
        replicas: Replicas | None = None,
    ) -> None:
        self.replicas = replicas
        self._combined = False  # whether the hook of DDP has computed the regularized gradient
        self._numbers: tuple[Tensor, Tensor] | None = None  # see _hook_numbers()
        self._combined_gram: dict[int, Tensor] = {}  # by index of DDP's bucket, its part of the Gram matrix
        # [groups], the squared norm of the regularized gradient, if it was reduced or is clipped in a single pass.
        self._reduced_norm: Tensor | None = None
        self._added: list[Direction | None] = []  # for each plan, the direction added to the gradient of a single pass
        self._decided: Coefficients | None = None  # computed from all gradients before the reduction
        self.settings, self._locate, self._stats, self._model_buffers = settings, locate, stats, model_buffers
        self.passes, self.difference, self.direction, self.num_points = passes, difference, direction, num_points
        self.counted, self.is_sum = counted, is_sum
        self.losses: list[Any] = []
        self.grads: list[list[Gradients]] = []
        self._given: list[list[tuple[bool, ...]]] = []  # pass, bucket, slot: whether there is a gradient
        self._active: list[tuple[bool, ...]] = []  # bucket, slot: the participants of the plans below
        self._active_plans: list[Plan] = []
        self._gathered: dict[tuple[Any, ...], list[Sequence[Tensor]]] = {}
        self._squared_norms: list[Tensor] = []
        self._gram: Tensor | None = None
        self._scale: Tensor | None = None  # scale of the perturbation; None before the first move
        self._undo: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []  # copying the second into the first restores w
        self._written: list[Plan] = []  # plans whose mirrors may differ from their parameters

    @property
    def collected(self) -> int:
        """Number of passes collected, including an extrapolated g-."""
        return len(self.grads)

    def collect(self, loss: Any, keep: bool) -> None:
        """Take the gradients of this pass out of ``p.grad``; with ``keep``, leave a copy there."""
        if self.collected:
            self.flat.follow()
        else:
            self.flat, self._update, self.operators, self.groups, self.state = self._locate(self.num_points)
            self.host = self.operators.host
            self.home = self.flat.buckets[0].device
            self._adaptive = [bool(group["adaptive"]) for group in self.groups]
            self._maximizes = [bool(group.get("maximize")) for group in self.groups]
        index, kind = self.collected, self.kind
        self._combined = kind is Pass.COMBINED and self.replicas is not None and self.replicas.was_called()
        self.add(loss, self.flat.take_gradients(index, keep, views=self._combined))
        if self.replicas is None:
            return
        if kind is Pass.MEAN and self.replicas.owns_hook and not self.replicas.was_called():
            raise RuntimeError(
                f"the gradients of pass {index + 1} must be reduced, but its backward ran in no_sync(): use "
                "optimizer.no_sync(), which does not disable the reduction in that pass"
            )
        self.replicas.begin_pass()
        if index == 0 and kind is Pass.LOCAL and self.replicas.shares_e is not None:
            given = [g for of_bucket in self.grads[0] for g in of_bucket if g is not None]
            self.replicas.mean_of(given, self.replicas.shares_e)

    @property
    def kind(self) -> Pass:
        """How the gradients of the current or next pass are treated."""
        return self._kind_of(self.collected)

    def _kind_of(self, index: int) -> Pass:
        if self.replicas is None:
            return Pass.LOCAL
        known = self.settings.weights_known(self.passes, self.difference is not None or self.direction is not None)
        return self.replicas.kind(index, self.passes, known)

    def add(self, loss: Any, grads: list[Gradients]) -> None:
        """Add the next pass: its loss and, by bucket and slot, its gradients in the layout of the parameters."""
        index = self.collected
        given = [
            bucket.all_active if isinstance(of_bucket, self.host.Column) else tuple(g is not None for g in of_bucket)
            for bucket, of_bucket in zip(self.flat.buckets, grads, strict=True)
        ]
        if not any(map(any, given)):
            raise RuntimeError(
                f"pass {index + 1} left no gradient in any parameter: call loss.backward() in every pass. With "
                "fully_shard, create the optimizer after fully_shard() and, if a forward has run, after model.reshard()"
            )
        for earlier in self.grads:
            if any(map(self.host.share_memory, grads, earlier)):
                raise RuntimeError(
                    f"pass {index + 1} overwrote a gradient of an earlier pass, in the same memory: "
                    "leave p.grad to autograd, give each pass its own tensor, or call first_step(zero_grad=False)"
                )
        if not is_loss(loss):
            if self.passes == PASSES and self.settings.needs_losses:
                raise ValueError(
                    'estimator="loss" needs the loss of every pass, a tensor of one element or a number: '
                    "return it from the closure, or pass it as loss="
                )
            loss = None
        self.grads.append(grads)
        self._given.append(given)
        self.losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def move(self, show_overflow: bool = False) -> None:
        """Move the parameters to w + e, or from there to w - e.

        With ``show_overflow``, move to NaN instead if the last gradient has a NaN or Inf, so that the next gradient has
        one too. (An overflow in g0 always shows, because it makes e NaN or Inf.)
        """
        self.flat.check_resharded()
        adaptive, stochastic = self._adaptive, self.settings.stochastic_rounding
        plans = self._plans(self._given[0])
        rows = self._rows(plans, 0)
        sign = 1 if self._scale is None else -1
        if self._scale is None:
            for plan in plans:
                plan.pull()
            self._written += plans
            weights = [self._weights(plan, plan.live) for plan in plans]
            self._squared_norms.append(self._squared_norm(plans, rows, weights))
            rho = self._vector([group["rho"] for group in self.groups])
            self._scale = self.operators.perturbation_scale(self._squared_norms[0], rho)
        uphill = self._uphill()
        if sign < 0 and show_overflow:
            ascent = self._plans(self._given[1])
            unweighted = [plan.unweighted for plan in ascent]
            self._squared_norms.append(self._squared_norm(ascent, self._rows(ascent, 1), unweighted))
            uphill = uphill + 0.0 * self._squared_norms[1].sum()
        for plan, grads in zip(plans, rows, strict=True):
            if plan.rows:
                self.operators.perturb_(
                    plan.live, plan.saved, grads, plan.groups, uphill, adaptive, sign, self._undo, stochastic
                )
                self._wrote(plan)
        # Autocast caches low-precision copies of the weights until its outermost context exits; they are stale now.
        torch.clear_autocast_cache()
        if self._model_buffers is not None:
            self._model_buffers.rewind()

    def move_apart(self) -> dict[Tensor, Tensor]:
        """Move the parameters to w + e and write w - e beside them. Return both, [2, *shape], by parameter."""
        self.move()
        plans = self._plans(self._given[0])
        adaptive, stochastic = self._adaptive, self.settings.stochastic_rounding
        uphill, both = self._uphill(), {}
        for bucket, plan, rows, grads in zip(
            self.flat.buckets, plans, self._rows(plans, 0), self.grads[0], strict=True
        ):
            if plan.rows:
                beside = [bucket.beside(row) for row in plan.rows]
                self.operators.perturb_(beside, plan.saved, rows, plan.groups, uphill, adaptive, -1, [], stochastic)
            both.update(
                {slot.param: bucket.stacked(slot) for slot, g in zip(bucket.slots, grads, strict=True) if g is not None}
            )
        return both

    def _uphill(self) -> Tensor:
        """Return the scale of the perturbation, negative for a group that is maximized."""
        assert self._scale is not None
        if any(self._maximizes):
            return self._scale * self._vector([-1.0 if maximizes else 1.0 for maximizes in self._maximizes])
        return self._scale

    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Update w with the gradients of all passes.

        Args:
            grad_scale: 0-dim, the loss scale: the factor in all gradients.
            found_inf: 0-dim. If it is not 0, the step is skipped. It is set to 1 if the step was skipped, else to 0.
        """
        if grad_scale is not None:
            grad_scale = grad_scale.to(self.home, torch.float64, non_blocking=True)
        for bucket in self.flat.buckets:
            bucket.pull_state()
        plans, rows = self._finish(grad_scale, found_inf)
        self._return_gradients()  # may raise, so it comes before anything is written
        steps = self._counted(plans)
        c = self._coefficients(plans, rows, steps, grad_scale, found_inf, self.settings.max_grad_norm)
        self._keep(plans, c, grad_scale)
        if self._apply(plans, rows, c) and self.difference is not None:
            self.difference.publish(self.state)
        for bucket in self.flat.buckets:
            bucket.push_state()
        if found_inf is not None:
            found_inf.copy_(~c.ok, non_blocking=True)
        self.flat.forget_given()
        self._leave()
        self._record(c, grad_scale)

    def combine(self, grad_scale: Tensor | None = None) -> None:
        """Restore w and write the regularized gradient, which is still scaled by ``grad_scale``, into ``p.grad``."""
        if grad_scale is not None:
            grad_scale = grad_scale.to(self.home, torch.float64, non_blocking=True)
        for bucket in self.flat.buckets:
            bucket.pull_state()
        plans, rows = self._finish(grad_scale)
        c = self._coefficients(plans, rows, (), grad_scale)._replace(factor=None)
        self._keep(plans, c, grad_scale)
        for bucket in self.flat.buckets:
            bucket.push_state()
        self._return_gradients()
        for plan, grads in zip(plans, rows, strict=True):
            if plan.rows:
                combine(self.operators, plan, plan.saved, grads, c)
                self._wrote(plan)
                plan.scatter(grads[-1])
        self.flat.forget_given()
        self._leave()
        self._record(c, grad_scale)

    def _finish(self, grad_scale: Tensor | None, found_inf: Tensor | None = None) -> tuple[list[Plan], Rows]:
        """Return the plans and rows of a step whose passes are complete, after saving every w that will be written.

        If the regularized gradient is reduced over replicas, the rows have only that gradient.
        """
        reduces = self._reduces
        if self.passes == 2 and self.difference is not None:
            self.add(None, self.difference.descent(self.state, self.flat.buckets, self.grads, grad_scale))
        if self._combined:
            active = self._given[-1]  # parameters with a gradient on any replica
        else:
            active = [_either(masks) for masks in zip(*self._given, strict=True)]
            if reduces:
                active = self._active_anywhere(active)
        plans = self._plans(active)
        passes = range(self.collected - 1, self.collected) if self._combined else range(self.collected)
        by_pass = [self._rows(plans, index) for index in passes]
        rows = [list(of_bucket) for of_bucket in zip(*by_pass, strict=True)]
        self._save_late(active)
        if reduces:
            if not self._combined:
                rows = self._reduce(plans, rows, grad_scale, found_inf)
            self._reduced_norm = self._squared_norm(plans, [r[0] for r in rows], [plan.unweighted for plan in plans])
        return plans, rows

    @property
    def _reduces(self) -> bool:
        """Whether the regularized gradient is reduced, instead of the gradients of all passes or none."""
        return self.replicas is not None and self._kind_of(self.passes - 1) is not Pass.MEAN

    @property
    def reduces_late(self) -> bool:
        """Whether the gradient is reduced after all passes have been collected, instead of during the last one."""
        return self._reduces and self.kind is not Pass.COMBINED

    def _keep(self, plans: Sequence[Plan], c: Coefficients, grad_scale: Tensor | None) -> None:
        """Keep the second difference and the direction for later steps."""
        mean_of = None if self._reduced_norm is None or self.replicas is None else self.replicas.mean_of
        if self.passes == PASSES and self.difference is not None:
            self.difference.keep(self.state, self.flat.buckets, self.grads, c.ok, grad_scale, mean_of)
        if self.passes > 1 and self.direction is not None:
            by_pass = [self._rows(plans, index) for index in range(self.collected)]
            of_plans = list(zip(*by_pass, strict=True))
            factor = self.flat.constants((1.0,))[0] if grad_scale is None else 1 / grad_scale
            self.direction.keep(self.operators, self.flat, plans, of_plans, c.pass_weights, factor, c.ok, mean_of)

    # Over replicas ---------------------------------------------------------------------------------------------------

    def combine_bucket(self, bucket: GradBucket, factor: float) -> None:
        """Replace the gradients of the last pass by the regularized gradient, in a bucket of DistributedDataParallel.

        Args:
            bucket: a bucket that has all its gradients of the last pass.
            factor: the factor by which the regularized gradient is multiplied.
        """
        number, weights_of_passes = self._hook_numbers(factor)
        if self.passes < PASSES:
            buffer = bucket.buffer()
            buffer.mul_(number.to(buffer))
            return
        out: list[Tensor] = []
        grads: list[list[Tensor]] = [[] for _ in range(PASSES)]
        groups, saved = [], []
        laid_out: list[tuple[Tensor, Tensor]] = []
        for param, last in zip(bucket.parameters(), bucket.gradients(), strict=True):
            found = self.flat.find(param)
            if found is None:  # a parameter of another optimizer
                last.mul_(number.to(last))
                continue
            index, slot = found
            values = slot.lay_out(last)
            if values is not last:
                laid_out.append((last, values))
            earlier = (of_pass[index][slot.index] for of_pass in self.grads)
            for of_pass, g in zip(grads, [*earlier, values], strict=True):
                of_pass.append(flattened(torch.zeros_like(values) if g is None else g))
            out.append(flattened(values))
            groups.append(slot.group)
            saved.append(flattened(slot.view(self.flat.buckets[index].saved)))
        if out:
            weights = [w if self._adaptive[group] else None for w, group in zip(saved, groups, strict=True)]
            gram = self.operators.fd_combine_(out, grads, groups, len(self.groups), weights, weights_of_passes, number)
            if gram is not None:
                self._combined_gram[bucket.index()] = gram
        for last, values in laid_out:
            last.copy_(values)

    def _hook_numbers(self, factor: float) -> tuple[Tensor, Tensor]:
        """Return the factor and the weights of the passes, which are the same for all buckets of a pass."""
        if self._numbers is None:
            self._numbers = self._factor(factor), pass_weights(*self._alpha_beta())
        return self._numbers

    def _factor(self, factor: float, found_inf: Tensor | None = None) -> Tensor:
        """Return ``factor`` as a 0-dim tensor, or NaN after an overflow that the last gradients may not show."""
        number = self.flat.constants((factor,))[0]
        for norm in self._squared_norms:
            number = number + 0.0 * norm.sum()
        if found_inf is not None:
            number = number + torch.where(found_inf.to(self.home, non_blocking=True) > 0, math.nan, 0.0)
        return number

    def _active_anywhere(self, active: list[tuple[bool, ...]]) -> list[tuple[bool, ...]]:
        """Return which parameters have a gradient on any replica."""
        assert self.replicas is not None
        if not self.replicas.ddp.find_unused_parameters:
            return active
        mask = torch.tensor([a for mask in active for a in mask], dtype=torch.int32, device=self.home)
        anywhere = iter(self.replicas.max_(mask).tolist())
        return [tuple(bool(next(anywhere)) for _ in mask) for mask in active]

    def _reduce(self, plans: Sequence[Plan], rows: Rows, grad_scale: Tensor | None, found_inf: Tensor | None) -> Rows:
        """Compute the regularized gradient of each plan, and average it over the replicas."""
        replicas = self.replicas
        assert replicas is not None
        factor, complete = self._factor(1 / replicas.size, found_inf), self.collected == PASSES
        weights = pass_weights(*self._alpha_beta())
        if complete and (self.settings.measures or self.settings.caps):
            self._decided = self._decide(plans, rows, grad_scale)
            weights = self._decided.pass_weights
            factor = torch.where(self._decided.ok, factor, math.nan)
        reduced: list[list[Tensor]] = [[] for _ in plans]

        def pieces() -> Iterator[Tensor]:
            for plan, grads, of_plan in zip(plans, rows, reduced, strict=True):
                groups_of_rows, by_pass = list(plan.groups), [list(of_pass) for of_pass in grads]
                for part in parts(by_pass[-1]):
                    flat, views = room(by_pass[-1][part])
                    of_pass = [of_rows[part] for of_rows in by_pass]
                    if complete:
                        groups = groups_of_rows[part]
                        self.operators.fd_combine_(views, of_pass, groups, len(self.groups), None, weights, factor)
                    else:
                        torch._foreach_copy_(views, of_pass[-1])
                        flat.mul_(factor.to(flat))
                    of_plan.extend(views)
                    yield flat

        replicas.sum_pieces_(pieces())
        return [[of_plan] for of_plan in reduced]

    def _decide(self, plans: Sequence[Plan], rows: Rows, grad_scale: Tensor | None) -> Coefficients:
        """Compute the weights of the regularized gradient from averages over the replicas, so that all agree on them.

        kappa and sigma are means over the replicas, and the norms in the cap are root mean squares.
        """
        replicas, scale = self.replicas, self._scale
        assert replicas is not None
        assert scale is not None
        gram = self._gram = self._gram_of(plans, rows)
        numbers = gram.clone()
        numbers[:, 6:] *= scale[:, None]  # each replica has its own e
        losses = self._losses() if self.settings.needs_losses else ()
        numbers = replicas.mean_(torch.cat([numbers.flatten(), *(x.reshape(1) for x in losses)]))
        means = numbers[gram.numel() :].unbind()
        self._events = self._no_counters()
        return self.operators.coefficients(
            numbers[: gram.numel()].view_as(gram),
            [],
            torch.ones_like(scale),
            *self._alpha_beta(),
            counters=self._events,
            steps=[],
            passes=PASSES,
            regularizer=self.settings.regularizer,
            losses=(means[0], means[1], means[2]) if losses else None,
            grad_scale=grad_scale,
            max_regularizer_ratio=self.settings.max_regularizer_ratio,
            max_grad_norm=None,
        )

    def _return_gradients(self) -> None:
        """Write g0 into ``p.grad``."""
        for bucket, first in zip(self.flat.buckets, self.grads[0], strict=True):
            if bucket.takes_gradients:
                self.host.set_gradients(bucket.params, first)
                continue
            if bucket.given is not None and bucket.given[0] is first:
                self.host.set_gradients(bucket.params, bucket.given[1])
                continue
            for slot, g in zip(bucket.slots, first, strict=True):
                slot.param.grad = None if g is None else slot.as_gradient(g)

    def _record(self, c: Coefficients, grad_scale: Tensor | None) -> None:
        if not self.counted:
            return
        # Without ASAM, e is a multiple of g0. Only then, or without a perturbation, is the first norm that of g0.
        weighted = self._scale is not None and any(self._adaptive)
        scale, norm = (None, None) if weighted else (self._scale, self._squared_norms[0])
        if self.is_sum:
            norm, self._reduced_norm = None, norm
        if self._combined_gram:
            self._gram = torch.stack([part for _, part in sorted(self._combined_gram.items())]).sum(0)
        self._stats.record(self.losses, norm, self._gram, scale, c, grad_scale, self._reduced_norm)
        if self.replicas is not None:
            self.replicas.end_step()

    def restore(self) -> None:
        """Abandon the step and restore the parameters to w, bit for bit."""
        if self.replicas is not None:
            self.replicas.abandon_step()
        if self._scale is None:
            self._leave()
            return
        for rows in self._undo:
            for live, saved in zip(*rows, strict=True):
                live.copy_(saved)
        for plan in self._written:
            plan.push()
        self.flat.return_to_moved(self._given[0])
        for bucket in self.flat.buckets:
            self.host.mark_written(bucket.params)
        self._leave()

    def _leave(self) -> None:
        """Clean up after the parameters have returned from a perturbation."""
        torch.clear_autocast_cache()
        if self._model_buffers is not None:
            self._model_buffers.end()

    def _plans(self, active: list[tuple[bool, ...]]) -> list[Plan]:
        if active != self._active:  # usually all passes have the same participants
            self._active = active
            self._active_plans = [bucket.plan(mask) for bucket, mask in zip(self.flat.buckets, active, strict=True)]
        return self._active_plans

    def _rows(self, plans: Sequence[Plan], index: int) -> list[Sequence[Tensor]]:
        """Return the gradients of a pass as rows of each bucket. They are gathered once per set of plans."""
        key = (index, *plans)
        if key not in self._gathered:
            grads = self.grads[index]
            self._gathered[key] = [plan.gather(gs, index) for plan, gs in zip(plans, grads, strict=True)]
        return self._gathered[key]

    def _save_late(self, active: list[tuple[bool, ...]]) -> None:
        """Save w of the parameters that were not moved: those without g0, or all of them in a single pass."""
        moved = self._scale is not None
        for bucket, mask, first in zip(self.flat.buckets, active, self._given[0], strict=True):
            if moved and mask == first:
                continue
            late = tuple(a and not (moved and given) for a, given in zip(mask, first, strict=True))
            # In a single pass, the parameters are w themselves, unless they have a master.
            if any(late) and (moved or bucket.has_master):
                plan = bucket.plan(late)
                if not plan.rows:
                    continue
                plan.pull()
                self._written.append(plan)
                zeros, nothing = [torch.zeros_like(row) for row in plan.live], self._vector([0.0] * len(self.groups))
                not_adaptive = [False] * len(self.groups)
                self.operators.perturb_(plan.live, plan.saved, zeros, plan.groups, nothing, not_adaptive, 1, self._undo)
                plan.push()

    def _coefficients(
        self,
        plans: Sequence[Plan],
        rows: Rows,
        steps: Iterable[tuple[Tensor, Tensor]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None = None,
        max_grad_norm: float | None = None,
    ) -> Coefficients:
        """Compute the weights of the passes in the update.

        Use the Gram matrix if the backend computes it cheaply, or if the log regularizer, the clip or the cap need it.
        Otherwise only the norms of the gradients are computed, to detect a NaN or Inf.
        """
        settings, reduced = self.settings, self._reduced_norm is not None
        complete = self.collected == PASSES and not reduced
        losses = self._losses() if complete and settings.needs_losses else None
        clips = max_grad_norm is not None
        measures = settings.measures and losses is None
        gram = None
        if complete and (self.operators.fuses_gram or clips or settings.caps or measures):
            gram = self._gram = self._gram_of(plans, rows)
        elif not reduced:
            unweighted = [plan.unweighted for plan in plans]
            missing = range(len(self._squared_norms), self.collected)
            if missing:
                parts = [self._parts_of_norm(plans, [r[index] for r in rows], unweighted) for index in missing]
                self._squared_norms += self.flat.totals(parts, (len(self.groups),))
            if self.passes == 1 and self.direction is not None:
                self._added = self.direction.added(self.operators, self.flat, plans, self._squared_norms[0], grad_scale)
                if clips:  # the clip needs the norm of the sum
                    self._reduced_norm = self._squared_norm(plans, [r[0] for r in rows], unweighted, self._added)
        norms = self._squared_norms if self._reduced_norm is None else [self._reduced_norm]
        if found_inf is not None:
            overflow = torch.where(found_inf.to(self.home, non_blocking=True) > 0, math.nan, 0.0)
            if self.flat.is_sharded:
                overflow = self.flat.anywhere(overflow)
            if gram is None:
                norms = [*norms[:-1], norms[-1] + overflow]
            else:
                gram = gram + overflow
        alpha, beta = self._alpha_beta()
        c = self.operators.coefficients(
            gram,
            norms,
            torch.zeros_like(alpha) if self._scale is None else self._scale,
            alpha,
            beta,
            counters=self._stats.counters(self.home) if self.counted else self._no_counters(),
            steps=list(steps),
            passes=1 if reduced else self.collected,
            regularizer=settings.regularizer,
            losses=losses,
            grad_scale=grad_scale,
            max_regularizer_ratio=settings.max_regularizer_ratio,
            max_grad_norm=max_grad_norm,
        )
        decided = self._decided
        if decided is not None:  # coefficients from the gradients of all replicas, see _decide()
            c = decided._replace(factor=c.factor, ok=c.ok)
            self._stats.counters(self.home).add_(torch.where(c.ok, self._events, 0))
        return c

    def _gram_of(self, plans: Sequence[Plan], rows: Rows) -> Tensor:
        parts = [
            self.operators.fd_gram(grads, plan.groups, len(self.groups), self._weights(plan, plan.saved))
            if plan.rows
            else None
            for plan, grads in zip(plans, rows, strict=True)
        ]
        return self.flat.total(parts, (len(self.groups), GRAM))

    def _no_counters(self) -> Tensor:
        return torch.zeros(len(COUNTERS), dtype=torch.int64, device=self.home)

    def _alpha_beta(self) -> tuple[Tensor, Tensor]:
        alpha, beta = (self._vector([group[name] for group in self.groups]) for name in ("alpha", "beta"))
        return alpha, beta

    def _counted(self, plans: Sequence[Plan]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the step counters and the participants of each bucket that has step counters."""
        for bucket, plan in zip(self.flat.buckets, plans, strict=True):
            if bucket.steps is not None and plan.slots:
                yield bucket.steps, plan.mask

    def _losses(self) -> tuple[Tensor, Tensor, Tensor]:
        if len(set(self._maximizes)) > 1:
            raise ValueError('estimator="loss" needs one objective: set the same maximize in all groups')
        at_w, ascent, descent = (_on(self.home, self.losses) * (-1.0 if self._maximizes[0] else 1.0)).unbind()
        return at_w, ascent, descent

    def _apply(self, plans: Sequence[Plan], rows: Rows, c: Coefficients) -> bool:
        """Update every bucket. Return whether the base optimizer has its state now."""
        update, moved = self._update, self._scale is not None
        added = self._added or [None] * len(plans)
        for bucket, plan, grads, direction in zip(self.flat.buckets, plans, rows, added, strict=True):
            if not plan.slots:
                continue
            if plan.rows:
                if not moved:
                    plan.pull()
                saved = plan.saved if moved or bucket.has_master else plan.live
                own = plan.own
                if own is None:
                    update.apply(self.operators, plan, saved, grads, c, direction, moved)
                else:
                    self._update_own(own, plan, saved, grads, c, direction)
                self._wrote(plan)
            # bool(c.ok) synchronizes, but only until the plan is published and only if the state shows steps.
            if update.native and not plan.published and (not update.shows_steps or bool(c.ok)):
                bucket.publish(plan, self.state)

        def give_gradients() -> None:
            for plan, grads in zip(plans, rows, strict=True):
                plan.scatter(grads[-1])

        made = update.native or update.finish(c.ok, give_gradients)
        if made and not update.native:
            self._return_gradients()
            for bucket, plan in zip(self.flat.buckets, plans, strict=True):
                if not plan.published:
                    bucket.publish(plan, self.state)
        self.flat.published = all(plan.published for plan in plans if plan.slots)
        return made

    def _update_own(
        self,
        own: OwnPlan,
        plan: Plan,
        saved: Sequence[Tensor],
        grads: list[Sequence[Tensor]],
        c: Coefficients,
        direction: Direction | None,
    ) -> None:
        """Update the shard whose state this rank has, and exchange it; arguments are those of :meth:`Update.apply`."""
        if own.rows:
            by_pass: list[Sequence[Tensor]] = [own.of(of_pass) for of_pass in grads]
            here = own.live if saved is plan.live else own.of(saved)
            self._update.apply(self.operators, own, here, by_pass, c, own.direction(direction), moved=True)
        if has_master(plan.live[0].dtype):  # every rank has the full masters in ``saved``
            own.share(plan.saved)
            torch._foreach_copy_(list(plan.live), list(plan.saved))
        else:
            own.share(plan.live)

    def _wrote(self, plan: Plan) -> None:
        """Copy mirrors back and mark the parameters of a plan as written, after an operator wrote them."""
        plan.push()
        self.host.mark_written(plan.params)

    def _weights(self, plan: Plan, rows: Sequence[Tensor]) -> list[Tensor | None]:
        """Return ``rows``, with None for those whose group is not adaptive."""
        if not any(self._adaptive):
            return plan.unweighted
        return [w if self._adaptive[g] else None for w, g in zip(rows, plan.groups, strict=True)]

    def _squared_norm(
        self,
        plans: Sequence[Plan],
        rows: list[Sequence[Tensor]],
        weights: Sequence[Sequence[Tensor | None]],
        directions: Sequence[Direction | None] = (),
    ) -> Tensor:
        return self.flat.total(self._parts_of_norm(plans, rows, weights, directions), (len(self.groups),))

    def _parts_of_norm(
        self,
        plans: Sequence[Plan],
        rows: list[Sequence[Tensor]],
        weights: Sequence[Sequence[Tensor | None]],
        directions: Sequence[Direction | None] = (),
    ) -> list[Tensor | None]:
        """Return the squared norm of the rows of each bucket, or None for a bucket without rows."""
        return [
            self.operators.grad_norm(r, plan.groups, len(self.groups), w, d) if r else None
            for plan, r, w, d in zip(plans, rows, weights, directions or [None] * len(plans), strict=True)
        ]

    def _vector(self, values: Sequence[Any]) -> Tensor:
        """Return numbers or 0-dim tensors as one float64 tensor on the home device."""
        if not any(isinstance(v, Tensor) for v in values):
            return self.flat.constants(tuple(values))
        # A number next to tensors is cached on the device too, because a CUDA graph must not copy it from the host.
        return _on(self.home, [v if isinstance(v, Tensor) else self.flat.constants((v,)) for v in values])


def is_loss(value: Any) -> bool:
    """Whether a value is a loss: a tensor of one element, or a number."""
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)


def _on(device: torch.device, values: Sequence[Any]) -> Tensor:
    """Return numbers or tensors of one element as one float64 tensor."""
    columns = [scalar(value).to(device, torch.float64, non_blocking=True) for value in values]
    return torch.stack([column.reshape(()) for column in columns])


def _either(masks: Sequence[tuple[bool, ...]]) -> tuple[bool, ...]:
    """Return the elementwise or of the masks."""
    first, *others = masks
    return first if all(mask == first for mask in others) else tuple(map(any, zip(*masks, strict=True)))
