"""Images: where they come from, how they are held, and how they are varied."""

from .augmentation import augment
from .images import ImageSet, denormalise, normalise, read_image
from .scenes import digits

__all__ = ["ImageSet", "augment", "denormalise", "digits", "normalise", "read_image"]
