"""What type checkers see of the package: the names of `_HOMES` in __init__.py."""

from prunelight.calibration.shared_windows import share_windows as share_windows
from prunelight.data.sources import read_documents as read_documents
from prunelight.data.token_windows import calibration_windows as calibration_windows
from prunelight.evaluation.perplexity import evaluate as evaluate
from prunelight.evaluation.perplexity import perplexity as perplexity
from prunelight.evaluation.speed import LatencyProtocol as LatencyProtocol
from prunelight.models.loading import load as load
from prunelight.models.loading import load_tokenizer as load_tokenizer
from prunelight.models.saving import save as save
from prunelight.planning.plan import Plan as Plan
from prunelight.planning.steps import DropSublayers as DropSublayers
from prunelight.planning.steps import MergeLayers as MergeLayers
from prunelight.planning.steps import PruneWidth as PruneWidth
from prunelight.planning.steps import RemoveLayers as RemoveLayers
from prunelight.planning.steps import SliceHidden as SliceHidden
from prunelight.planning.steps import Sparsify as Sparsify
from prunelight.pruning.apply import apply as apply
from prunelight.recovery.distillation.objective import Distillation as Distillation
from prunelight.recovery.lora import LoRA as LoRA
from prunelight.recovery.quantization import BitsAndBytes as BitsAndBytes
from prunelight.recovery.zeros.gradual_zeros import Schedule as Schedule
from prunelight.scoring.analysis import analyze as analyze
from prunelight.training.recovery_module import RecoveryModule as RecoveryModule
from prunelight.training.text_datamodule import TextDataModule as TextDataModule
from prunelight.training.trainer import Trainer as Trainer
from prunelight.version import __version__ as __version__
