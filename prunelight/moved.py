"""Old import paths: where each name went, with a DeprecationWarning that tells the new path.

`import prunelight.module`, `from prunelight.module import RecoveryModule`, a pickle, and
`class_path: prunelight.module.RecoveryModule` in a config give what they gave before. A module that
is gone is made at its import and looks up each name when it is asked for. A module that still has
its path, such as the folder `prunelight.recovery`, calls `serve_old_names` to do so too.

A function whose name a module took, such as `prunelight.evaluation.perplexity`, can be called as
before: its module is callable. `import prunelight` imports this file, so it needs nothing heavy.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any

_SLICED = "Gemma Llama Mistral OPT Phi3 Qwen2 Qwen3 SmolLM3"
_DROPPED = "Gemma Granite Llama Mistral Mixtral Phi3 Qwen2 Qwen3 Qwen3Moe SmolLM3"


def _generated(prefix: str, families: str, kinds: str) -> str:
    """Return the names of the classes that a module makes for each family."""
    return " ".join(
        f"{prefix}{family}{kind}" for family in families.split() for kind in kinds.split()
    )


# Old module -> new module -> its names, as "old=new" where a name changed too.
MOVED: dict[str, dict[str, str]] = {
    "adaptation": {
        "recovery.prepared_model": "Adapted=PreparedModel Settings=RecoverySettings",
    },
    "allocation": {
        "planning.layer_choice": (
            "check_depth_target layers_to_remove lowest=lowest_scores lowest_window resolve_indices"
        ),
        "planning.sparsity_shares": (
            "MOST=MAX_SHARE clipped_by=clipping_excess dlp fit_to_target "
            "mixed_kept=round_to_patterns owl uniform weighted_mean"
        ),
        "planning.slice_widths": "redundancies slicing_ratios slicing_widths uniform_width",
    },
    "analysis": {
        "scoring.analysis": "Analysis KERNELS analyze attention_to_first_token",
    },
    "architecture": {
        "models.families.architectures": (
            "ARCHITECTURES Architecture Sublayers architecture_of is_sliced sublayers_of"
        ),
        "models.families.own_classes.dropped_sublayers": "REGISTERED_PREFIX=PREFIX",
        "models.families.layers": "decoder_layers first_tensor layers_path",
        "models.families.matrices": "Matrix layer_matrices lora_targets matrices",
        "models.families.config_fields": (
            "accepts=config_accepts head_dim logits_finish maximum_length vocabulary_size"
        ),
        "models.families.rwkv": "restore_rwkv_scale",
    },
    "calibration": {
        "calibration.windows": (
            "Windows check_length check_windows counted_positions first_positions "
            "micro_batches next_token_labels split_windows"
        ),
        "models.forward": (
            "Visit evaluating hidden_name=hidden_states_argument "
            "run_layers=forward_without_head watching_layers"
        ),
        "models.placement": "replaced_forward",
    },
    "callbacks.base": {
        "training.trainer": "pruning_callbacks=pruning_methods",
        "run.checkpoints": "MEASURED",
    },
    "callbacks.dlp": {
        "callbacks.weight_pruning": "ALLOCATIONS ALPHAS GRANULARITIES",
        "callbacks.recovery.gradual_zeros": "GRADUAL_SOLVERS",
    },
    "callbacks.recovery_checkpoint": {
        "callbacks.recovery.checkpoint": "RecoveryCheckpoint",
    },
    "callbacks.slicegpt": {
        "pruning.slicing.targets": (
            "Candidate EMBEDDINGS check_slice_options check_slice_target meet_parameters "
            "residual_dims told_parameters=report_parameters"
        ),
    },
    "callbacks.token_budget": {
        "callbacks.recovery.token_budget": "TokenBudget",
    },
    "checkpoint": {
        "run.checkpoints": (
            "FORMAT KEY check_format check_same_parameters check_same_run check_same_settings "
            "facts_of=read_metadata"
        ),
        "runtime.files.atomic_files": "reading=explaining_read_errors",
    },
    "choices": {
        "runtime.arguments": "check_choice",
    },
    "cli": {
        "lightning_cli": "CLI Parser find_configs parse_error",
        "one_line_errors": "disk_error our_error",
        "training.trainer": "Trainer",
    },
    "components": {
        "pruning.slicing.basis": (
            "principal_components random_rotation read_basis set_weight signal_of write_basis"
        ),
    },
    "data": {
        "training.text_datamodule": "Example TextDataModule log_once pad_examples",
    },
    "distillation": {
        "recovery.distillation.objective": (
            "Distillation LOSSES Objective TEACHERS check_objective kept_layers "
            "hidden_loss=hidden_state_loss"
        ),
    },
    "distributed": {
        "run.strategies": (
            "FSDP2Strategy check_quantized_strategy check_strategy ranks_of_run=group_of_run "
            "share_of_tokens=loss_weight"
        ),
        "runtime.processes": "Result",
    },
    "ending": {},
    "evaluation": {
        "evaluation.perplexity": "Evaluation evaluate perplexity",
        "evaluation.speed": (
            "Latency LatencyProtocol Speed forward_seconds measure_latency measure_speed"
        ),
        "runtime.measuring": "Measurement peak_memory",
        "runtime.devices": "device_name free_memory synchronize",
        "models.forward": "greedy_tokens",
        "models.sizes": "linear_sparsity",
        "evaluation.stages": "measure_stage new_record",
        "models.placement": "place_for=device_for to_device where_it_fits=move_if_it_fits",
    },
    "files": {
        "runtime.files.atomic_files": (
            "check_writable explaining=explaining_write_errors flush newest_checkpoint "
            "remove_temporaries replacing=atomic_replacement"
        ),
    },
    "gradual": {
        "recovery.zeros.gradual_zeros": (
            "CURVES Gradual=GradualMasks RunningNorm Schedule weights_with_adapters"
        ),
    },
    "handover": {
        "run.preflight": "check_output",
        "run.run_state": "ADAPTER FINAL plan_files",
    },
    "head": {
        "recovery.distillation.language_head": "Head=LanguageHead plain=without_adapters",
    },
    "importance": {
        "scoring.importance": "magnitude_scores saliencies taylor_scores",
    },
    "loader": {
        "training.resuming.resumable_loader": "ResumableLoader",
    },
    "losses": {},  # where it was; `import prunelight` imported it too
    "maps": {
        "evaluation.report.writing": "bullets write_whole",
        "evaluation.report.heat_maps": "plot_angles plot_cka plot_states",
        "evaluation.report.analysis_report": "write_analysis",
    },
    "masking": {
        "recovery.zeros.masked_lora": (
            "MaskedParamWrapper MaskedSum MaskedUpdate MaskedVariant=MaskedLora "
            "PackedVariant=QuantizedMaskedLora mask_adapters"
        ),
        "recovery.zeros.weight_masks": "WeightMasks ZeroRecord pack=pack_mask unpack=unpack_mask",
    },
    "merging": {
        "pruning.merge_layers": "check_mergeable merged_layer merged_weights projection_names",
    },
    "metrics": {
        "evaluation.metrics": "TokenAccuracy TokenPerplexity",
        "losses": "counted_targets next_token_loss next_token_sums",
        "models.sizes": "parameter_bytes parameter_count zero_share",
    },
    "models": {
        "models.loading": (
            "BUNDLED DTYPES Source find_source load load_config load_tokenizer "
            "quiet_transformers reach=check_hub resolve_dtype"
        ),
    },
    "module": {
        "training.recovery_module": "RecoveryModule",
    },
    "orthogonality": {
        "evaluation.orthogonality": "Cell Interaction LIMIT ROWS orthogonality_section",
    },
    "packing": {
        "data.document_rows": "PACKINGS best_fit cut=cut_document pack_documents",
        "recovery.packed_rows": (
            "check_packed check_packing leakage=cross_document_attention model_inputs"
        ),
    },
    "plan": {
        "planning.plan": "FORMAT Plan sparsified=planned_sparsity",
        "planning.fingerprints": (
            "describe_model describe_windows fingerprint_of library_versions model_fingerprint"
        ),
    },
    "plots": {
        "evaluation.report.plan_facts": ("Json LayerZeros by_sublayer explained_variance percent"),
        "evaluation.report.layer_plots": "BLUE GREEN ORANGE draw_bars draw_panels plot_layers",
    },
    "precision": {
        "recovery.precision": "precision_faults",
    },
    "quantization": {
        "recovery.quantization": (
            "BLOCK BitsAndBytes FOUR_BIT QUANTIZATIONS check_kind check_quantizable "
            "check_widths describe_kind quantize quantized_matrices"
        ),
        "models.sizes": "stored_bytes",
    },
    "recording": {},
    "recovery": {
        "recovery.lora": (
            "LoRA attach_lora check_targets freeze make_trainable merge_lora train_all"
        ),
        "recovery.zeros.planned_zeros": "PlannedZeros",
        "recovery.schedules": "RECOVERIES check_settings make_schedule",
    },
    "regions": {
        "recovery.compiled_layers": "check_backend compile_layers uncompile_layers",
    },
    "replay": {
        "scoring.model_variants": "Replay=VariantReplay Unit=VariantLayer",
    },
    "report": {
        "evaluation.report.record": "Cost FORMAT RunRecord Stage",
        "evaluation.report.report": "summary_table write_report",
    },
    "resume": {
        "training.resuming.checkpoint_io": "AtomicCheckpointIO write_atomically",
        "training.resuming.exact_resume": "KEY seed_batch",
        "training.resuming.run_identity": "VOLATILE describe_run",
    },
    "retraining": {
        "recovery.overfitting": (
            "Evaluated=ValidationPoint METRIC TrainingText overfit_risk overfitting"
        ),
        "training.recovery_watch": "RecoveryWatch WatchedModule best_checkpoint restore",
    },
    "rotation": {
        "pruning.slicing.targets": "allowed_widths",
        "pruning.slicing.shared_rotation": (
            "check_shareable check_shared share_rotation shared_parameters"
        ),
    },
    "saving": {
        "models.saving": (
            "MARKER Saved=SavedModel check_replaceable name_code=name_remote_code save verify"
        ),
    },
    "scoring": {
        "scoring.block_influence": (
            "BlockInfluence block_influence block_influences sublayer_influences"
        ),
        "scoring.angular_distance": "angular_distance angular_distances",
        "calibration.statistics": "check_finite",
        "calibration.windows": "last_positions",
        "scoring.weight_scores": "WeightScore weight_scores",
    },
    "sharded": {
        "recovery.sharded_weights": (
            "gather_trained local=local_shard local_part=shard_like shard "
            "total=sum_over_shards trained_parameters whole=whole_tensor"
        ),
    },
    "shares": {
        "runtime.processes": "Ranks=ProcessGroup Result WAIT",
        "calibration.shared_windows": (
            "MICRO_BATCH_TOKENS SharedWindows first_row=first_own_window own_windows "
            "ranks_of=group_of share_windows"
        ),
    },
    "similarity": {
        "scoring.similarity": "CRITERIA Similarity similarity_to",
    },
    "sliced": {
        "models.families.own_classes.sliced": (
            "FAMILIES LAYERS MODELS=CLASSES PREFIX SHORTCUTS Shortcut SlicedGemmaLayer SlicedLayer "
            "SlicedModel SlicedOPTLayer SlicedPhi3Layer UnitNorm embeddings_of family_of "
            "last_norm norm_eps resize stack_of strip_last_norm strip_norms "
            + _generated("Sliced", _SLICED, "Config DecoderLayer ForCausalLM")
        ),
    },
    "slicing": {
        "pruning.slicing.slice_hidden": (
            "SliceOutcome Slicer check_slice check_sliceable check_tokens slice_hidden untie"
        ),
        "pruning.slicing.targets": "sliced_parameters",
    },
    "sliding": {
        "planning.sliding_search": (
            "Groups Slide=SlidingPass SpentError=BudgetExceededError exchange=swap_layers "
            "most_removable=max_removable_layers search=search_threshold slide "
            "windows_of=merge_windows"
        ),
    },
    "sparsify": {
        "pruning.sparsity.sparsify": (
            "Outcome=SparsifyOutcome SOLVERS amount_of check_data check_step sparsify"
        ),
    },
    "sparsity": {
        "pruning.sparsity.masks": (
            "Amount Pattern check_width count_zeros lowest_mask magnitude_mask matrix_mask "
            "row_mask wanda_mask wanda_variant_mask"
        ),
        "pruning.sparsity.sparsegpt": "SparseGPT inverse_factor sparsegpt sparsegpt_stacked",
        "scoring.weight_scores": "wanda_scores",
    },
    "statistics": {
        "calibration.cka": "CKA",
        "calibration.statistics": (
            "Gram Hessian InputNorm InputVariance MeanCosine exact_median token_cosine"
        ),
        "runtime.devices": "float64_device ties_in_any_order=allowing_nondeterministic_ties",
    },
    "steps": {
        "planning.steps": (
            "DropSublayers MERGES MergeLayers PruneWidth RemoveLayers SLICE_OPTIONS STEPS "
            "SliceHidden Sparsify Step layer_of renumber renumbered step_from_dict"
        ),
    },
    "sublayers": {
        "models.families.own_classes.dropped_sublayers": (
            "CLASSES DroppedSublayer SUBLAYERS dropped "
            + _generated("Prunelight", _DROPPED, "Config ForCausalLM")
        ),
        "pruning.drop_sublayers": (
            "check_droppable check_leading drop_sublayers fixed_sublayers leading_attentions"
        ),
    },
    "surgery": {
        "pruning.apply": "apply",
        "pruning.remove_layers": "check_removable remove_layers",
        "models.families.shorter_config": "cut_config",
        "pruning.merge_layers": "merge_layers",
    },
    "teacher_cache": {
        "recovery.distillation.teacher_cache": "BLOCK Batches DESCRIPTION FORMAT TeacherCache",
    },
    "teaching": {
        "run.teacher": "TeacherSource",
    },
    "trials": {
        "calibration.windows": "first_windows",
        "pruning.slicing.trial": "sliced_perplexity",
    },
    "variants": {},
    "walk": {
        "calibration.layer_inputs.input_statistics": "InputStatistics Statistic",
        "calibration.layer_walk": "Call LayerWalk",
    },
    "width": {
        "scoring.width_scores": (
            "KINDS Member=ProjectionPart SCORES Widths allowed_groups "
            "members_of=projection_parts width_scores widths_of"
        ),
        "pruning.prune_width": "check_width prune_width",
    },
    "windows": {
        "data.token_windows": (
            "Bos bos_token_id calibration_windows pack=pack_windows sample_indices tokenize "
            "tokenize_documents"
        ),
        "data.instructions": (
            "ALPACA_CONTEXT ALPACA_TEMPLATE INSTRUCTION_FIELDS Messages instruction_example "
            "is_instruction_row"
        ),
        "data.sources": "DATASET_NAME Row SAMPLES SUFFIXES read_documents",
        "losses": "IGNORED_LABEL",
    },
}

# The same for names that are gone, as their parameters were others: what does their work now.
REPLACED: dict[str, dict[str, str]] = {
    "architecture": {"models.families.outline": "INDEX_ATTRIBUTES=Outline"},
    "callbacks.base": {"run.start": "prune_base=start"},
    "cli": {"one_line_errors": "CALLBACKS=PACKAGES PACKAGE=PACKAGES"},
    "distributed": {"runtime.processes.ProcessGroup": "on_rank_zero=run_on_rank_zero"},
    "ending": {"run.finish": "end_fit=finish"},
    "evaluation": {"runtime.measuring": "measuring=Phases"},
    "handover": {"run.finish": "hand_over=finish save_adapter=finish"},
    "merging": {"models.families.shorter_config": "OTHER_LISTS=LISTS_NOT_PER_LAYER"},
    "plots": {
        "evaluation.report.plan_facts.PlanFacts": (
            "fates=layer_outcomes has_own_class layer_zeros merged_groups nominal "
            "removed_layers score_lists steps_of"
        ),
        "planning.steps.SliceHidden": "share_sliced=share_removed sliced_sites",
    },
    "quantization": {"run.measurements": "add_quantized"},
    "recording": {
        "run.measurements": (
            "describe_evaluation evaluation_windows=held_out_windows "
            "stage_of_run=measure_run_stage start_record"
        ),
    },
    "resume": {"training.resuming.exact_resume": "ExactResume"},
    "surgery": {
        "models.families.removable": "REFUSED_FIELDS=removable_layers",
        "models.families.shorter_config": "COUNTING_FIELDS=CutRules",
    },
    "teaching": {"run.teacher": "check_teacher meet_teacher=prepare_teacher"},
    "variants": {"scoring.model_variants": "MergedVariants"},
}


_OF_RUN = (
    "load_model plans plan_files warn use_base use_result forget_model checked_tokenizer latency "
    "gradual trust_remote_code"
)
_OF_SETTINGS = "lora keep_zeros gradient_checkpointing quantization bitsandbytes compile_backend"
# Old attributes of a RecoveryModule -> where they are now.
ATTRIBUTES = {
    **{name: f"run.{name}" for name in _OF_RUN.split()},
    **{name: f"run.settings.{name}" for name in _OF_SETTINGS.split()},
    "read_base": "run.read_again",
    "dtype_name": "run.dtype",
}
# The same for attributes that are gone: what does their work now.
REPLACED_ATTRIBUTES = {"check_output": "prunelight.run.preflight.check_output"}


def moved_attribute(holder: Any, name: str) -> Any:
    """Return an old attribute of a RecoveryModule, with a warning; for its `__getattr__`.

    Raises:
        AttributeError: if it is gone, and then it names the successor, or if it never was one.
    """
    kind = type(holder).__name__
    if name not in ATTRIBUTES:
        successor = REPLACED_ATTRIBUTES.get(name)
        told = f"; {successor} does its work now" if successor else ""
        raise AttributeError(f"{kind!r} object has no attribute {name!r}{told}")
    warn_of_old_name(f"{kind}.{name}", f"{kind}.{ATTRIBUTES[name]}", stacklevel=4)
    return attrgetter(ATTRIBUTES[name])(holder)


def set_moved_attribute(holder: Any, name: str, value: Any) -> None:
    """Set an old attribute of a RecoveryModule, with a warning; for its `__setattr__`.

    Args:
        holder: the module, changed in place.
        name: a key of ATTRIBUTES.
        value: the new value.
    """
    kind = type(holder).__name__
    warn_of_old_name(f"{kind}.{name}", f"{kind}.{ATTRIBUTES[name]}", stacklevel=4)
    owner, _, attribute = ATTRIBUTES[name].rpartition(".")
    if owner == "run.settings":  # frozen
        holder.run.settings = replace(holder.run.settings, **{attribute: value})
    else:
        setattr(attrgetter(owner)(holder), attribute, value)


def _by_name(table: dict[str, dict[str, str]]) -> dict[str, dict[str, tuple[str, str]]]:
    """Return old module -> old name -> new module, new name; all with the package's name."""
    return {
        f"prunelight.{old}": {
            entry.partition("=")[0]: (f"prunelight.{new}", entry.rpartition("=")[2])
            for new, names in homes.items()
            for entry in names.split()
        }
        for old, homes in table.items()
    }


HOMES = _by_name(MOVED)
SUCCESSORS = _by_name(REPLACED)


class ModuleWithOldNames(ModuleType):
    """A module that looks up the names that were defined under its path before."""

    def __getattr__(self, name: str) -> Any:
        """Return what an old name stands for now; Python asks only for names that are not here."""
        if name not in HOMES[self.__name__]:
            place, successor = SUCCESSORS.get(self.__name__, {}).get(name, ("", ""))
            told = f"; {place}.{successor} does its work now" if successor else ""
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}{told}")
        module, new_name = HOMES[self.__name__][name]
        if module == f"{self.__name__}.{name}":
            return import_module(module)  # a callable module
        warn_of_old_name(f"{self.__name__}.{name}", f"{module}.{new_name}")
        return getattr(import_module(module), new_name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Make a submodule callable if it took the name of a function; Python binds it here."""
        if isinstance(value, ModuleType) and name in HOMES[self.__name__]:
            value.__class__ = CallableModule
        super().__setattr__(name, value)


class CallableModule(ModuleType):
    """A module that took the name of a function, and may still be called as that function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function of the module's own name."""
        name = self.__name__.rpartition(".")[2]
        warn_of_old_name(f"the function {self.__name__}", f"{self.__name__}.{name}")
        return getattr(self, name)(*args, **kwargs)


class MovedFinder(MetaPathFinder, Loader):
    """Finds the modules that are gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a path of the table; other finders were asked first."""
        return ModuleSpec(fullname, self) if fullname in HOMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return a module that holds nothing and looks up its old names."""
        module = ModuleWithOldNames(spec.name, "Moved; each name tells its new path.")
        vars(module)["__all__"] = list(HOMES[spec.name])
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing."""


def serve_old_names(module: str) -> None:
    """Let a module that exists look up the names that it held before; its loaded submodules too."""
    for old in HOMES:
        if old == module or (old.startswith(f"{module}.") and old in sys.modules):
            sys.modules[old].__class__ = ModuleWithOldNames


def find_moved_modules() -> None:
    """Let Python find the modules that are gone, after all that exist."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())


def warn_of_old_name(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that a name changed; by default at the line that called the caller."""
    warnings.warn(
        f"{old} is now {new}; the old path goes with the next release",
        DeprecationWarning,
        stacklevel=stacklevel,  # who imports or calls
    )
