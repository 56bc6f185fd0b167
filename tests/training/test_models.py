"""Models and training steps: losses, parameter groups, passes, compilation."""

import pytest
import torch
from torch.nn import functional as F

from crsam_ext.training import steps
from crsam_ext.training.errors import TrainingError
from crsam_ext.training.measure import Parts
from crsam_ext.training.models import MODELS, create_model
from crsam_ext.training.options import parse
from crsam_ext.training.steps import Objective, Step, create_optimizer, criterion

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mlp", (40,), 40 * 256 + 256 + 256 * 256 + 256 + 2560 + 10),
        ("cnn", (1, 8, 8), 21_482),
        ("cnn", (40,), 9_002),
        ("cifar_resnet18", (3, 32, 32), 11_173_962),
        ("wrn28_10", (3, 32, 32), 36_479_194),
        ("pyramidnet110", (3, 32, 32), 28_485_477),
    ],
)
def test_models_have_the_right_size_and_output(name, shape, parameters):
    with torch.device("meta"):
        model = MODELS[name](shape, 10)
        outputs = model(torch.zeros(2, *shape))

    assert outputs.shape == (2, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_mlp_of_mnist1d_has_two_hidden_layers_of_256():
    layers = [
        (module.in_features, module.out_features)
        for module in create_model("mlp", (40,), 10).modules()
        if isinstance(module, torch.nn.Linear)
    ]

    assert layers == [(40, 256), (256, 256), (256, 10)]


@pytest.mark.parametrize("name", ["cifar_resnet18", "cnn"])
def test_every_parameter_is_trained(name):
    model = create_model(name, (3, 32, 32), 7)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()

    assert all(parameter.grad is not None for parameter in model.parameters())


def test_timm_model_takes_the_channels_and_classes_of_the_data():
    assert create_model("test_resnet", (1, 32, 32), 7)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_unknown_model_suggests_close_names():
    with pytest.raises(TrainingError, match=r"--model resnet5O is unknown; did you mean .*resnet50"):
        create_model("resnet5O", (3, 32, 32), 10)


def test_timm_model_with_a_fixed_image_size_gets_the_size_of_the_data():
    model = create_model("vit_tiny_patch16_224", (3, 32, 48), 10)

    assert model.pos_embed.shape == (1, 1 + 2 * 3, 192)
    assert model(torch.zeros(2, 3, 32, 48)).shape == (2, 10)


def test_model_that_does_not_accept_the_samples_is_refused():
    with pytest.raises(TrainingError, match=r"vit_tiny_patch16_224 does not accept samples of shape \(3, 8, 8\): "):
        create_model("vit_tiny_patch16_224", (3, 8, 8), 10)


def test_model_accepts_other_sizes_if_they_change():
    name = "vit_tiny_patch16_224"
    model = create_model(name, (3, 64, 64), 10, other_sizes=True)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 10)
    model = create_model(name, (3, 64, 64), 10)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    with pytest.raises(AssertionError):
        model(torch.zeros(2, 3, 96, 96))


def test_drop_path_sets_stochastic_depth():
    rates = [m.drop_prob for m in create_model("test_vit", (3, 64, 64), 10, drop_path=0.2).modules() if drops(m)]
    assert max(rates) == pytest.approx(0.2)
    assert not any(drops(module) for module in create_model("test_vit", (3, 64, 64), 10).modules())
    with pytest.raises(TrainingError, match="--drop-path and --model-kwargs need a timm model, not mlp"):
        create_model("mlp", (3, 64, 64), 10, drop_path=0.2)


def drops(module):
    return type(module).__name__ == "DropPath"


@pytest.mark.parametrize("name", ["mlp", "cnn", "test_vit", "test_resnet"])
def test_bias_of_the_head_is_set(name):
    model = create_model(name, (3, 160, 160), 10, head_bias=-10.0)
    head = model.get_classifier() if hasattr(model, "get_classifier") else model[-1]

    assert head.bias.tolist() == [-10.0] * 10
    assert sum(p.eq(-10).all().item() for p in model.parameters()) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_equal_those_of_torch_and_timm(smoothing):
    from timm.loss import BinaryCrossEntropy

    logits, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    dense = torch.rand(6, 4).softmax(1)
    for labels in (y, dense):
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(criterion(logits, labels, smoothing), expected)
    # timm smooths labels only (1 - s is added to the label, s / classes to all classes): dense targets come smoothed.
    timm_loss = BinaryCrossEntropy(smoothing=smoothing, sum_classes=True)
    torch.testing.assert_close(criterion(logits, y, smoothing, bce=True), timm_loss(logits, y))
    smoothed = (1 - smoothing) * dense + smoothing / 4
    torch.testing.assert_close(criterion(logits, dense, smoothing, bce=True), timm_loss(logits, smoothed))
    single = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").sum(1).mean()
    torch.testing.assert_close(criterion(logits, dense, smoothing, bce=True), single)


def test_evaluation_uses_no_label_smoothing():
    objective = Objective(torch.nn.Identity(), parse(["--label-smoothing", "0.1"]))
    logits, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])

    assert objective.loss_to_test(logits, y) == F.cross_entropy(logits, y)
    assert objective(logits, y)[0] == F.cross_entropy(logits, y, label_smoothing=0.1)


def groups_of(name, command):
    """Return the names of the parameters in each group, by its weight decay."""
    options = parse(command.split())
    model = create_model(name, (3, 160, 160), 10)
    optimizer = create_optimizer(Objective(model, options), options)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}
    assert sorted(name for group in groups.values() for name in group) == sorted(names.values())
    return groups, model


def test_norms_and_biases_do_not_decay():
    groups, model = groups_of("test_resnet", "--decay-of matrices --weight-decay 0.2")

    assert set(groups) == {0.0, 0.2}
    assert groups[0.2] == {name for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1}
    assert {"fc.bias", "bn1.weight", "bn1.bias"} < groups[0.0]
    assert {"fc.weight", "conv1.0.weight"} < groups[0.2]


def test_a_model_may_exclude_parameters_from_weight_decay():
    groups, model = groups_of("test_vit", "--decay-of matrices --weight-decay 0.2")

    kept = set(model.no_weight_decay())
    assert "pos_embed" in kept & groups[0.0]
    assert {"blocks.0.attn.qkv.weight", "head.weight"} < groups[0.2]
    assert {"norm.weight", "head.bias", "blocks.0.norm1.weight"} < groups[0.0]


def test_all_parameters_decay_by_default():
    assert set(groups_of("test_vit", "--decay-of all --weight-decay 0.2")[0]) == {0.2}


def stepping(command, model, cuda_graph=False):
    options = parse(["--lr", "0.01", *command.split()])
    objective = Objective(model, options)
    if options.compile:
        objective.compile(dynamic=False)
    optimizer = create_optimizer(objective, options)
    return Step(objective, optimizer, Parts(CPU), cuda_graph), objective, optimizer


@pytest.mark.parametrize(("options", "passes"), [("--optimizer sgd", 1), ("--optimizer sam", 2), ("", 3)])
def test_all_passes_of_a_step_see_the_same_batch(options, passes):
    seen = []

    class Spy(torch.nn.Linear):
        def forward(self, x):
            seen.append((x.data_ptr(), x.clone()))
            return super().forward(x)

    x, y = torch.randn(8, 5), torch.arange(8) % 3
    model = Spy(5, 3)
    expected = model(x).detach()
    seen.clear()
    step, _, _ = stepping(options, model)
    loss, logits = step(x, y)

    assert len(seen) == passes
    assert {pointer for pointer, _ in seen} == {x.data_ptr()}
    assert all(values.equal(x) for _, values in seen)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, F.cross_entropy(expected, y))


def test_graph_capture_adds_no_pass(monkeypatch):
    """The running statistics after a captured step equal those of an eager one."""
    monkeypatch.setattr(steps, "GraphedStep", lambda optimizer, closure: lambda: optimizer.step(closure))
    results = []
    for graph in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
        step, _, _ = stepping("", model, graph)
        for size in (8, 8, 6):
            loss, logits = step(torch.randn(size, 5), torch.arange(size) % 3)
        results.append((loss, logits, *model.state_dict().values()))

    assert all(first.equal(second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["mlp", "cnn", "test_vit", "test_resnet"])
def test_step_in_bfloat16_keeps_float32_weights(name):
    torch.manual_seed(0)
    model = create_model(name, (3, 160, 160), 4)
    step, _, optimizer = stepping("--amp", model)
    x, y = torch.randn(4, 3, 160, 160), torch.arange(4)
    losses = [float(step(x, y)[0]) for _ in range(3)]

    assert losses[2] < losses[0]
    assert int(optimizer.stats.skipped) == 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_one_compilation_for_each_size():
    """One compilation covers model and loss for all passes."""
    from torch._dynamo.utils import counters

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).mean((2, 3))

    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = parse(["--label-smoothing", "0.1", "--lr", "0.01"])
    objective = Objective(Tiny(), options)
    objective.compile(dynamic=False, backend=backend)  # as --compile does, but without Inductor, which is slow
    optimizer = create_optimizer(objective, options)
    step = Step(objective, optimizer, Parts(CPU))
    for size in (8, 8, 12, 12, 8):
        step(torch.randn(4, 3, size, size), torch.arange(4) % 4)

    assert counters["stats"]["unique_graphs"] == len(graphs) == 2
    assert not counters["graph_break"]
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op in ("call_function", "call_module")]
    assert any("cross_entropy" in name for name in called)
    assert any("conv" in name for name in called)
    torch._dynamo.reset()


def test_compiled_run_matches_the_eager_one(crsam_train, here, read_log):
    """Inductor sums in another order, so float32 losses differ by about 1e-6."""
    command = "--model mlp --epochs 1 --batch-size 512 --mixup 0.1 --optimizer sam --output"
    assert crsam_train(f"{command} plain") == 0
    assert crsam_train(f"{command} compiled --compile") == 0

    plain, compiled = (read_log(here / name)[0] for name in ("plain", "compiled"))
    for name in ("train_loss", "test_loss"):
        assert float(compiled[name]) == pytest.approx(float(plain[name]), rel=1e-4)
