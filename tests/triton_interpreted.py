"""Patches that make Triton's interpreter correct and fast enough for tests."""

from typing import Any

import numpy as np

#: Triton's own functions, by name.
unpatched: dict[str, Any] = {}


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return the bits of float32 numbers rounded to the nearest bfloat16, ties to even, as on a GPU."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def prepare() -> None:
    """Patch the interpreter. Call this once."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    unpatched["_convert_float"] = interpreter._convert_float

    def convert_float(x, from_dtype, to_dtype, rounding_mode):
        if from_dtype == float32 and to_dtype == bfloat16:  # Triton truncates here
            return round_to_bfloat16(np.ascontiguousarray(x, np.float32)).reshape(x.shape)
        return unpatched["_convert_float"](x, from_dtype, to_dtype, rounding_mode)

    interpreter._convert_float = convert_float
    patch_lang, patched = interpreter._patch_lang, set()

    def patch_once(function):
        # Without this patch, every launch and every call between kernel functions replaces the functions of
        # triton.language, which takes milliseconds, and most launches restore them.
        modules = frozenset(name for name in ("tl", "core") if name in function.__globals__)
        if modules not in patched:
            patched.add(modules)
            patch_lang(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
