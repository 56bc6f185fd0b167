"""CR-SAM for PyTorch: sharpness-aware minimization with curvature regularization, fused over flat parameter buffers."""

from .amp import GradScaler
from .backends import available_backends
from .graphs import GraphedStep
from .optimizer import CRSAM
from .replicas import combine_wrapper
from .schedules import Scheduled
from .stats import Stats

__all__ = ["CRSAM", "GradScaler", "GraphedStep", "Scheduled", "Stats", "available_backends", "combine_wrapper"]
__version__ = "0.1.0"
