"""CR-SAM in float64, implemented from its formulas alone, and the tolerances that all tests share.

The optimizer under test never sees this module, and this module knows nothing of flat buffers, rows or backends: a
step is :func:`perturbation`, :func:`curvature`, and :func:`sgd` or :func:`adam`. :class:`Reference` puts them in order.
Maximizing L is minimizing -L: losses and gradients change sign on entry, and no formula mentions it again.

Tolerances
----------
u is half an ulp of the compute dtype: float64's own for float64, float32's for all others.

=============  ==============  ===================================================================================
name           value           source
=============  ==============  ===================================================================================
EXACT          1e-12           float64: a few steps of some 20 roundings, u = 1e-16, times a condition number of 1000
update(T)      20 T u          T steps with given gradients, relative to the largest value: gradients (1), the
                               two differences (3), their weights (2), their sum (2), weight decay (2), momentum or
                               moments (4), nesterov or the denominator (4), learning rate (1), parameter (1)
SUMS           n / 32 u        a sum of n products in at least 32 lanes, one rounding per element; n: longest block
POINT          4 u             w + e: scale (1), product (1), sum (1), adaptive product (1)
rounded        0.5 ulp         a float16 or bfloat16 parameter is its float32 master, rounded: asserted bit for bit
LIMIT          1e-5            finite differences at rho = 1e-3 against autograd's derivatives: ten times rho^2
=============  ==============  ===================================================================================
"""

import math

import numpy as np
import torch

EXACT = 1e-12
LIMIT = 1e-5


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(dtype):
    """Return u, half an ulp of 1 in the compute dtype."""
    return torch.finfo(compute_dtype(dtype)).eps / 2


def update_tolerance(dtype, steps):
    return 20 * steps * unit(dtype)


def sum_tolerance(dtype, n=2**18):
    return max(n / 32, 16) * unit(dtype)


def point_tolerance(dtype):
    return 4 * unit(dtype)


COMPILED = {"backend": "torch", "compile": True}


# The mathematics -----------------------------------------------------------------------------------------------------


def norm(tensors):
    return math.sqrt(sum(float((t.detach().double() ** 2).sum()) for t in tensors))


def dot(x, y):
    return sum(float((s.double() * t.double()).sum()) for s, t in zip(x, y, strict=True))


def perturbation(w, g0, rho, adaptive):
    """Return e of SAM, or of ASAM if adaptive; lists with one entry per parameter."""
    length = norm([p.abs() * g if a else g for p, g, a in zip(w, g0, adaptive, strict=True)]) + 1e-12
    return [r * (p**2 * g if a else g) / length for p, g, r, a in zip(w, g0, rho, adaptive, strict=True)]


def random_bits(w, g):
    """Return u in [0, 1) for stochastic rounding: 13 bits of MurmurHash3's finalizer over float32 w and g."""
    w, g = (np.ascontiguousarray(x.float().numpy()).view(np.uint32).astype(np.uint64) for x in (w, g))
    h = (w ^ (g * 0x9E3779B1)) % 2**32
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
    return torch.from_numpy(((h ^ (h >> 16)) >> 19).astype(np.float64)) / 2**13


def spacing(x, dtype):
    """Return the distance between neighboring numbers of ``dtype`` at x, which is float64."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal if dtype == torch.float16 else 2.0**-119
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=smallest)))) * info.eps


def differences(g0, gp, gm):
    return [p - m for p, m in zip(gp, gm, strict=True)], [(p - g) + (m - g) for g, p, m in zip(g0, gp, gm, strict=True)]


def curvature(e, g0, d1, d2, losses, estimator):
    """Return kappa and sigma of the log regularizer."""
    if estimator == "loss":
        return losses[1] + losses[2] - 2 * losses[0], losses[1] - losses[2]
    return dot(e, d1) / 2, 2 * dot(e, g0) + dot(e, d2) / 3


def sgd(w, g, state, *, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False):
    g = g + weight_decay * w
    if momentum:
        m = state["momentum_buffer"]
        m = state["momentum_buffer"] = g if m is None else momentum * m + (1 - dampening) * g
        g = g + momentum * m if nesterov else m
    return w - lr * g


def adam(w, g, state, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, decoupled):
    if not decoupled:
        g = g + weight_decay * w
    t = state["step"] = state["step"] + 1
    m = state["exp_avg"] = betas[0] * state["exp_avg"] + (1 - betas[0]) * g
    v = state["exp_avg_sq"] = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * g**2
    w = w * (1 - lr * weight_decay) if decoupled else w
    return w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)


class Reference:
    """A CR-SAM optimizer over groups ``{"params": [...], **options}``; parameters are copied to float64.

    ``w`` and ``state`` have one entry per parameter. ``step(evaluate)`` calls ``evaluate(w)``, which returns the loss
    and a list of gradients, in which None stands for no gradient.
    """

    def __init__(self, groups, base="sgd", *, regularizer="linear", estimator="gradient", max_grad_norm=math.inf,
                 max_regularizer_ratio=None, interval=1, **defaults):  # fmt: skip
        log = regularizer == "log"
        defaults = {
            "rho": 0.1,
            "alpha": 0.01 if log else 0.1,
            "beta": 0.01,
            "adaptive": False,
            "maximize": False,
            **defaults,
        }
        self.base, self.log, self.estimator, self.max_grad_norm = base, log, estimator, max_grad_norm
        self.cap = (1.0 if log else math.inf) if max_regularizer_ratio is None else max_regularizer_ratio
        self.defaults, self.w, self.state, self.options = defaults, [], [], []
        self.counts = dict.fromkeys(("skipped", "curvature_dropped", "gradient_norm_dropped", "capped"), 0)
        self.last, self.scales = {}, {}
        self.interval, self.age, self.kept = interval, 0, []  # with an interval, the direction is reused
        for group in groups:
            self.add_group(group)

    def add_group(self, group):
        options = {**self.defaults, **{k: v for k, v in group.items() if k != "params"}}
        for param in group["params"]:
            w = param.detach().double().clone()
            self.w.append(w)
            self.state.append({"momentum_buffer": None, "step": 0, "exp_avg": 0 * w, "exp_avg_sq": 0 * w})
            self.options.append(options)

    def each(self, name):
        return [o[name] for o in self.options]

    def step(self, evaluate):
        sign = [-1 if maximize else 1 for maximize in self.each("maximize")]
        active = [False] * len(self.w)

        def gradient(w):
            loss, grads = evaluate(w)
            for i, g in enumerate(grads):
                active[i] = active[i] or g is not None
            signed = [
                torch.zeros_like(p) if g is None else s * g.double() for p, g, s in zip(w, grads, sign, strict=True)
            ]
            return sign[0] * float(loss), signed

        def moved(s):
            return [p + s * d for p, d in zip(self.w, e, strict=True)]

        loss, g0 = gradient(self.w)
        if self.age:
            decay, self.age = 0.9**self.age, (self.age + 1) % self.interval
            if not all(g.isfinite().all() for g in g0):
                self.counts["skipped"] += 1
                return loss
            kept = [*self.kept, *(torch.zeros_like(g) for g in g0[len(self.kept) :])]
            weight = min(decay, norm(g0) / 2 / (norm(kept) + 1e-12))
            self.last = {"grad_norm": norm(g0)}
            self.finish([g + weight * h for g, h in zip(g0, kept, strict=True)], active)
            return loss
        self.age, self.kept = 1 % self.interval, []
        e = perturbation(self.w, g0, self.each("rho"), self.each("adaptive"))
        (loss_ascent, gp), (loss_descent, gm) = gradient(moved(+1)), gradient(moved(-1))
        if not all(g.isfinite().all() for g in [*g0, *gp, *gm]):
            self.counts["skipped"] += 1
            return loss
        d1, d2 = differences(g0, gp, gm)
        self.last = {"grad_norm": norm(g0)}
        a, b = self.each("alpha"), self.each("beta")
        if self.log:
            kappa, sigma = curvature(e, g0, d1, d2, (loss, loss_ascent, loss_descent), self.estimator)
            a, b = [x / kappa if kappa > 0 else 0.0 for x in a], [x / sigma if sigma > 0 else 0.0 for x in b]
            self.last.update(kappa=kappa, sigma=sigma)
            # The reference magnitude for errors of sums of products; it is larger than the result if terms cancel.
            k, s = norm(e) * norm(d1) / 2, norm(e) * (2 * norm(g0) + norm(d2) / 3)
            self.scales = {"kappa": k, "sigma": s, "a": max(a) * k / abs(kappa or 1), "b": max(b) * s / abs(sigma or 1)}
            self.counts["curvature_dropped"] += kappa <= 0
            self.counts["gradient_norm_dropped"] += sigma <= 0
        r = [x * s + y * t for x, s, y, t in zip(a, d2, b, d1, strict=True)]
        ratio = norm(r) / norm(gp) if norm(gp) else 0.0
        shrink = min(1.0, self.cap / ratio) if ratio else 1.0
        self.counts["capped"] += ratio > self.cap
        ghat = [p + shrink * x for p, x in zip(gp, r, strict=True)]
        self.kept = [(p - g) + shrink * x for g, p, x in zip(g0, gp, r, strict=True)]
        self.last.update(a=[shrink * x for x in a], b=[shrink * x for x in b], regularizer_ratio=ratio)
        self.finish(ghat, active)
        return loss

    def finish(self, ghat, active):
        clip = min(1.0, self.max_grad_norm / (norm(ghat) + 1e-6))
        ghat = [clip * g for g in ghat]
        self.last["clip_factor"] = clip
        self.update(ghat, active)

    def update(self, ghat, active):
        if callable(self.base):  # a torch optimizer whose float64 parameters are self.w
            if not hasattr(self, "wrapped"):
                self.w = [torch.nn.Parameter(w) for w in self.w]
                self.wrapped = self.base(self.w)
            for w, g, is_active in zip(self.w, ghat, active, strict=True):
                w.grad = g if is_active else None
            self.wrapped.step()
            for w in self.w:
                w.grad = None
            return
        ours = ("rho", "alpha", "beta", "adaptive", "maximize")
        rule = sgd if self.base == "sgd" else adam
        extra = {} if self.base == "sgd" else {"decoupled": self.base == "adamw"}
        defaults = {"weight_decay": 0.01} if self.base == "adamw" else {}  # torch's
        for i, g in enumerate(ghat):
            if active[i]:
                options = {k: v for k, v in self.options[i].items() if k not in ours}
                self.w[i] = rule(self.w[i], g, self.state[i], **{**defaults, **options}, **extra)


# A test problem ------------------------------------------------------------------------------------------------------

SHAPES = [(5, 4), (5,), (3, 5), ()]


def network_params(dtype=torch.float64, device="cpu"):
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(device, dtype)) for shape in SHAPES]


def batch(dtype=torch.float64, device="cpu"):
    classes = torch.eye(3, dtype=torch.float64)[torch.randint(3, (16,))]
    return torch.randn(16, 4, dtype=torch.float64).to(device, dtype), classes.to(device, dtype)


def network_loss(params, data):
    """Return the cross entropy, with operations that start no threads for 48 numbers."""
    w, b, v, s = params
    logits = torch.tanh(data[0] @ w.T + b) @ v.T * (1 + s)
    return (logits.exp().sum(1).log() - (logits * data[1]).sum(1)).mean()


def evaluator(loss_of):
    """Return the ``evaluate`` function of :meth:`Reference.step`, by autograd."""

    def evaluate(w):
        leaves = [p.detach().clone().requires_grad_() for p in w]
        loss = loss_of(leaves)
        return loss.item(), list(torch.autograd.grad(loss, leaves, allow_unused=True))

    return evaluate


def closure_of(loss_of, params):
    """Return a closure for ``CRSAM.step`` that computes the same function."""

    def closure():
        loss = loss_of(params)
        loss.backward()
        return loss

    return closure


def assert_close(actual, expected, tolerance, what="value", scale=1.0):
    """Compare the largest error with ``tolerance`` times the largest expected magnitude, or times ``scale``."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = (
        actual.detach().double().cpu()
        if isinstance(actual, torch.Tensor)
        else torch.tensor(actual, dtype=torch.float64)
    )
    error = (actual - expected.detach().cpu()).abs().max().item() if actual.numel() else 0.0
    scale = max(scale, expected.abs().max().item()) if expected.numel() else scale
    assert error <= tolerance * scale, f"{what}: off by {error / scale:.1e}, allowed {tolerance:.1e}"  # NaN fails too


def assert_same(params, reference, tolerance=EXACT, state=None, names=()):
    """Compare parameters, and the named buffers of an optimizer's ``state``, with a :class:`Reference`."""
    for i, (param, w) in enumerate(zip(params, reference.w, strict=True)):
        assert_close(param, w, tolerance, f"parameter {i}")
        for name in names:
            expected = reference.state[i][name]
            if state is not None and expected is not None and param in state:
                assert_close(state[param][name], expected, tolerance, f"{name} {i}")


def run_three_calls(optimizer, backward, calls=3, zero_grad=True):
    """Make one step in calls; ``backward(index)`` computes gradients and returns the loss of a pass."""
    for index, call in enumerate((optimizer.first_step, optimizer.second_step, optimizer.third_step)[:calls]):
        call(zero_grad=zero_grad, loss=backward(index))
