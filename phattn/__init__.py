"""Probabilistic hard attention: a model that looks at an image one glimpse at a time, where it expects to learn most."""

__version__ = "0.2.0"

from .data import ImageSet, digits
from .model import HardAttention, ModelConfig
from .policy import EIG, Trace, View, look

__all__ = ["EIG", "HardAttention", "ImageSet", "ModelConfig", "Trace", "View", "digits", "look"]
