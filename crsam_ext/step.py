"""One step: its passes, what happens between them, and the update."""

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

Rows = list[list[Sequence[Tensor]]]  # bucket, pass, row: of the gradients

__all__ = ["Located", "Step", "StepSettings", "is_loss"]


@dataclass(frozen=True)
class StepSettings:
    """What decides how a step is made, besides the options of the groups; see :class:`crsam_ext.CRSAM`."""

    regularizer: str
    estimator: str
    max_grad_norm: float | None
    max_regularizer_ratio: float
    stochastic_rounding: bool

    @property
    def needs_losses(self) -> bool:
        """Whether a step of three passes needs their losses."""
        return self.measures and self.estimator == "loss"

    @property
    def measures(self) -> bool:
        """Whether the weights of the regularizer's terms depend on kappa and sigma."""
        return REGULARIZERS[self.regularizer].measures

    @property
    def caps(self) -> bool:
        """Whether the norm of the regularizer's gradient is capped."""
        return self.max_regularizer_ratio < math.inf

    def weights_known(self, passes: int, keeps: bool) -> bool:
        """Whether the weights of the regularized gradient are known before the last pass.

        Not where they depend on all gradients, nor where the step ``keeps`` something that is made of each of these.
        """
        if keeps:
            return False
        return passes < PASSES or not (self.measures or self.caps)


class Located(NamedTuple):
    """What a step works on, where it was found when the first pass was over."""

    flat: FlatParameters
    update: Update
    operators: Operators
    groups: list[dict[str, Any]]
    state: MutableMapping[Tensor, Any]


class Step:
    """One step in progress: the gradients of its passes so far, and what to do with them.

    The order of calls is ``collect, move`` (to w + e), ``collect, move`` (to w - e), ``collect``, and ``update`` or
    ``combine``; with fewer passes, moves are left out, and ``collect, move_apart, add, add`` evaluates both points at
    once. ``restore`` may come at any time instead.

    Parameters and state are looked for when the first pass is collected, since its forward may still move them:
    ``flatten_parameters()`` of recurrent layers does.

    Args:
        settings: how it is made.
        locate: finds parameters, state and options, given how many points will be evaluated at once.
        stats: takes the measurements.
        model_buffers: of the model, if they follow the first pass.
        passes: how many there will be, 1 to 3.
        counted: whether the step enters the measurements; not if it is a part of another one, or finishes one that
            :meth:`combine` has counted.
        is_sum: whether the gradient of its one pass is a sum of regularized ones.
        difference: of earlier steps, where the third of their passes is not always taken.
        direction: of the last step that has perturbed, where steps of one pass go on with it.
        num_points: how many points will be evaluated at once.
        replicas: of the model, if what the step is made of is reduced over them.

    Attributes:
        flat: the parameters.
        losses: for each pass so far its loss, a detached tensor or a number; None if it gave something else.
        grads: for each pass so far, for each bucket and slot, its gradient in the parameter's own layout.
    """

    flat: FlatParameters
    home: torch.device  # where the few numbers are kept that belong to all parameters
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
        self._combined = False  # whether the hook has made the regularized gradient of that of the last pass
        self._numbers: tuple[Tensor, Tensor] | None = None  # see _hook_numbers()
        self._combined_gram: dict[int, Tensor] = {}  # by bucket of the hook, its part of the Gram matrix
        # Squared, [groups], of the regularized gradient, where it was reduced, or is to be clipped in a single pass.
        self._reduced_norm: Tensor | None = None
        self._added: list[Direction | None] = []  # for each plan, what is added to the gradient of the one pass
        self._decided: Coefficients | None = None  # what was decided from all gradients, before it was reduced
        self.settings, self._locate, self._stats, self._model_buffers = settings, locate, stats, model_buffers
        self.passes, self.difference, self.direction, self.num_points = passes, difference, direction, num_points
        self.counted, self.is_sum = counted, is_sum
        self.losses: list[Any] = []
        self.grads: list[list[Gradients]] = []
        self._given: list[list[tuple[bool, ...]]] = []  # pass, bucket, slot: whether there is a gradient
        self._active: list[tuple[bool, ...]] = []  # bucket, slot: what the plans below are for
        self._active_plans: list[Plan] = []
        self._gathered: dict[tuple[Any, ...], list[Sequence[Tensor]]] = {}
        self._squared_norms: list[Tensor] = []
        self._gram: Tensor | None = None
        self._scale: Tensor | None = None  # of the perturbation, once there is one
        self._undo: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []  # copying second into first gives w back
        self._written: list[Plan] = []  # whose mirrors may differ from their parameters

    @property
    def collected(self) -> int:
        """How many passes have been collected, a guessed one included."""
        return len(self.grads)

    def collect(self, loss: Any, keep: bool) -> None:
        """Take over the gradients that autograd left in this pass; ``keep`` leaves them in ``p.grad`` as well."""
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
                f"the gradients of pass {index + 1} were to be reduced, but its backward was in no_sync(): use "
                "optimizer.no_sync(), which leaves out the passes that are reduced"
            )
        self.replicas.begin_pass()
        if index == 0 and kind is Pass.LOCAL and self.replicas.shares_e is not None:
            given = [g for of_bucket in self.grads[0] for g in of_bucket if g is not None]
            self.replicas.mean_of(given, self.replicas.shares_e)

    @property
    def kind(self) -> Pass:
        """What happens to the gradients of the pass that is running, or comes next."""
        return self._kind_of(self.collected)

    def _kind_of(self, index: int) -> Pass:
        if self.replicas is None:
            return Pass.LOCAL
        known = self.settings.weights_known(self.passes, self.difference is not None or self.direction is not None)
        return self.replicas.kind(index, self.passes, known)

    def add(self, loss: Any, grads: list[Gradients]) -> None:
        """Enter the next pass: its loss and, for each bucket and slot, its gradient in the parameter's own layout."""
        index = self.collected
        given = [
            bucket.all_active if isinstance(of_bucket, self.host.Column) else tuple(g is not None for g in of_bucket)
            for bucket, of_bucket in zip(self.flat.buckets, grads, strict=True)
        ]
        if not any(map(any, given)):
            raise RuntimeError(
                f"pass {index + 1} left no gradient in any parameter: has loss.backward() been called? Was the "
                "optimizer made before fully_shard(), or of parameters that it had gathered? Make it after, and after "
                "model.reshard()"
            )
        for earlier in self.grads:
            if any(map(self.host.share_memory, grads, earlier)):
                raise RuntimeError(
                    f"pass {index + 1} wrote a gradient into the memory of an earlier pass's, which is lost: "
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

        With ``show_overflow``, to NaN instead if the last gradient holds a NaN or an infinity: so will the next one.
        (An overflow in g0 shows in any case: e is not finite.)
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
        # Autocast keeps low-precision copies of the weights until its outermost context ends: they are stale now.
        torch.clear_autocast_cache()
        if self._model_buffers is not None:
            self._model_buffers.rewind()

    def move_apart(self) -> dict[Tensor, Tensor]:
        """Move the parameters to w + e and write w - e beside them; both, [2, *its shape], for each that was moved."""
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
        """The scale of the perturbation, negative for a group that is maximized."""
        assert self._scale is not None
        if any(self._maximizes):
            return self._scale * self._vector([-1.0 if maximizes else 1.0 for maximizes in self._maximizes])
        return self._scale

    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Make the update of w with the gradients of all passes.

        Args:
            grad_scale: 0-dim, what all gradients were multiplied with.
            found_inf: 0-dim, not 0 if the step is to be skipped whatever the gradients are; 1 afterwards if it was.
        """
        if grad_scale is not None:
            grad_scale = grad_scale.to(self.home, torch.float64, non_blocking=True)
        for bucket in self.flat.buckets:
            bucket.pull_state()
        plans, rows = self._finish(grad_scale, found_inf)
        self._return_gradients()  # may be refused, and then nothing has been written
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
        """Go back to w, with the regularized gradient in ``p.grad``: ``grad_scale`` times it, as the gradients were."""
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
        """Plans and rows of a step of which all passes are there; all w are saved that will be written.

        Over replicas, the rows are those of one gradient: the regularized one, reduced.
        """
        reduces = self._reduces
        if self.passes == 2 and self.difference is not None:
            self.add(None, self.difference.descent(self.state, self.flat.buckets, self.grads, grad_scale))
        if self._combined:
            active = self._given[-1]  # of all replicas
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
        """Whether the regularized gradient is to be reduced, rather than those of all passes, or nothing."""
        return self.replicas is not None and self._kind_of(self.passes - 1) is not Pass.MEAN

    @property
    def reduces_late(self) -> bool:
        """Whether the gradient is reduced when all passes have been collected, rather than in the last."""
        return self._reduces and self.kind is not Pass.COMBINED

    def _keep(self, plans: Sequence[Plan], c: Coefficients, grad_scale: Tensor | None) -> None:
        """Keep what later steps need of this one."""
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
        """Make the regularized gradient of the last pass's, in a bucket of DistributedDataParallel.

        Args:
            bucket: of which all gradients of the last pass are there.
            factor: what the regularized gradient is multiplied with.
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
            if found is None:  # another optimizer's
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
        """The factor and the weights of the passes, the same for all buckets of a pass."""
        if self._numbers is None:
            self._numbers = self._factor(factor), pass_weights(*self._alpha_beta())
        return self._numbers

    def _factor(self, factor: float, found_inf: Tensor | None = None) -> Tensor:
        """A factor, 0-dim, that is NaN where something has overflowed that the gradients do not show."""
        number = self.flat.constants((factor,))[0]
        for norm in self._squared_norms:
            number = number + 0.0 * norm.sum()
        if found_inf is not None:
            number = number + torch.where(found_inf.to(self.home, non_blocking=True) > 0, math.nan, 0.0)
        return number

    def _active_anywhere(self, active: list[tuple[bool, ...]]) -> list[tuple[bool, ...]]:
        """Which parameters take part on any replica."""
        assert self.replicas is not None
        if not self.replicas.ddp.find_unused_parameters:
            return active
        mask = torch.tensor([a for mask in active for a in mask], dtype=torch.int32, device=self.home)
        anywhere = iter(self.replicas.max_(mask).tolist())
        return [tuple(bool(next(anywhere)) for _ in mask) for mask in active]

    def _reduce(self, plans: Sequence[Plan], rows: Rows, grad_scale: Tensor | None, found_inf: Tensor | None) -> Rows:
        """Make the regularized gradient of each plan's rows, and its mean over the replicas."""
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
        """The weights of the regularized gradient, alike on all replicas: from the means of what they depend on.

        kappa and sigma are means over the replicas, and the norms in the cap are root mean squares.
        """
        replicas, scale = self.replicas, self._scale
        assert replicas is not None
        assert scale is not None
        gram = self._gram = self._gram_of(plans, rows)
        numbers = gram.clone()
        numbers[:, 6:] *= scale[:, None]  # each has an e of its own
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
        """Put g0 into ``p.grad``."""
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
        # Only a plain e is a multiple of g0, and only then, or where nothing was perturbed, the norm is that of g0.
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
        """Abandon the step: the parameters are bit for bit w again."""
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
        """What is to be done wherever parameters come back from a perturbation."""
        torch.clear_autocast_cache()
        if self._model_buffers is not None:
            self._model_buffers.end()

    def _plans(self, active: list[tuple[bool, ...]]) -> list[Plan]:
        if active != self._active:  # mostly, all passes have the same
            self._active = active
            self._active_plans = [bucket.plan(mask) for bucket, mask in zip(self.flat.buckets, active, strict=True)]
        return self._active_plans

    def _rows(self, plans: Sequence[Plan], index: int) -> list[Sequence[Tensor]]:
        """The gradients of a pass as rows of each bucket, gathered once for each set of participants."""
        key = (index, *plans)
        if key not in self._gathered:
            grads = self.grads[index]
            self._gathered[key] = [plan.gather(gs, index) for plan, gs in zip(plans, grads, strict=True)]
        return self._gathered[key]

    def _save_late(self, active: list[tuple[bool, ...]]) -> None:
        """Save w of parameters that were not moved: without a gradient in the first pass, or all in a single pass."""
        moved = self._scale is not None
        for bucket, mask, first in zip(self.flat.buckets, active, self._given[0], strict=True):
            if moved and mask == first:
                continue
            late = tuple(a and not (moved and given) for a, given in zip(mask, first, strict=True))
            # In a single pass, w is where the parameters are, unless there is a master.
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
        """The weights of the update.

        From the Gram matrix, where it costs little, or where log form, clip or cap need it. Otherwise the norms of the
        three gradients show whether the step is sound.
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
                if clips:  # the norm of g0 shows whether it is sound; this one also how long the update is
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
        if decided is not None:  # with the gradients of all replicas, before they were reduced
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
        """Step counters and participants of each bucket whose update is made here."""
        for bucket, plan in zip(self.flat.buckets, plans, strict=True):
            if bucket.steps is not None and plan.slots:
                yield bucket.steps, plan.mask

    def _losses(self) -> tuple[Tensor, Tensor, Tensor]:
        if len(set(self._maximizes)) > 1:
            raise ValueError('estimator="loss" needs one objective: set maximize alike in all groups')
        at_w, ascent, descent = (_on(self.home, self.losses) * (-1.0 if self._maximizes[0] else 1.0)).unbind()
        return at_w, ascent, descent

    def _apply(self, plans: Sequence[Plan], rows: Rows, c: Coefficients) -> bool:
        """Make the update of every bucket; whether the base optimizer has its state now."""
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
            # The flag is read in the first step of a plan only, and where it matters.
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
        """Update what this rank has the state of, and exchange it; arguments as for :meth:`Update.apply`."""
        if own.rows:
            by_pass: list[Sequence[Tensor]] = [own.of(of_pass) for of_pass in grads]
            here = own.live if saved is plan.live else own.of(saved)
            self._update.apply(self.operators, own, here, by_pass, c, own.direction(direction), moved=True)
        if has_master(plan.live[0].dtype):  # the masters, which are saved, are whole on every rank
            own.share(plan.saved)
            torch._foreach_copy_(list(plan.live), list(plan.saved))
        else:
            own.share(plan.live)

    def _wrote(self, plan: Plan) -> None:
        """Call when an operator has written the parameters of a plan."""
        plan.push()
        self.host.mark_written(plan.params)

    def _weights(self, plan: Plan, rows: Sequence[Tensor]) -> list[Tensor | None]:
        """Those of ``rows`` whose group is adaptive."""
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
        """The squared norm of the rows of each bucket; None where there are none."""
        return [
            self.operators.grad_norm(r, plan.groups, len(self.groups), w, d) if r else None
            for plan, r, w, d in zip(plans, rows, weights, directions or [None] * len(plans), strict=True)
        ]

    def _vector(self, values: Sequence[Any]) -> Tensor:
        """Numbers or 0-dim tensors as one float64 tensor on the home device."""
        if not any(isinstance(v, Tensor) for v in values):
            return self.flat.constants(tuple(values))
        # A number beside tensors is kept on the device as well: a CUDA graph does not capture a copy from the host.
        return _on(self.home, [v if isinstance(v, Tensor) else self.flat.constants((v,)) for v in values])


def is_loss(value: Any) -> bool:
    """Whether a value is a loss: a tensor of one element, or a number."""
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)


def _on(device: torch.device, values: Sequence[Any]) -> Tensor:
    """Numbers or tensors of one element as one float64 tensor."""
    columns = [scalar(value).to(device, torch.float64, non_blocking=True) for value in values]
    return torch.stack([column.reshape(()) for column in columns])


def _either(masks: Sequence[tuple[bool, ...]]) -> tuple[bool, ...]:
    """Where one of the masks is true."""
    first, *others = masks
    return first if all(mask == first for mask in others) else tuple(map(any, zip(*masks, strict=True)))
