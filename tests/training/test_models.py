import pytest
import torch

from crsam_ext.training.errors import TrainingError
from crsam_ext.training.models import MODELS, create_model

pytestmark = pytest.mark.slow


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
def test_size_and_output(name, shape, parameters):
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


def test_timm_model_for_one_image_size_is_made_for_that_of_the_data():
    model = create_model("vit_tiny_patch16_224", (3, 32, 48), 10)

    assert model.pos_embed.shape == (1, 1 + 2 * 3, 192)
    assert model(torch.zeros(2, 3, 32, 48)).shape == (2, 10)


def test_model_that_does_not_take_the_samples():
    with pytest.raises(TrainingError, match=r"vit_tiny_patch16_224 does not take samples of shape \(3, 8, 8\): "):
        create_model("vit_tiny_patch16_224", (3, 8, 8), 10)
