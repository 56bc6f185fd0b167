"""Base optimizers of torch and other libraries: they receive ghat, and CRSAM saves, copies and switches them
completely."""

import copy
import io

import pytest
import torch

from crsam_ext import CRSAM

from .reference import EXACT, assert_close, differences, perturbation

pytestmark = pytest.mark.slow

RHO, ALPHA, BETA = 0.1, 0.3, 0.05
STEPS = 12  # rectified and shifted optimizers only move after some steps

TORCH = {
    "ASGD": {},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {},
    "Adagrad": {},
    "Adamax": {},
    "Muon": {"weight_decay": 0.1},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9},
    "Rprop": {},
}
# These have option names that CRSAM also uses: A2Grad, AdaBound (gamma), AdEMAMix, AdaGC, Amos, AvaGrad (gamma),
# Gravity, MARS (gamma), RACS (alpha, beta, gamma), Ranger, SRMM, Tiger. All have their own load_state_dict. SPAM and
# StableSPAM have state outside `state`. Most have attributes that torch's copies lose.
PYTORCH_OPTIMIZER = [
    "A2Grad", "ADOPT", "AdEMAMix", "AdaBelief", "AdaBound", "AdaFactor", "AdaGC", "AdaShift", "Adan", "Amos",
    "AvaGrad", "CAME", "DAdaptAdam", "Gravity", "GrokFastAdamW", "LARS", "Lamb", "Lion", "MADGRAD", "MARS", "PID",
    "Prodigy", "QHAdam", "RACS", "Ranger", "SGDW", "SOAP", "SPAM", "SRMM", "ScheduleFreeAdamW", "Shampoo",
    "StableAdamW", "StableSPAM", "Tiger",
]  # fmt: skip
SCHEDULEFREE = ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree", "SGDScheduleFreeReference"]
CASES = {
    **{f"torch.optim.{name}": options for name, options in TORCH.items()},
    **{f"pytorch_optimizer.{name}": {} for name in PYTORCH_OPTIMIZER},
    **{f"schedulefree.{name}": {} for name in SCHEDULEFREE},
}
cases = pytest.mark.parametrize("case", CASES)


def named(case):
    """Return the class with that name, and its options."""
    library, _, name = case.rpartition(".")
    cls = getattr(pytest.importorskip(library), name)
    return cls, {"lr": 0.01, **CASES.get(case, {})}


def matrices(dtype=torch.float64):
    """Return two-dimensional parameters, which every optimizer accepts, including Muon."""
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((6, 4), (3, 6))]


def loss_of(params):
    x = torch.linspace(-2, 2, 32, dtype=params[0].dtype).view(8, 4)
    w, v = params
    return ((torch.tanh(x @ w.T) @ v.T - x[:, :3].sin()) ** 2).mean()


def closure_of(params):
    def closure():
        loss = loss_of(params)
        loss.backward()
        return loss

    return closure


def make(params, case):
    cls, options = named(case)
    optimizer = CRSAM(params, cls, rho=RHO, alpha=ALPHA, beta=BETA, **options)
    optimizer.train()
    return optimizer


def take(optimizer, params, steps=STEPS):
    torch.manual_seed(1)  # some draw random numbers
    for _ in range(steps):
        optimizer.step(closure_of(params))


def clones(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_equal(params, others):
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@cases
def test_update_equals_that_of_the_base_optimizer(case):
    """The base optimizer receives w and ghat, and updates bit for bit as it does without CRSAM."""
    params = matrices()
    start, twins = clones(params), clones(params)
    optimizer = make(params, case)
    cls, options = named(case)
    twin = cls(twins, **options)
    if hasattr(twin, "train"):
        twin.train()

    def gradient(sign=0, e=(0.0, 0.0)):
        leaves = [(p.detach() + sign * d).requires_grad_() for p, d in zip(twins, e, strict=True)]
        with torch.enable_grad():
            return torch.autograd.grad(loss_of(leaves), leaves)

    def check(*_):
        assert_equal(params, twins)
        g0 = gradient()
        e = perturbation([p.detach() for p in twins], g0, [RHO, RHO], [False, False])
        gp, gm = gradient(+1, e), gradient(-1, e)
        for p, q, g, d1, d2 in zip(params, twins, gp, *differences(g0, gp, gm), strict=True):
            assert_close(p.grad, g + ALPHA * d2 + BETA * d1, EXACT, "ghat")
            q.grad = p.grad.clone()

    optimizer.base_optimizer.register_step_pre_hook(check)
    for index in range(STEPS):
        torch.manual_seed(index)
        optimizer.step(closure_of(params))
        torch.manual_seed(index)
        twin.step()
        assert_equal(params, twins)
    assert not torch.equal(params[0], start[0])


@cases
def test_training_continues_from_a_checkpoint(case):
    params = matrices(torch.float32)
    optimizer = make(params, case)
    take(optimizer, params)
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    resumed = make(saved["params"], case)
    resumed.load_state_dict(saved["optimizer"])
    take(optimizer, params)
    take(resumed, saved["params"])
    assert_equal(params, saved["params"])


@cases
def test_training_continues_from_a_deep_copy(case):
    params = matrices(torch.float32)
    optimizer = make(params, case)
    take(optimizer, params)
    copied_params, copied = copy.deepcopy((params, optimizer))
    take(optimizer, params)
    assert not torch.equal(params[0], copied_params[0])
    take(copied, copied_params)
    assert_equal(params, copied_params)


def test_options_of_the_same_name_are_kept_apart():
    """RACS has options alpha, beta and gamma: it receives its gamma, but not CRSAM's alpha and beta."""
    library = pytest.importorskip("pytorch_optimizer")
    w, v = matrices()
    groups = [{"params": [w], "gamma": 1.5, "alpha": 0.4}, {"params": [v]}]
    optimizer = CRSAM(groups, library.RACS, alpha=ALPHA, beta=BETA, lr=0.01)
    assert [group["alpha"] for group in optimizer.param_groups] == [0.4, ALPHA]
    theirs = library.RACS([w]).defaults
    base = optimizer.base_optimizer.param_groups
    assert [group["gamma"] for group in base] == [1.5, theirs["gamma"]]
    assert {group["alpha"] for group in base} == {theirs["alpha"]}
    optimizer.step(closure_of([w, v]))
    assert [group["step"] for group in optimizer.param_groups] == [1, 1], "our state_dict holds its counter"


def test_muon_refuses_vectors():
    params = [*matrices(), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        CRSAM(params, torch.optim.Muon)


def test_muon_can_be_combined_with_adamw():
    """Both are in one optimizer, with one perturbation; two CRSAMs would each call the closure."""
    library = pytest.importorskip("pytorch_optimizer")
    w, v = params = matrices()
    groups = [{"params": [w], "use_muon": True}, {"params": [v], "use_muon": False}]
    optimizer = CRSAM(groups, library.Muon, lr=0.01)
    before = loss_of(params)
    take(optimizer, params)
    assert loss_of(params) < before
    assert "momentum_buffer" in optimizer.state[w]
    assert "exp_avg_sq" in optimizer.state[v]


@pytest.mark.parametrize("name", ["Lookahead", "OrthoGrad", "ScheduleFreeWrapper", "TRAC"])
def test_wrapper_optimizers_are_passed_as_instances(name):
    """An optimizer that wraps another one is passed as an instance; our state_dict holds its state."""
    wrapper = getattr(pytest.importorskip("pytorch_optimizer"), name)

    def make_wrapped(params):
        optimizer = CRSAM(params, wrapper(torch.optim.SGD(params, lr=0.05, momentum=0.9)))
        optimizer.train()
        return optimizer

    params = matrices(torch.float32)
    optimizer = make_wrapped(params)
    before = loss_of(params)
    take(optimizer, params)
    assert loss_of(params) < before
    resumed_params = clones(params)
    resumed = make_wrapped(resumed_params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take(optimizer, params)
    take(resumed, resumed_params)
    assert_equal(params, resumed_params)


SCHEDULE_FREE = [
    "schedulefree.AdamWScheduleFree",
    "schedulefree.SGDScheduleFree",
    "pytorch_optimizer.ScheduleFreeAdamW",
]


@pytest.mark.parametrize("case", SCHEDULE_FREE)
def test_modes_of_schedule_free_optimizers_work(case):
    """eval() moves the parameters to the average and train() moves them back, as without CRSAM; a checkpoint of the
    average resumes."""
    params = matrices(torch.float32)
    optimizer = make(params, case)
    take(optimizer, params)
    there = clones(params)
    optimizer.eval()
    assert not torch.equal(params[0], there[0])
    average, saved = clones(params), copy.deepcopy(optimizer.state_dict())
    optimizer.eval()
    assert_equal(params, average)
    optimizer.train()
    assert_close(params[0], there[0], 1e-6)

    resumed = make(average, case)
    resumed.load_state_dict(saved)
    resumed.train()
    take(optimizer, params)
    take(resumed, average)
    assert_equal(params, average)


def test_step_in_evaluation_mode_keeps_the_parameters():
    library = pytest.importorskip("schedulefree")
    params = matrices()
    before = clones(params)
    optimizer = CRSAM(params, library.AdamWScheduleFree)
    with pytest.raises(Exception, match="not in train mode"):
        optimizer.step(closure_of(params))
    assert_equal(params, before)


def test_mode_cannot_change_within_a_step():
    """Trainers call train() before every forward, which is allowed; eval() would move perturbed parameters."""
    library = pytest.importorskip("schedulefree")
    params = matrices()
    optimizer = CRSAM(params, library.SGDScheduleFree)
    optimizer.train()
    closure_of(params)()
    optimizer.first_step(zero_grad=True)
    moved = clones(params)
    optimizer.train()
    assert_equal(params, moved)
    with pytest.raises(RuntimeError, match=r"eval\(\) called in the middle of a step: second_step\(\)"):
        optimizer.eval()


def test_modes_of_ordinary_optimizers_have_no_effect():
    """Loops can call train() and eval() for every optimizer without checking its type."""
    params = matrices()
    optimizer = CRSAM(params)
    optimizer.eval()
    optimizer.train()
    optimizer.step(closure_of(params))


EVALUATES = ["torch.optim.LBFGS", "schedulefree.AdamWScheduleFreeClosure", "schedulefree.SGDScheduleFreeClosure"]


@pytest.mark.parametrize("case", EVALUATES)
def test_optimizers_that_call_the_closure_are_refused(case):
    cls, _ = named(case)
    with pytest.raises(ValueError, match=f"{cls.__name__} evaluates the loss within its step"):
        CRSAM(matrices(), cls)


def test_other_types_of_base_optimizers_are_refused():
    library = pytest.importorskip("schedulefree")
    params = matrices()
    wrapper = library.ScheduleFreeWrapper(torch.optim.SGD(params))
    with pytest.raises(TypeError, match=r"class or an instance of torch\.optim\.Optimizer"):
        CRSAM(params, wrapper)


@pytest.mark.parametrize("name", ["AliG", "AdaHessian"])
def test_optimizers_that_need_more_than_a_gradient_raise(name):
    """They raise in the first step, and the parameters do not change."""
    library = pytest.importorskip("pytorch_optimizer")
    params = matrices()
    before = clones(params)
    optimizer = CRSAM(params, getattr(library, name))
    with pytest.raises(Exception, match=r"requires closure|does not require grad"):
        optimizer.step(closure_of(params))
    assert_equal(params, before)
