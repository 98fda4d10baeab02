"""Lightning callbacks: one file a pruning method, and what recovery and studies need."""

from prunelight.callbacks.base import PruningCallback
from prunelight.callbacks.budget_pruning import BudgetPruning
from prunelight.callbacks.depth_pruning import DepthPruning
from prunelight.callbacks.dlp import DLP
from prunelight.callbacks.dynamic_slicing import DynamicSlicing
from prunelight.callbacks.expert_pruning import ExpertPruning
from prunelight.callbacks.laco import LaCo
from prunelight.callbacks.orthogonality import Orthogonality
from prunelight.callbacks.recovery.checkpoint import RecoveryCheckpoint
from prunelight.callbacks.recovery.progress import TrainingProgress
from prunelight.callbacks.recovery.token_budget import TokenBudget
from prunelight.callbacks.shortened_llama import ShortenedLlama
from prunelight.callbacks.shortgpt import ShortGPT
from prunelight.callbacks.sleb import SLEB
from prunelight.callbacks.slicegpt import SliceGPT, SlicingCallback
from prunelight.callbacks.sliding_layer_merging import SlidingLayerMerging
from prunelight.callbacks.task_evaluation import TaskEvaluation
from prunelight.callbacks.weight_pruning import WeightPruning
from prunelight.callbacks.width_pruning import WidthPruning
from prunelight.moved import serve_old_names

__all__ = [
    "DLP",
    "SLEB",
    "BudgetPruning",
    "DepthPruning",
    "DynamicSlicing",
    "ExpertPruning",
    "LaCo",
    "Orthogonality",
    "PruningCallback",
    "RecoveryCheckpoint",
    "ShortGPT",
    "ShortenedLlama",
    "SliceGPT",
    "SlicingCallback",
    "SlidingLayerMerging",
    "TaskEvaluation",
    "TokenBudget",
    "TrainingProgress",
    "WeightPruning",
    "WidthPruning",
]

serve_old_names(__name__)
