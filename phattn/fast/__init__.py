"""What makes the same numbers faster on a CPU. Nothing in the story imports from here."""

from .memory import keep_freed_memory
from .parts import accelerate, choices, plain

__all__ = ["accelerate", "choices", "keep_freed_memory", "plain"]
