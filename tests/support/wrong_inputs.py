"""Right and wrong values for every option, made from signatures, type hints and a table of ranges.

Types, signs and sizes that are wrong follow from an option's annotation. What else a value must be
stands in `RANGES`, which is written by hand: it does not read the checks that it tests.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import lightning.pytorch as pl

from prunelight import callbacks
from prunelight.callbacks.recovery.checkpoint import RecoveryCheckpoint
from prunelight.callbacks.recovery.token_budget import TokenBudget
from prunelight.evaluation.speed import LatencyProtocol
from prunelight.pruning.sparsity.alps import ALPS
from prunelight.pruning.sparsity.sparsegpt import SparseGPT
from prunelight.recovery.distillation.objective import Distillation
from prunelight.recovery.lora import LoRA
from prunelight.recovery.quantization import BitsAndBytes
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule

INF, NAN = float("inf"), float("nan")
HUGE = 10**30


@dataclass(frozen=True)
class Target:
    """A class whose arguments are options: what makes it, and where it stands in a config.

    Attributes:
        place: keys of a config that lead to its arguments.
        others: arguments that must be there beside the one that is tried.
        around: other settings of the run without which the options have no effect.
        is_callback: it is an entry of trainer.callbacks.
    """

    made: Any
    place: tuple[str, ...] = ()
    others: tuple[tuple[str, Any], ...] = ()
    around: tuple[tuple[str, Any], ...] = ()
    is_callback: bool = False


def _callback(made: Any, **others: Any) -> Target:
    return Target(made, others=tuple(others.items()), is_callback=True)


TARGETS = {
    "model": Target(RecoveryModule, ("model",)),
    "model.lora": Target(LoRA, ("model", "lora")),
    "model.distillation": Target(
        Distillation, ("model", "distillation"), around=(("model.loss", "kd"),)
    ),
    "model.bitsandbytes": Target(
        BitsAndBytes, ("model", "bitsandbytes"), around=(("model.quantization", "nf4"),)
    ),
    "model.latency": Target(LatencyProtocol, ("model", "latency")),
    "data": Target(TextDataModule, ("data",)),
    "trainer": Target(pl.Trainer, ("trainer",)),
    "ShortGPT": _callback(callbacks.ShortGPT, num_layers=2),
    "SLEB": _callback(callbacks.SLEB, num_layers=2),
    "DepthPruning": _callback(callbacks.DepthPruning, num_layers=2),
    "BudgetPruning": _callback(callbacks.BudgetPruning, budget=0.75, multiple=8),
    "ShortenedLlama": _callback(callbacks.ShortenedLlama, num_layers=2, protected=[0]),
    "SlidingLayerMerging": _callback(callbacks.SlidingLayerMerging, num_layers=2),
    "LaCo": _callback(callbacks.LaCo, num_layers=2),
    "SliceGPT": _callback(callbacks.SliceGPT, slice_ratio=0.25),
    "DynamicSlicing": _callback(callbacks.DynamicSlicing, slice_ratio=0.25),
    "WidthPruning": _callback(callbacks.WidthPruning, neuron_ratio=0.25, multiple=8),
    "ExpertPruning": _callback(callbacks.ExpertPruning, num_experts=1),
    "WeightPruning": _callback(callbacks.WeightPruning, sparsity=0.5),
    "DLP": _callback(callbacks.DLP, sparsity=0.5),
    "TokenBudget": _callback(TokenBudget, tokens=64),
    "RecoveryCheckpoint": _callback(RecoveryCheckpoint),
    "sparsegpt": Target(
        SparseGPT, others=(("sparsity", 0.5), ("solver", "sparsegpt")), is_callback=True
    ),
    "alps": Target(ALPS, others=(("sparsity", 0.5), ("solver", "alps")), is_callback=True),
    "schedule": Target(
        Schedule,
        others=(("sparsity", 0.5), ("schedule", {"start_step": 0, "end_step": 2})),
        is_callback=True,
    ),
}
# Of Lightning's Trainer: what a config of ours names, or a run may well set. The others are objects
# of Lightning, or settings that it checks by itself.
TRAINER_OPTIONS = (
    "accelerator", "strategy", "devices", "num_nodes", "precision", "callbacks", "fast_dev_run",
    "max_epochs", "max_steps", "max_time", "limit_train_batches", "limit_val_batches",
    "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps",
    "enable_checkpointing", "enable_progress_bar", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "deterministic", "profiler", "logger", "overfit_batches",
    "reload_dataloaders_every_n_epochs", "default_root_dir",
)  # fmt: skip


# Options that the command line fills in from others.
LINKED = ("data.tokenizer", "data.trust_remote_code")


@dataclass(frozen=True)
class Range:
    """Values of an option: those that are right, and those that are wrong beside wrong types."""

    right: tuple[Any, ...] = ()
    wrong: tuple[Any, ...] = ()


def _range(*right: Any, wrong: tuple[Any, ...] = ()) -> Range:
    return Range(right, wrong)


_RATIO = (-0.1, 1, 1.0, 2, -1, 1e300)
_COUNT = (0, -1)
_HEALED = (
    *("ShortGPT", "SLEB", "ShortenedLlama", "SlidingLayerMerging", "LaCo", "DepthPruning"),
    *("SliceGPT", "DynamicSlicing", "WidthPruning", "WeightPruning", "DLP", "BudgetPruning"),
)
_LAYERS = (-1, 6, 7, 1000)  # of a model of 6 layers
_PROTECTED = ([6], [-7], [0, 99], [0, 1, 2, 3, 4, 5])
RANGES: dict[str, Range] = {
    "model.name": _range(wrong=("", "no/such-model", "/nowhere")),
    "model.dtype": _range("auto", "float32", "bfloat16", "float16", wrong=("fp16", "int8", "")),
    "model.recovery": _range("none", "lora", "full", wrong=("Lora", "")),
    "model.learning_rate": _range(1e-4, 1, wrong=(0, -1e-4, -1)),
    "model.warmup_steps": _range(0, 1, 1000, wrong=(-1,)),
    "model.lr_scheduler": _range(
        "linear",
        "cosine",
        "constant",
        "warmup_stable_decay",
        wrong=("reduce_lr_on_plateau", "greedy", "cosin", ""),
    ),
    "model.lr_scheduler_kwargs": _range({}, None, wrong=({"no_such": 1}, {"num_cycles": 1})),
    "model.attn_implementation": _range(None, "sdpa", "eager", wrong=("spda", "")),
    "model.compile_backend": _range(None, wrong=("inducto", "")),
    "model.loss": _range("lm", "kd", "kd_topk", wrong=("KD", "ce", "")),
    "model.quantization": _range("none", wrong=("int4", "")),
    "model.lora.r": _range(1, 8, 32, wrong=_COUNT),
    "model.lora.alpha": _range(1, 16, wrong=_COUNT),
    "model.lora.dropout": _range(0, 0.05, wrong=_RATIO),
    "model.lora.targets": _range(
        None,
        ["q_proj"],
        ["q_proj", "down_proj"],
        wrong=(
            [],
            [""],
            ["no_proj"],
            ["input_layernorm"],
            ["norm"],
            ["self_attn"],
            ["q_proj", "x"],
            ["embed"],
            ["layers"],
        ),
    ),
    "model.distillation.temperature": _range(1, 2.0, wrong=(0, -1)),
    "model.distillation.lm_weight": _range(0, 1, 0.5, wrong=(-0.1, 1.1, 2)),
    "model.distillation.k": _range(64, wrong=_COUNT),
    "model.distillation.hidden_weight": _range(0, 1.0, wrong=(-0.1,)),
    "model.distillation.teacher": _range("memory", wrong=("ram", "")),
    "model.distillation.name": _range(None, wrong=("no/such-model", "/nowhere", "")),
    "model.distillation.cache": _range(None, wrong=("",)),
    "model.bitsandbytes.compute_dtype": _range("auto", "float32", wrong=("fp16", "")),
    "model.latency.prompt": _range("The river", wrong=("", " ")),
    "model.latency.num_tokens": _range(1, 4, wrong=_COUNT),
    "model.latency.batch_size": _range(1, 2, wrong=_COUNT),
    "model.latency.num_warmup": _range(0, 1, wrong=(-1,)),
    "model.latency.num_runs": _range(2, 3, wrong=(1, 0, -1)),
    "data.train": _range(wrong=("", [], "no/such-data", "/nowhere.txt", [""], ["/nowhere.txt"])),
    "data.validation": _range(wrong=("", [], "no/such-data", "/nowhere.txt")),
    "data.calibration": _range(wrong=("", [], "no/such-data", "/nowhere.txt")),
    "data.seq_len": _range(8, 32, 64, wrong=(1, 0, -1, 10**9, 129)),
    "data.calibration_seq_len": _range(8, 64, None, wrong=(1, 0, -1, 10**9, 129)),
    "data.validation_seq_len": _range(8, 64, None, wrong=(1, 0, -1, 10**9, 129)),
    "data.batch_size": _range(1, 4, 1000, wrong=_COUNT),
    "data.num_calibration": _range(1, 4, wrong=(0, -1, 10**9)),
    "data.num_validation": _range(1, 3, None, wrong=(0, -1, 10**9)),
    "data.packing": _range("stream", "documents", wrong=("rows", "")),
    "data.text_field": _range("text", wrong=("",)),
    "data.bos": _range("auto", "always", "never", wrong=("yes", "")),
    "data.seed": _range(0, 1234567, wrong=(HUGE,)),
    "data.num_workers": _range(0, 1, wrong=(-1,)),
    "trainer.accelerator": _range("cpu", "auto", wrong=("gpuu", "cuda", "tpu", "")),
    "trainer.strategy": _range("auto", wrong=("fsdpp", "fsdp", "")),
    "trainer.devices": _range(1, "auto", "1", wrong=(0, -5, -1, "x", [], "", [-1])),
    "trainer.num_nodes": _range(1, wrong=(0, -1)),
    "trainer.precision": _range("32-true", "bf16-true", 32, wrong=("fp16", "bf16-tru", 8, "")),
    "trainer.callbacks": _range(wrong=("ShortGTP", "ShortGPTs", "no.such.Class", [3], 3, [None])),
    "trainer.max_epochs": _range(1, 2, -1, None, wrong=(-2, -5)),
    "trainer.max_steps": _range(1, 2, wrong=(-2, -7)),
    "trainer.max_time": _range("00:00:01:00", {"minutes": 1}, None, wrong=("x", {"minute": 1}, "")),
    "trainer.limit_train_batches": _range(1, 1.0, 0.5, None, wrong=(-1, 1.5, -0.5)),
    "trainer.limit_val_batches": _range(0, 1, 1.0, 0.5, None, wrong=(-1, 1.5, -0.5)),
    "trainer.val_check_interval": _range(1, 2, 1.0, 0.5, None, wrong=(-1, 0, 1.5, 1000, "x", "")),
    "trainer.check_val_every_n_epoch": _range(1, 2, wrong=(0, -1)),
    "trainer.num_sanity_val_steps": _range(0, 1, -1, None, wrong=(-2,)),
    "trainer.log_every_n_steps": _range(1, 0, 50, None, wrong=(-1,)),
    "trainer.fast_dev_run": _range(False, wrong=(-1,)),
    "trainer.accumulate_grad_batches": _range(1, 2, wrong=(0, -1)),
    "trainer.gradient_clip_val": _range(1, 1.0, 0, None, wrong=(-1,)),
    "trainer.gradient_clip_algorithm": _range("norm", "value", None, wrong=("l2", "")),
    "trainer.deterministic": _range(True, False, "warn", None, wrong=("x",)),
    "trainer.profiler": _range("simple", None, wrong=("fast",)),
    "trainer.logger": _range(False, None, wrong=("TensorBord", "")),
    "trainer.overfit_batches": _range(0.0, wrong=(-1, 1.5)),
    "trainer.reload_dataloaders_every_n_epochs": _range(0, 1, wrong=(-1,)),
    "ShortGPT.ratio": _range(0.34, wrong=_RATIO),
    "ShortGPT.num_layers": _range(0, 1, 5, wrong=_LAYERS),
    "ShortGPT.score": _range(
        *("block_influence", "angular", "relative_magnitude", "sequential", "reverse"),
        wrong=("BI", "", "random"),  # without a seed
    ),
    "ShortGPT.ignore_first_tokens": _range(0, 4, 31, wrong=(-1, 32, 1000)),
    "ShortGPT.protected": _range([], [0, -1], None, wrong=_PROTECTED),
    "ShortGPT.granularity": _range("layer", "attention", "mlp", "sublayer", wrong=("layers", "")),
    "ShortGPT.export_remote_code": _range(False, wrong=(True,)),
    "ShortGPT.loads_in": _range(None, ["vLLM"], [], wrong=(["vllm"], ["ollama"], [""])),
    "ShortGPT.layers": _range([], [0, -1], wrong=(*_PROTECTED, [1, 1], [1, -5], None)),
    "ShortGPT.parameter_ratio": _range(0, 0.1, wrong=(*_RATIO, 0.99, None)),
    "ShortGPT.seed": _range(0, 7, wrong=(-1, None)),
    **{
        f"{name}.heal": _range("none", "linear", "layer", wrong=("ridge", "", True))
        for name in _HEALED
    },
    **{
        f"{name}.heal": _range("none", "linear", "layer", "mlp", wrong=("ridge", "", True))
        for name in ("ShortGPT", "SLEB", "ShortenedLlama")
    },
    "DepthPruning.num_layers": _range(0, 1, 5, wrong=_LAYERS),
    "DepthPruning.ratio": _range(0.34, wrong=_RATIO),
    "DepthPruning.parameter_ratio": _range(0, 0.1, wrong=(*_RATIO, 0.99, None)),
    "DepthPruning.protected": _range([], [0, -1], None, wrong=_PROTECTED),
    "BudgetPruning.budget": _range(0.75, 0.9, wrong=(*_RATIO, 0, 0.01)),
    "BudgetPruning.metric": _range("parameters", "memory", "latency", wrong=("flops", "")),
    "BudgetPruning.allocation": _range("uniform", "by_layer", "none", wrong=("global", "")),
    "BudgetPruning.protected": _range([], [0, -1], None, wrong=_PROTECTED[:2]),
    "BudgetPruning.multiple": _range(1, 8, 16, wrong=_COUNT),
    "BudgetPruning.cache_tokens": _range(None, wrong=(*_COUNT, 16)),
    "BudgetPruning.latency_table": _range(None, wrong=("", "/nowhere")),
    "BudgetPruning.export_remote_code": _range(False, wrong=(True,)),
    "SLEB.ratio": _range(0.34, wrong=_RATIO),
    "SLEB.num_layers": _range(0, 1, 4, wrong=(*_LAYERS, 5)),
    "SLEB.criterion": _range("nll", "kl", "cosine", "cka", "cosine_flat", wrong=("mse", "")),
    "SLEB.protected": _range([], [0, -1], None, wrong=_PROTECTED),
    "ShortenedLlama.ratio": _range(0.34, wrong=_RATIO),
    "ShortenedLlama.num_layers": _range(0, 1, 4, wrong=_LAYERS),
    "ShortenedLlama.score": _range("perplexity", "taylor", "magnitude", wrong=("ppl", "")),
    "ShortenedLlama.protected": _range([], [0, -1], wrong=_PROTECTED),
    "ShortenedLlama.loads_in": _range(None, ["vLLM"], [], wrong=(["vllm"], ["ollama"], [""])),
    "SlidingLayerMerging.num_layers": _range(0, 1, wrong=_LAYERS),
    "SlidingLayerMerging.ratio": _range(0.34, wrong=_RATIO),
    "SlidingLayerMerging.threshold": _range(0.9, -1, 1, wrong=(1.1, 2)),
    "SlidingLayerMerging.merge": _range(
        *("top", "difference_sum", "released", "mean", "lowest"), wrong=("sum", "delete", "")
    ),
    "SlidingLayerMerging.criterion": _range(
        *("nll", "kl", "cosine", "cka", "cosine_flat"), wrong=("mse", "")
    ),
    "SlidingLayerMerging.limit": _range("model", "merge", None, wrong=("layer", "")),
    "SlidingLayerMerging.search": _range("swaps", "sliding", None, wrong=("slide", "")),
    "SlidingLayerMerging.ignore_first_tokens": _range(0, 4, 31, wrong=(-1, 32, 1000)),
    "SlidingLayerMerging.protected": _range([], [-1], None, wrong=_PROTECTED),
    "SliceGPT.slice_ratio": _range(0.25, 0, 0.5, wrong=_RATIO),
    "SliceGPT.parameter_ratio": _range(0.1, wrong=_RATIO),
    "SliceGPT.round_to": _range(1, 8, wrong=(0, -1, 1000)),
    "SliceGPT.embedding": _range("auto", "full", "sliced", wrong=("whole", "")),
    "SliceGPT.signal": _range("auto", "residual", "normalized", wrong=("norm", "")),
    "SliceGPT.orientation": _range("pca", "random", wrong=("PCA", "")),
    "SliceGPT.rotation": _range("per_layer", "shared", wrong=("one", "")),
    "SliceGPT.seed": _range(0, 7, wrong=(HUGE,)),
    "DynamicSlicing.slice_ratio": _range(0.25, 0.5, wrong=_RATIO),
    "DynamicSlicing.base_ratio": _range(
        0.1, 0, 0.25, [0, 0.1], None, wrong=(0.3, -0.1, 1, [], [0.3])
    ),
    "DynamicSlicing.parameter_ratio": _range(0.1, wrong=_RATIO),
    "DynamicSlicing.round_to": _range(1, 8, wrong=(0, -1, 1000)),
    "DynamicSlicing.embedding": _range("auto", "full", "sliced", wrong=("whole", "")),
    "DynamicSlicing.signal": _range("residual", "normalized", wrong=("auto", "")),
    "DynamicSlicing.orientation": _range("pca", "random", wrong=("PCA", "")),
    "DynamicSlicing.seed": _range(0, 7, wrong=(HUGE,)),
    "DynamicSlicing.slice_ratios": _range([0.25] * 6, wrong=([], [0.25], [0.25] * 5 + [1.0], None)),
    "DynamicSlicing.redundancy_text": _range(
        "sample:validation", None, wrong=("", [], "no-such-file.txt", "sample:valid")
    ),
    "DynamicSlicing.score": _range("block_influence", "single_cut", wrong=("BI", "")),
    "LaCo.threshold": _range(0.9, -1, 1, wrong=(1.1, 2)),
    "LaCo.num_layers": _range(0, 1, wrong=_LAYERS),
    "LaCo.ratio": _range(0.34, wrong=_RATIO),
    "LaCo.window": _range(2, 3, wrong=(0, 1, -1, 1000)),
    "LaCo.protected": _range([], [-1], None, wrong=_PROTECTED),
    "WidthPruning.neuron_ratio": _range(0.25, 0.5, wrong=(*_RATIO, 0.99)),
    "WidthPruning.head_ratio": _range(0.5, wrong=_RATIO),
    "WidthPruning.intermediate_size": _range(64, 96, wrong=(0, -1, 33, 136, 1000)),
    "WidthPruning.num_key_value_heads": _range(1, 2, wrong=(0, -1, 3, 1000)),
    "WidthPruning.score": _range("wanda", "taylor", "fluctuation", wrong=("l1", "")),
    "WidthPruning.multiple": _range(1, 8, 16, wrong=(0, -1)),
    "WidthPruning.allocation": _range("uniform", "global", "dlp", wrong=("owl", "", "flap")),
    "WidthPruning.correction": _range(True, False, "bias", wrong=("mean", "")),
    "WidthPruning.skip_first": _range(0, 1, wrong=(-1, 6, 1000)),
    "WidthPruning.skip_last": _range(0, 1, wrong=(-1, 6, 1000)),
    "WidthPruning.alpha": _range(None, wrong=(-0.1, 0.1)),
    "WidthPruning.export_remote_code": _range(False, wrong=(True,)),
    # The model of these runs has no experts, so that no value is right.
    "ExpertPruning.num_experts": _range(wrong=(-1,)),
    "ExpertPruning.ratio": _range(wrong=_RATIO),
    "ExpertPruning.score": _range(wrong=("reap ", "", "REAP")),
}
for _name in ("WeightPruning", "DLP"):
    RANGES |= {
        f"{_name}.sparsity": _range(0.5, 0, 0.7, wrong=_RATIO),
        f"{_name}.pattern": _range(
            "2:4",
            "4:8",
            wrong=("4:2", "2/4", "4:4", "0:4", "-1:4", "2:5", "2:7", "", 124, "2:1000"),
        ),
        f"{_name}.solver": _range(
            "wanda", "sparsegpt", "magnitude", "wanda_variant", "alps", wrong=("gptq", "")
        ),
        f"{_name}.swaps": _range(0, 1, wrong=(-1,)),
        f"{_name}.outlier_factor": _range(5.0, wrong=(0, -1, 6)),
        f"{_name}.granularity": _range("layer", wrong=("matrix", "")),
    }
RANGES |= {
    "WeightPruning.allocation": _range(
        "uniform", "owl", "dlp", "dlp_mean", "lamp", "ramp", wrong=("OWL", "")
    ),
    "WeightPruning.alpha": _range(0, None, wrong=(-0.1, 0.1, [], "auto")),
    "DLP.allocation": _range("dlp", "dlp_mean", wrong=("DLP", "")),
    "DLP.alpha": _range(0, 0.1, 0.15, None, "auto", [0, 0.1], wrong=(-0.1, [], [-0.1])),
    "WeightPruning.statistic": _range("median", wrong=("mean", "")),
    "DLP.statistic": _range("median", "mean", "sum", "max", "std", "var", wrong=("mode", "")),
    "TokenBudget.tokens": _range(64, 128, wrong=(0, -1)),
    "RecoveryCheckpoint.every_n_train_steps": _range(1, 50, wrong=(0, -1)),
    "RecoveryCheckpoint.dirpath": _range(None, wrong=("",)),
    "sparsegpt.dampening": _range(0.01, 1, wrong=(0, -0.1)),
    "sparsegpt.block_size": _range(1, 128, wrong=_COUNT),
    "sparsegpt.bits": _range(4, 8, None, wrong=(3, 16, 0, -4)),
    "sparsegpt.group_size": _range(64, 128, wrong=_COUNT),
    "alps.dampening": _range(0.01, 1, wrong=(0, -0.1)),
    "alps.iterations": _range(3, 300, wrong=_COUNT),
    "schedule.start_step": _range(0, 1, wrong=(-1, 2, 3)),
    "schedule.end_step": _range(1, 2, wrong=(0, -1, 3, 1000)),
    "schedule.every": _range(1, 10, wrong=_COUNT),
    "schedule.curve": _range("cubic", "linear", wrong=("cosine", "")),
}
SHORTGPT = {"class_path": "ShortGPT", "init_args": {"num_layers": 2}}
# What must be set beside an option so that its values mean something.
BESIDE: dict[str, dict[str, Any]] = {
    "ShortGPT.ratio": {"num_layers": None},
    "ShortGPT.layers": {"num_layers": None},
    "ShortGPT.parameter_ratio": {"num_layers": None},
    "ShortGPT.seed": {"score": "random"},
    "SLEB.ratio": {"num_layers": None},
    "DepthPruning.ratio": {"num_layers": None},
    "DepthPruning.parameter_ratio": {"num_layers": None},
    "ShortenedLlama.ratio": {"num_layers": None},
    "SlidingLayerMerging.ratio": {"num_layers": None},
    "SlidingLayerMerging.threshold": {"num_layers": None},
    "SliceGPT.parameter_ratio": {"slice_ratio": None},
    "DynamicSlicing.parameter_ratio": {"slice_ratio": None},
    "DynamicSlicing.slice_ratios": {"slice_ratio": None},
    "LaCo.ratio": {"num_layers": None},
    "LaCo.threshold": {"num_layers": None},
    "WidthPruning.intermediate_size": {"neuron_ratio": None},
    "ExpertPruning.ratio": {"num_experts": None},
    "WeightPruning.pattern": {"sparsity": None},
    "DLP.pattern": {"sparsity": None},
    "model.distillation.k": {"model.loss": "kd_topk"},
    "model.distillation.cache": {"model.loss": "kd_topk"},
    "sparsegpt.group_size": {"bits": 4},
    "trainer.gradient_clip_algorithm": {"trainer.gradient_clip_val": 1.0},
    "trainer.overfit_batches": {},
    "TokenBudget.tokens": {"trainer.max_steps": -1},
    "data.calibration": {"trainer.callbacks": SHORTGPT},
    "data.calibration_seq_len": {"trainer.callbacks": SHORTGPT},
    "data.num_calibration": {"trainer.callbacks": SHORTGPT},
    "data.seed": {"trainer.callbacks": SHORTGPT},
    **{
        f"model.latency.{name}": {"num_tokens": 4}
        for name in ("prompt", "batch_size", "num_warmup", "num_runs")
    },
}


@dataclass(frozen=True)
class Case:
    """One value of one option, with the settings of the run around it."""

    option: str
    value: Any
    right: bool

    def __str__(self) -> str:
        """Return "option=value"."""
        return f"{self.option}={self.value!r}"

    def is_named_in(self, text: str) -> bool:
        """Return whether an error names the option or its value."""
        name = self.option.rpartition(".")[2]
        parts = [*self.value] if isinstance(self.value, (dict, list)) else []
        return any(str(x) in text for x in (name, repr(self.value), self.value, *parts))


def options() -> dict[str, Any]:
    """Return every option with its annotation."""
    found = {}
    for name, target in TARGETS.items():
        hints = get_type_hints(target.made if is_dataclass(target.made) else target.made.__init__)
        for argument in inspect.signature(target.made).parameters:
            if name == "trainer" and argument not in TRAINER_OPTIONS:
                continue
            if f"{name}.{argument}" in LINKED:
                continue
            found[f"{name}.{argument}"] = hints.get(argument, Any)
    return found


def wrong_types(hint: Any) -> list[Any]:
    """Return values that no reading of an annotation allows, written as YAML has them."""
    if hint is Any:
        return []
    if get_origin(hint) in (Union, types.UnionType):
        allowed = get_args(hint)
        every = [value for part in allowed for value in wrong_types(part)]
        return [value for value in _unique(every) if not any(_allows(p, value) for p in allowed)]
    if get_origin(hint) is Literal:
        return ["no such choice", 3, [], {}, None]
    if get_origin(hint) is list:
        (part,) = get_args(hint)
        return ["x", 3, {"a": 1}, None, *([value] for value in wrong_types(part))]
    by_type = {
        bool: ["x", 2, NAN, [], {}, None],
        int: ["x", 1.5, NAN, INF, -INF, True, [], {}, "", None],
        float: ["x", NAN, INF, -INF, True, [], {}, "", None],
        str: [3, 1.5, True, [], {}, None],
        dict: ["x", 3, [1], None],
    }
    origin = get_origin(hint) or hint
    if origin in by_type:
        return by_type[origin]
    if is_dataclass(hint):
        return ["x", 3, [1], {"no_such_field": 1}]
    return []


def _allows(hint: Any, value: Any) -> bool:
    """Return whether a value may well be meant for a part of a union."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is Any:
        return True
    origin = get_origin(hint) or hint
    if origin is types.NoneType:
        return value is None
    kinds: dict[Any, tuple[type, ...]] = {float: (int, float), dict: (dict,), bool: (bool,)}
    right = isinstance(value, kinds.get(origin, (origin,) if isinstance(origin, type) else ()))
    if origin is list and right:
        return all(_allows(get_args(hint)[0], part) for part in value)
    if isinstance(value, bool) and origin in (int, float):
        return False
    return right and not ((isinstance(value, float) and value in (INF, -INF)) or value != value)


def _unique(values: list[Any]) -> list[Any]:
    return list({repr(value): value for value in values}.values())


def option_cases() -> Iterator[Case]:
    """Yield right and wrong values of all options."""
    for option, hint in options().items():
        known = RANGES.get(option, Range())
        for value in known.right:
            yield Case(option, value, right=True)
        for value in _unique([*known.wrong, *wrong_types(hint)]):
            if repr(value) not in map(repr, known.right):
                yield Case(option, value, right=False)


def config_of(case: Case, base: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a run in which an option has a value."""
    name, argument = case.option.rsplit(".", 1)
    target = TARGETS[name]
    config = {section: dict(settings) for section, settings in base.items()}
    for path, value in (*target.around, *BESIDE.get(case.option, {}).items()):
        if "." in path:
            section, _, key = path.partition(".")
            config[section][key] = value
    if not target.is_callback:
        place = config
        for key in target.place:
            place = place.setdefault(key, {})
        if target.place and target.place[-1] == name.rpartition(".")[2]:
            beside = BESIDE.get(case.option, {}).items()
            place.update({key: value for key, value in beside if "." not in key})
        place[argument] = case.value
        return config
    own = {key: value for key, value in BESIDE.get(case.option, {}).items() if "." not in key}
    arguments = dict(target.others)
    if name in ("sparsegpt", "alps", "schedule"):
        made = "WeightPruning"
        arguments[name] = {**dict(arguments.get(name, {})), **own, argument: case.value}
    else:
        made, arguments = name, {**arguments, **own, argument: case.value}
    arguments = {
        key: value for key, value in arguments.items() if not (key in own and value is None)
    }
    entry = {"class_path": f"prunelight.callbacks.{made}", "init_args": arguments}
    config["trainer"]["callbacks"] = [entry]
    return config
