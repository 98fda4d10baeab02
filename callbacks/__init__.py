"""Lightning callbacks, one file a pruning method."""

from prunelight.callbacks.base import PruningCallback
from prunelight.callbacks.shortgpt import ShortGPT

__all__ = ["PruningCallback", "ShortGPT"]
