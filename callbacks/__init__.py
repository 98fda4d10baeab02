"""Lightning callbacks, one file a pruning method."""

from prunelight.callbacks.base import PruningCallback
from prunelight.callbacks.dlp import DLP
from prunelight.callbacks.shortgpt import ShortGPT

__all__ = ["DLP", "PruningCallback", "ShortGPT"]
