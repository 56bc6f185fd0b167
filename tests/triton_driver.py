"""A Triton driver without a GPU: kernels are compiled, and a launch ends where it would call CUDA."""

from collections.abc import Callable
from types import SimpleNamespace

__all__ = ["without_gpu"]


def without_gpu(launched: Callable[..., None]) -> SimpleNamespace:
    """Return the driver; every launch calls ``launched`` with the arguments of Triton's launcher."""
    from triton.backends.compiler import GPUTarget

    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (object(), 0, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        unload_module=lambda module: None,
    )
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        launcher_cls=lambda source, metadata: launched,
        utils=utils,
    )
