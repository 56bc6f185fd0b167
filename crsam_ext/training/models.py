"""Models: two for small inputs, three CIFAR networks, and all timm models.

The CIFAR networks follow their papers for 32x32 inputs: ResNet-18 with a 3x3 stem and no pooling (He et al. 2016),
WRN-28-10 (Zagoruyko and Komodakis 2016), PyramidNet-110 with basic blocks and additive alpha = 270 (Han et al. 2017).
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import TrainingError


def mlp(shape: Sequence[int], classes: int) -> nn.Module:
    """Two hidden layers of 256 units with ReLU; input (N, *shape), output (N, classes)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def cnn(shape: Sequence[int], classes: int) -> nn.Module:
    """Two convolutions with batch norm, then average pooling; input (N, C, H, W), or (N, length) for 1-D data."""
    stem: nn.Module
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    pool: nn.Module
    if len(shape) == 3:
        stem, conv, norm, pool = nn.Identity(), nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d(2)
        channels = shape[0]
    else:
        stem, conv, norm, pool = nn.Unflatten(1, (1, shape[0])), nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d(4)
        channels = 1
    return nn.Sequential(
        stem,
        conv(channels, 32, 3, padding=1, bias=False),
        norm(32),
        nn.ReLU(),
        conv(32, 64, 3, stride=2, padding=1, bias=False),
        norm(64),
        nn.ReLU(),
        pool,
        nn.Flatten(),
        nn.Linear(256, classes),
    )


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class _Residual(nn.Module):
    """y = shortcut(x) + residual(x)."""

    def __init__(self, residual: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


def _resnet_block(inputs: int, outputs: int, stride: int) -> nn.Module:
    residual = nn.Sequential(
        _conv3x3(inputs, outputs, stride),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        _conv3x3(outputs, outputs),
        nn.BatchNorm2d(outputs),
    )
    shortcut: nn.Module = nn.Identity()
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(_Residual(residual, shortcut), nn.ReLU())


def cifar_resnet18(shape: Sequence[int], classes: int) -> nn.Module:
    """ResNet-18 with a 3x3 stem, 11.17 M parameters for 10 classes; input (N, C, 32, 32)."""
    layers: list[nn.Module] = [_conv3x3(shape[0], 64), nn.BatchNorm2d(64), nn.ReLU()]
    inputs = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            layers.append(_resnet_block(inputs, width, 2 if stage and not block else 1))
            inputs = width
    return _initialized(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)))


class _WideBlock(nn.Module):
    """Pre-activation block. If the shape changes, the shortcut starts after the first activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.residual = nn.Sequential(
            _conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU(), _conv3x3(outputs, outputs)
        )
        self.projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(x)
        shortcut = x if self.projection is None else self.projection(activated)
        return shortcut + self.residual(activated)


def wrn28_10(shape: Sequence[int], classes: int) -> nn.Module:
    """Wide ResNet of depth 28 and width 10, 36.5 M parameters for 10 classes; input (N, C, 32, 32)."""
    layers: list[nn.Module] = [_conv3x3(shape[0], 16)]
    inputs = 16
    for stage, width in enumerate((160, 320, 640)):
        for block in range(4):
            layers.append(_WideBlock(inputs, width, 2 if stage and not block else 1))
            inputs = width
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return _initialized(nn.Sequential(*layers))


class _PadShortcut(nn.Module):
    """Identity shortcut without parameters: average pooling if the block has a stride, zeros for added channels."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.added = added
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.added))


def _pyramid_block(inputs: int, outputs: int, stride: int) -> nn.Module:
    residual = nn.Sequential(
        nn.BatchNorm2d(inputs),
        _conv3x3(inputs, outputs, stride),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        _conv3x3(outputs, outputs),
        nn.BatchNorm2d(outputs),
    )
    return _Residual(residual, _PadShortcut(outputs - inputs, stride))


def pyramidnet110(shape: Sequence[int], classes: int) -> nn.Module:
    """PyramidNet of depth 110, additive alpha = 270, 28.5 M parameters for 10 classes; input (N, C, 32, 32)."""
    blocks = 18
    layers: list[nn.Module] = [_conv3x3(shape[0], 16), nn.BatchNorm2d(16)]
    inputs = 16
    for index in range(3 * blocks):
        width = 16 + round(270 * (index + 1) / (3 * blocks))
        layers.append(_pyramid_block(inputs, width, 2 if index in (blocks, 2 * blocks) else 1))
        inputs = width
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return _initialized(nn.Sequential(*layers))


def _initialized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


MODELS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "cifar_resnet18": cifar_resnet18,
    "wrn28_10": wrn28_10,
    "pyramidnet110": pyramidnet110,
}


def create_model(
    name: str,
    shape: Sequence[int],
    classes: int,
    drop_path: float | None = None,
    head_bias: float | None = None,
    other_sizes: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Create a model on the CPU, randomly initialized from the global random state.

    Args:
        name: one of :data:`MODELS`, or a timm model (never with pretrained weights).
        shape: shape of one sample, without the batch dimension: (length,) or (channels, height, width).
        classes: number of classes.
        drop_path: stochastic depth rate, for timm models.
        head_bias: initial bias of the last layer.
        other_sizes: whether the model must also accept images of other sizes.
        kwargs: additional arguments for timm models.

    Raises:
        TrainingError: the name is unknown, or the model does not accept this sample shape or these options.
    """
    if name not in MODELS and not timm.is_model(name):
        raise TrainingError(f"--model {name} is unknown{_suggestion(name)}")
    if name in MODELS and (drop_path is not None or kwargs):
        raise TrainingError(f"--drop-path and --model-kwargs need a timm model, not {name}")
    model: Any
    try:
        if name in MODELS:
            model = MODELS[name](shape, classes)
        else:
            model = timm.create_model(
                name,
                num_classes=classes,
                in_chans=shape[0],
                **_options_of_timm(name, shape, other_sizes, drop_path),
                **(kwargs or {}),
            )
        with torch.no_grad():
            outputs = model.eval()(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"--model {name} does not accept samples of shape {tuple(shape)}: {reason}") from error
    if outputs.shape != (2, classes):
        raise TrainingError(f"--model {name} is not a classifier: its output has shape {tuple(outputs.shape)}")
    if head_bias is not None:
        head: Any = model.get_classifier() if hasattr(model, "get_classifier") else list(model.modules())[-1]
        if getattr(head, "bias", None) is None:
            raise TrainingError(f"--head-init-bias: the last layer of {name} has no bias")
        nn.init.constant_(head.bias, head_bias)
    assert isinstance(model, nn.Module)
    return model


def _options_of_timm(name: str, shape: Sequence[int], other_sizes: bool, drop_path: float | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if drop_path is None else {"drop_path_rate": drop_path}
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is not None and config.fixed_input_size:
        options["img_size"] = tuple(shape[1:])
        if other_sizes:
            options["dynamic_img_size"] = True
    return options


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, [*MODELS, *timm.list_models()], n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
