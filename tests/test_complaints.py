"""Common complaints about SAM optimizers in PyTorch: each case works, or raises a one-line error that says what to do.

Tested elsewhere:

- KeyError "old_p" or "e_w" for parameters without gradients, frozen and thawed layers, tied weights, empty parameters,
  sparse embeddings, what a closure returns, a forgotten backward, autocast's cache, LSTMs, inference_mode, `model.to`
  after the optimizer was made, edits of weights between steps (LoRA's merging), two optimizers: `test_hard_inputs.py`
- NaN under fp16, weights that stay perturbed after an error, batch norm counted twice, another dropout mask in each
  pass, momentum lost on resuming, loading before the first step, deepcopy and pickle, schedulers and their warning,
  hooks of steps and of state: `test_invariants.py`
- groups with and without weight decay, clipping: `test_optimizer.py`
- trainers and file formats: `test_integrations.py`; other base optimizers: `test_base_optimizers.py`
"""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_, parametrizations, prune

from crsam_ext import CRSAM

from .reference import EXACT, assert_close

SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
OPTIONS = {"lr": 0.1, "momentum": 0.9, "rho": 0.1}
X, Y = torch.linspace(-1, 1, 64, dtype=torch.float64).sin().view(16, 4), torch.arange(16) % 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def closure_of(model, x=X, y=Y):
    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def trained(model=None, steps=2, closure=None, **options):
    """Return a model after some steps, and its optimizer."""
    model = network() if model is None else model
    optimizer = CRSAM(model.parameters(), SGD, **{**OPTIONS, **options})
    for _ in range(steps):
        optimizer.step(closure or closure_of(model))
    return model, optimizer


def assert_equal(model, other, tolerance=0.0):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(p, q, tolerance)


# Gradients -----------------------------------------------------------------------------------------------------------


def test_accumulation_within_the_closure_works():
    model = network()

    def closure():
        for rows in (slice(0, 8), slice(8, 16)):
            (F.cross_entropy(model(X[rows]), Y[rows]) / 2).backward()

    trained(model, closure=closure)
    assert_equal(model, trained()[0], EXACT)


def test_accumulation_between_calls_works():
    model = network()
    optimizer = CRSAM(model.parameters(), SGD, **OPTIONS)
    for _ in range(2):
        for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
            for rows in (slice(0, 8), slice(8, 16)):
                (F.cross_entropy(model(X[rows]), Y[rows]) / 2).backward()
            call(zero_grad=True)
    assert_equal(model, trained()[0], EXACT)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_user_may_call_zero_grad_between_calls(set_to_none):
    model = network()
    optimizer = CRSAM(model.parameters(), SGD, **OPTIONS)
    for _ in range(2):
        for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
            optimizer.zero_grad(set_to_none=set_to_none)
            closure_of(model)()
            call()
    assert_equal(model, trained()[0], EXACT)


def test_closure_may_call_zero_grad():
    model = network()

    def closure():
        model.zero_grad(set_to_none=False)
        return closure_of(model)()

    trained(model, closure=closure)
    assert_equal(model, trained()[0])


def test_backward_before_the_step_is_not_counted_twice():
    """Other implementations require it; CRSAM does not count the existing gradient twice."""
    model = network()
    optimizer = CRSAM(model.parameters(), SGD, **OPTIONS)
    for _ in range(2):
        closure_of(model)()
        optimizer.step(closure_of(model))
    assert_equal(model, trained()[0])


def test_clip_grad_norm_after_the_step_has_no_effect():
    """p.grad is g0 and only informative; max_grad_norm clips the update."""
    model, optimizer = trained(steps=1)
    assert clip_grad_norm_(model.parameters(), 1e-3) > 1e-3
    optimizer.step(closure_of(model))
    assert_equal(model, trained()[0])


def test_gradient_hooks_act_in_every_pass():
    model = network()
    frozen = model[0].weight.detach()[:2].clone()
    mask = torch.ones(8, 1, dtype=torch.float64)
    mask[:2] = 0
    calls = []
    model[0].weight.register_hook(lambda g: g * mask)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad is not None))
    trained(model)
    assert torch.equal(model[0].weight[:2], frozen)
    assert calls == [True] * 6


def test_gradient_of_another_loss_is_ignored():
    """A discriminator's backward also fills the generator's gradients, which must not enter the generator's step."""
    generator, critic = network(), nn.Linear(3, 1).double()
    first = CRSAM(critic.parameters(), SGD, **OPTIONS)
    second = CRSAM(generator.parameters(), SGD, **OPTIONS)

    def loss_of_critic():
        critic(generator(X)).square().mean().backward()

    for _ in range(2):
        first.step(loss_of_critic)
        assert generator[0].weight.grad is not None
        second.step(closure_of(generator))
    assert_equal(generator, trained()[0])


def test_graph_from_outside_the_closure_is_refused():
    """Without a new forward, autograd refuses the second backward, and the weights are w."""
    model = network()
    before = copy.deepcopy(model)
    optimizer = CRSAM(model.parameters(), SGD, **OPTIONS)
    loss = F.cross_entropy(model(X), Y)
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time|modified by an inplace"):
        optimizer.step(lambda: loss.backward())
    assert_equal(model, before)


def test_detect_anomaly_works():
    with torch.autograd.set_detect_anomaly(True, check_nan=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = trained()
    assert_equal(model, trained()[0])


def test_metrics_are_counted_once():
    """pass_index tells a closure with side effects which pass it computes, also after a step that failed."""
    model = network()
    optimizer = CRSAM(model.parameters(), SGD, **OPTIONS)
    seen = []

    def closure():
        seen.append(optimizer.pass_index)
        return closure_of(model)()

    optimizer.step(closure)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0 if closure() and optimizer.pass_index else None)
    optimizer.step(closure)
    assert seen == [0, 1, 2, 0, 1, 0, 1, 2]
    closure_of(model)()
    optimizer.first_step(zero_grad=True)
    assert optimizer.pass_index == 1


def test_closure_may_return_more_than_a_loss():
    model = network()

    def closure():
        logits = model(X)
        loss = F.cross_entropy(logits, Y)
        loss.backward()
        return loss, logits

    loss, logits = CRSAM(model.parameters(), SGD, **OPTIONS).step(closure)
    assert F.cross_entropy(logits, Y) == loss


# Models --------------------------------------------------------------------------------------------------------------


def test_compiled_model_is_compiled_once():
    """Neither the passes nor moving the parameters into the flat buffer triggers recompilation."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    plain = network()
    model = torch.compile(plain, backend=backend)
    model(X)
    trained(plain, closure=closure_of(model))
    torch._dynamo.reset()
    assert len(compiled) == 1
    assert_equal(plain, trained()[0], EXACT)


@pytest.mark.parametrize("views", [False, True])
def test_distributed_data_parallel_works(views, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = network()
        model = nn.parallel.DistributedDataParallel(plain, gradient_as_bucket_view=views)

        def closure():
            with model.no_sync():
                (F.cross_entropy(model(X[:8]), Y[:8]) / 2).backward()
            (F.cross_entropy(model(X[8:]), Y[8:]) / 2).backward()

        trained(plain, closure=closure)
    finally:
        torch.distributed.destroy_process_group()
    assert_equal(plain, trained()[0], EXACT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, nn.DataParallel needs the model there")
def test_data_parallel_works():
    model = network()
    trained(model, closure=closure_of(nn.DataParallel(model)))
    assert_equal(model, trained()[0])


def test_activation_checkpointing_with_dropout_works():
    def run(checkpointed):
        body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        with torch.no_grad():
            for index, p in enumerate(body.parameters()):
                p.copy_(torch.arange(p.numel(), dtype=torch.float64).add(index).sin().view_as(p))
        forward = body
        if checkpointed:
            forward = lambda x: torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False)  # noqa: E731
        torch.manual_seed(0)
        return trained(body, closure=closure_of(forward))[0]

    assert_equal(run(True), run(False))


def test_weight_norm_works():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
    before = closure_of(model)().item()
    trained(model, steps=5)
    assert closure_of(model)().item() < before
    direction, length = model[0].parametrizations.weight.original1, model[0].parametrizations.weight.original0
    assert_close(model[0].weight, length * direction / direction.norm(dim=1, keepdim=True), EXACT)


def test_parametrization_can_be_removed_after_training():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 3)).double()
    trained(model)
    expected = model(X)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert_close(model(X), expected, EXACT)
    trained(model)


def test_pruned_weights_stay_pruned():
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    trained(model)
    prune.remove(model[0], "weight")
    assert (model[0].weight == 0).sum() == 16


def test_padding_row_of_an_embedding_stays_zero():
    embedding = nn.Embedding(5, 3, padding_idx=0)
    closure = closure_of(embedding, torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 0]))
    trained(embedding, closure=closure)
    assert not embedding.weight[0].any()
    assert embedding.weight[1].any()


def test_embedding_with_max_norm_works():
    """max_norm writes to the weights in every forward: the write in the pass at w persists, the one at w + e is
    undone."""
    embedding = nn.Embedding(5, 3, max_norm=0.5).double()
    untouched = embedding.weight[4].detach().clone()
    rows = torch.tensor([0, 1, 2, 3])
    trained(embedding, closure=closure_of(embedding, rows, rows % 3), lr=0.0)
    assert torch.equal(embedding.weight[4], untouched)
    assert_close(embedding.weight[:4].norm(dim=1), [0.5] * 4, 1e-6)


def test_head_can_be_replaced():
    """The old head's parameters stay in the optimizer without effect; the new head's are added."""
    model, optimizer = trained()
    old = model[2]
    kept = copy.deepcopy(old)
    model[2] = nn.Linear(8, 3).double()
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1.0})
    before = copy.deepcopy(model[2])
    optimizer.step(closure_of(model))
    assert_equal(old, kept)
    assert not torch.equal(model[2].weight, before.weight)


def test_parameters_can_be_set_from_a_vector():
    model, optimizer = trained()
    vector = nn.utils.parameters_to_vector(network().parameters()).detach()
    optimizer.state.clear()
    nn.utils.vector_to_parameters(vector, model.parameters())
    for _ in range(2):
        optimizer.step(closure_of(model))
    assert_equal(model, trained()[0], EXACT)


def test_shared_memory_works():
    """Data loaders and Hogwild move the weights to shared memory, and training continues there."""
    model, optimizer = trained(steps=1)
    model.share_memory()
    optimizer.step(closure_of(model))
    assert_equal(model, trained()[0])
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True))


# Averages, copies, files ---------------------------------------------------------------------------------------------


def test_average_of_weights_excludes_perturbed_weights():
    """The average is that of w after every step."""
    model = network()
    optimizer = CRSAM(model.parameters(), SGD, **OPTIONS)
    average = torch.optim.swa_utils.AveragedModel(model)
    visited = []
    for _ in range(3):
        optimizer.step(closure_of(model))
        average.update_parameters(model)
        visited.append(model[0].weight.detach().clone())
    assert_close(average.module[0].weight, sum(visited) / 3, EXACT)


def test_copy_of_a_model_is_independent():
    model, optimizer = trained()
    copied = copy.deepcopy(model)
    kept = {name: value.clone() for name, value in copied.state_dict().items()}
    optimizer.step(closure_of(model))
    assert all(torch.equal(value, kept[name]) for name, value in copied.state_dict().items())
    trained(copied)


@pytest.mark.parametrize("base", [SGD, ADAMW, torch.optim.Adafactor])
def test_checkpoint_loads_with_weights_only(base):
    model = network()
    optimizer = CRSAM(model.parameters(), base, lr=0.1)
    optimizer.step(closure_of(model))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = network()
    other.load_state_dict(loaded["model"])
    resumed = CRSAM(other.parameters(), base, lr=0.1)
    resumed.load_state_dict(loaded["optimizer"])
    optimizer.step(closure_of(model))
    resumed.step(closure_of(other))
    assert_equal(model, other)


def test_checkpoint_of_another_sam_loads():
    """It contains old weights or perturbations and no momentum: they have no effect, and the state starts from zero."""
    model = network()
    optimizer = CRSAM(model.parameters(), SGD, **OPTIONS)
    scratch = {i: {"old_p": torch.ones_like(p), "e_w": torch.ones_like(p)} for i, p in enumerate(model.parameters())}
    group = {"lr": 0.1, "momentum": 0.9, "rho": 0.1, "adaptive": False, "params": list(range(4))}
    optimizer.load_state_dict({"state": scratch, "param_groups": [group]})
    for _ in range(2):
        optimizer.step(closure_of(model))
    assert_equal(model, trained()[0])


# Options -------------------------------------------------------------------------------------------------------------


def test_scheduler_of_the_base_optimizer_works():
    """A scheduler bound to ``optimizer.base_optimizer``, as others recommend, changes the same groups, without a false
    warning."""
    model = network()
    optimizer = CRSAM(model.parameters(), SGD, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.step(closure_of(model))
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.025


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"capturable": True}], ids=str)
def test_flags_of_the_base_optimizer_have_no_effect(flags):
    """They select torch's implementation of the update, which is not used here."""
    models = network(), network()
    for model, options in zip(models, (flags, {}), strict=True):
        optimizer = CRSAM(model.parameters(), ADAMW, lr=0.1, **options)
        for _ in range(2):
            optimizer.step(closure_of(model))
    assert_equal(*models)


def test_batch_size_and_length_may_change():
    """CRSAM stores nothing about the batch."""
    model, optimizer = trained()
    for rows in (1, 16, 3):
        optimizer.step(closure_of(model, X[:rows], Y[:rows]))
    assert optimizer.stats.skipped == 0
