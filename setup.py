"""The packages and, once there is one, the CUDA extension; the rest of the metadata is in pyproject.toml.

torch is not imported here, so that a build in isolation needs nothing but setuptools.
"""

from __future__ import annotations

from typing import Any

from setuptools import find_packages, setup


def packages() -> list[str]:
    """Names under which the packages are installed."""
    kernels = find_packages(include=["triton_kernels", "triton_kernels.*"])
    return find_packages(include=["crsam_ext", "crsam_ext.*"]) + [f"crsam_ext.{name}" for name in kernels]


def cuda_extension() -> dict[str, Any]:
    """The arguments of `setup` that build `crsam_ext._C` from csrc/: none yet, the package is pure Python."""
    return {}


setup(
    packages=packages(),
    # Installed at the top level, `triton_kernels` would collide with the package of that name that Triton ships. The
    # mapping holds in a wheel and, through the import finder that setuptools writes, in `pip install -e .` as well. A
    # checkout that is merely on sys.path has no crsam_ext.triton_kernels.
    package_dir={"crsam_ext.triton_kernels": "triton_kernels"},
    **cuda_extension(),
)
