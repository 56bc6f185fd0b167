"""Parameter shapes of networks, in order, as plain data. Tests compare them with timm and crsam_ext.training."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["MODELS", "resnet50"]

Shapes = list[tuple[int, ...]]


def _norm(width: int) -> Shapes:
    """Return a weight and a bias."""
    return [(width,), (width,)]


def _resnet(blocks: tuple[int, int, int, int], bottleneck: bool) -> Shapes:
    """Return a ResNet for ImageNet (He et al., 2016)."""
    shapes: Shapes = [(64, 3, 7, 7), *_norm(64)]
    inputs = 64
    for width, count in zip((64, 128, 256, 512), blocks, strict=True):
        outputs = 4 * width if bottleneck else width
        for block in range(count):
            convolutions: Shapes = [(width, inputs, 3, 3), (width, width, 3, 3)]
            if bottleneck:
                convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1)]
            for shape in convolutions:
                shapes += [shape, *_norm(shape[0])]
            if block == 0 and inputs != outputs:
                shapes += [(outputs, inputs, 1, 1), *_norm(outputs)]
            inputs = outputs
    return [*shapes, (1000, inputs), (1000,)]


def resnet18() -> Shapes:
    """62 tensors, 11,689,512 elements."""
    return _resnet((2, 2, 2, 2), bottleneck=False)


def resnet50() -> Shapes:
    """161 tensors, 25,557,032 elements."""
    return _resnet((3, 4, 6, 3), bottleneck=True)


def resnet101() -> Shapes:
    """314 tensors, 44,549,160 elements."""
    return _resnet((3, 4, 23, 3), bottleneck=True)


def wrn28_10() -> Shapes:
    """WRN-28-10 for CIFAR-10 (Zagoruyko and Komodakis, 2016): 36,479,194 elements."""
    shapes: Shapes = [(16, 3, 3, 3)]
    inputs = 16
    for width in (160, 320, 640):
        for block in range(4):
            shapes += [*_norm(inputs), (width, inputs, 3, 3), *_norm(width), (width, width, 3, 3)]
            if block == 0:
                shapes.append((width, inputs, 1, 1))
            inputs = width
    return [*shapes, *_norm(inputs), (10, inputs), (10,)]


def pyramidnet110() -> Shapes:
    """Additive PyramidNet with 270 more channels and basic blocks, for CIFAR-10 (Han et al., 2017): 28,485,477
    elements."""
    shapes: Shapes = [(16, 3, 3, 3), *_norm(16)]
    inputs = 16
    for block in range(54):
        width = round(16 + 270 * (block + 1) / 54)
        shapes += [*_norm(inputs), (width, inputs, 3, 3), *_norm(width), (width, width, 3, 3), *_norm(width)]
        inputs = width
    return [*shapes, *_norm(inputs), (10, inputs), (10,)]


def _linear(outputs: int, inputs: int) -> Shapes:
    return [(outputs, inputs), (outputs,)]


def _transformer(width: int, depth: int) -> Shapes:
    """Return transformer blocks whose hidden layer has four times the width."""
    block = [*_norm(width), *_linear(3 * width, width), *_linear(width, width)]
    block += [*_norm(width), *_linear(4 * width, width), *_linear(width, 4 * width)]
    return block * depth


def _vit(width: int, depth: int, patch: int) -> Shapes:
    """Return a ViT for 224 x 224 pixels and 1000 classes (Dosovitskiy et al., 2021)."""
    tokens = (224 // patch) ** 2 + 1
    first: Shapes = [(1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,)]
    return [*first, *_transformer(width, depth), *_norm(width), *_linear(1000, width)]


def vit_s32() -> Shapes:
    """ViT-S/32: 22,878,952 elements."""
    return _vit(384, 12, 32)


def vit_b32() -> Shapes:
    """ViT-B/32: 88,224,232 elements."""
    return _vit(768, 12, 32)


def vit_l16() -> Shapes:
    """ViT-L/16: 304,326,632 elements."""
    return _vit(1024, 24, 16)


def gpt3_xl() -> Shapes:
    """The size of GPT-3 XL (Brown et al., 2020): 24 layers, width 2048, 50,257 tokens; 1,315,723,264 elements."""
    return [(50257, 2048), (2048, 2048), *_transformer(2048, 24), *_norm(2048)]


def tiny() -> Shapes:
    """3000 tensors of 1 to 64 elements, to measure only the overhead."""
    return [(1 + i % 64,) for i in range(3000)]


#: Shapes by the name of the model.
MODELS: dict[str, Callable[[], Shapes]] = {
    f.__name__: f
    for f in (resnet18, resnet50, resnet101, wrn28_10, pyramidnet110, vit_s32, vit_b32, vit_l16, gpt3_xl, tiny)
}
