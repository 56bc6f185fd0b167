"""Seeds that depend only on where random numbers are used: a sample of an epoch, or a step on a rank.

No generator state has to be saved: a run that resumes in the middle of an epoch, with another number of workers or
ranks, draws the same numbers for its images and batches.
"""

import random

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """Return a seed in [0, 2**63) that depends on all numbers and their order.

    The numbers are in [0, 2**64). Each takes one round of SplitMix64 (Steele, Lea and Flood 2014).
    """
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Seed Python, NumPy, PyTorch on the CPU, and optionally PyTorch on one device.

    This takes about 15 µs; ``torch.manual_seed`` takes 240 µs.

    Args:
        seed: in [0, 2**63).
        device: the additional device to seed; None or a CPU device for none.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
