"""Saving a model so that it certainly loads again: write a temporary directory, verify, rename.

`verify` loads the written directory with plain `AutoModelForCausalLM.from_pretrained`. Weights must
be equal bit for bit, logits and greedy generation with the cache up to rounding. Where a second
copy does not fit in memory, config, shapes and every tensor on disk are compared instead.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from prunelight.models.engines import loads_in
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.families.own_classes.layer_statement import state_layers
from prunelight.models.families.own_classes.registration import code_file
from prunelight.models.families.rwkv import restore_rwkv_scale
from prunelight.models.forward import evaluating, greedy_tokens
from prunelight.models.loading import quiet_transformers
from prunelight.models.packed.grids import describe_grids, has_grids, packed_state, quiet_package
from prunelight.models.placement import compute_device, place_like
from prunelight.models.sizes import is_quantized, longest_sequence, parameter_bytes
from prunelight.models.transformers4 import add_old_names, tell_fault
from prunelight.models.written_files import (
    check_names,
    check_place,
    finish_files,
    link_parts,
    number_parts,
)
from prunelight.planning.fingerprints import library_versions, model_fingerprint
from prunelight.planning.plan import Plan
from prunelight.runtime.devices import free_memory
from prunelight.runtime.files.atomic_files import atomic_directory
from prunelight.runtime.files.checksums import changed_files, directory_checksums, sealed, unsealed
from prunelight.runtime.finite import check_weights

log = logging.getLogger(__name__)

MARKER = "prunelight.json"  # `save` may replace a directory that holds this file

_NEW_TOKENS = 8

_ONE_FILE = 4 * 2**30  # bytes of weights up to which a model is saved as one file

# Equal weights on the same device give equal logits up to the order of sums inside a kernel.
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class SavedModel:
    """What `save` wrote: the directory, the bytes of its weights, and how they were verified."""

    directory: str
    size_bytes: int
    verification: str


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    *,
    plan: Plan | None = None,
    extra_files: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    export_remote_code: bool = False,
    dense_fault: str | None = None,
    finished: str | Path | None = None,
) -> SavedModel:
    """Write a verified transformers directory: all of it, or nothing.

    Args:
        model: the model in memory; its weights are unchanged afterwards.
        tokenizer: written beside the model.
        directory: new, empty, or written by prunelight before (then replaced).
        plan: written as plan.json.
        extra_files: file name -> text, written beside the weights.
        trust_remote_code: let the verification run code that came with the model.
        export_remote_code: write the code of a class of ours beside the model. The directory then
            loads without prunelight under trust_remote_code. Later saves of the model write it too.
        dense_fault: what `generation_fault` says of the dense model. If it is "", a fault in the
            model is an error; None, if nobody asked, makes it a warning.
        finished: the `scratch` of `apply`. Files there whose weights are those of a result of more
            than 4 GiB become its shards, without a copy.

    Raises:
        ValueError: if the directory cannot be replaced, or an extra file has a name that is taken
            or leads elsewhere.
        FileExistsError: if the directory exists and was not written by prunelight.
        TypeError: if the model has no code to export.
        ValueError: if a weight is NaN or infinite; names it.
        RuntimeError: if the written model differs from the model in memory; names the difference.
    """
    check_names(extra_files or {}, with_plan=plan is not None)
    check_place(directory)
    directory = Path(directory).expanduser()
    check_replaceable(directory)
    check_weights(model)
    stored = _stored_weights(model)
    code = code_file(model.config.model_type)
    if export_remote_code or (code is not None and getattr(model.config, "auto_map", None)):
        name_remote_code(model)
    restore_rwkv_scale(model)
    with atomic_directory(directory) as temporary:
        scratch = None if finished is None else Path(finished).expanduser()
        parts = link_parts(temporary, _finished_files(model, scratch)) if stored is None else set()
        if parts:
            stored = {name: x for name, x in model.state_dict().items() if name not in parts}
        with quiet_transformers():
            # transformers cannot write packed weights of 4 or 8 bits in the layout of full ones.
            model.save_pretrained(
                temporary, state_dict=stored, save_original_format=not is_quantized(model)
            )
            if parts:
                number_parts(temporary, model.num_parameters())
            tokenizer.save_pretrained(temporary)
            add_old_names(model.config, temporary)
            state_layers(model.config, temporary)
        if code is not None and getattr(model.config, "auto_map", None):
            shutil.copyfile(code, temporary / code.name)
        for name, text in (extra_files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        if plan is not None:
            plan.save(temporary / "plan.json")
        finish_files(temporary, model.config._name_or_path, loads_in(model))
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        saved = SavedModel(
            str(directory), size, verify(model, temporary, trust_remote_code, dense_fault)
        )
        versions = {"fingerprint": model_fingerprint(model), "versions": library_versions()}
        facts = {"size_bytes": saved.size_bytes, "verification": saved.verification, **versions}
        sums = {"files": directory_checksums(temporary)}
        (temporary / MARKER).write_text(sealed({**facts, **sums}), encoding="utf-8")
    tell_fault(model.config)
    log.info("saved %s (%.1f MB): %s", directory, saved.size_bytes / 1e6, saved.verification)
    return saved


def _stored_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Return the weights as they are stored, where that differs from memory; states it in config.

    Raises:
        ValueError: if a quantized weight has left its grid.
    """
    if not has_grids(model):
        return None
    # Layers may have gone since, and with them names of modules that stay in full precision.
    model.config.quantization_config = describe_grids(model)
    return packed_state(model)


def _finished_files(model: PreTrainedModel, directory: Path | None) -> dict[Path, list[str]]:
    """Return the files that hold weights of the model as they are saved, and the weights' names.

    Small models have none, so that they are saved as one file. Numbers are compared: weights may
    have changed since a file was written.

    Args:
        model: in memory.
        directory: that holds such files, at any depth; None for none.
    """
    if directory is None or parameter_bytes(model) < _ONE_FILE:
        return {}
    if not directory.is_dir():
        log.warning("finished=%s is no directory: all weights are copied", directory)
    weights = dict(model.named_parameters(remove_duplicate=False))
    finished = {}
    for file in sorted(directory.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [*tensors.keys()]
            held = {name: weights[name].data.cpu() for name in names if name in weights}
            same = 0 < len(held) == len(names) and all(
                _equal(weight, tensors.get_tensor(name)) for name, weight in held.items()
            )
        if same and _saved_as_they_are(model, held):
            finished[file] = names
            for name in names:  # each weight is linked once
                del weights[name]
    return finished


def _equal(weight: Tensor, stored: Tensor) -> bool:
    return weight.dtype == stored.dtype and torch.equal(weight, stored)


def _saved_as_they_are(model: PreTrainedModel, weights: dict[str, Tensor]) -> bool:
    """Return whether these weights have the same names and numbers in files as in memory."""
    try:
        saved = revert_weight_conversion(model, dict(weights))
    except Exception:  # a conversion that needs weights of other layers too
        return False
    addresses = [{name: x.data_ptr() for name, x in each.items()} for each in (saved, weights)]
    return addresses[0] == addresses[1]


def name_remote_code(model: PreTrainedModel) -> None:
    """Name, in the model's config, the code that `save` writes beside the model; in place.

    Raises:
        TypeError: if the model is of a class of transformers.
    """
    config, file, name = model.config, code_file(model.config.model_type), type(model).__name__
    if file is None:
        raise TypeError(
            f"export_remote_code=True: {name} is a class of transformers, there is "
            "no code of its own to export; leave export_remote_code out"
        )
    config.auto_map = {
        "AutoConfig": f"{file.stem}.{type(config).__name__}",
        "AutoModel": f"{file.stem}.{name.removesuffix('ForCausalLM')}Model",
        "AutoModelForCausalLM": f"{file.stem}.{name}",
    }


def check_replaceable(directory: Path) -> None:
    """Check that a directory may be written.

    Raises:
        FileExistsError: if it exists, is not empty, and was not written by prunelight.
    """
    if not directory.exists() or (directory / MARKER).is_file():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise FileExistsError(
            f"{directory} exists and was not written by prunelight (it has no {MARKER}); choose "
            "another directory or remove it"
        )


def check_unchanged(directory: Path, leave_out: Iterable[str] = ()) -> None:
    """Check that the files of a saved directory are those that `save` wrote.

    Only a directory that is ours alone, such as a pruned base, need stay as it is. One that an
    older version wrote holds no checksums, and passes.

    Args:
        directory: that `save` wrote.
        leave_out: files that may change.

    Raises:
        ValueError: if a file is changed, missing or added; names the files and the remedy.
    """
    try:
        text = (directory / MARKER).read_text(encoding="utf-8")
        facts = unsealed(text, must='"files"' in text)
        written = facts.get("files")
        changed = changed_files(directory, written, (MARKER, *leave_out)) if written else {}
    except FileNotFoundError:
        changed = {MARKER: "missing"}
    except ValueError:
        changed = {MARKER: "changed"}
    if changed:
        told = ", ".join(f"{name} was {what}" for name, what in changed.items())
        raise ValueError(
            f"{directory} is not as it was saved: {told.replace('was missing', 'is missing')}; "
            "delete the directory, and the same command makes it again and goes on from its "
            "checkpoint"
        )


def verify(
    model: PreTrainedModel,
    directory: Path,
    trust_remote_code: bool = False,
    dense_fault: str | None = None,
) -> str:
    """Compare a saved directory with the model in memory; return what was compared.

    `save` says what `dense_fault` is.

    Raises:
        RuntimeError: if anything differs or the directory does not load; names the difference.
    """
    try:
        # from_pretrained works on the CPU and may hold the weights twice while it converts them.
        size = parameter_bytes(model)
        if free_memory(torch.device("cpu")) < 2 * size or free_memory(model.device) < 1.2 * size:
            _compare_files(model, directory, trust_remote_code)
            return "config, shapes and all weights on disk compared (no memory for a second copy)"
        with quiet_transformers(), quiet_package(model.config):
            loaded = AutoModelForCausalLM.from_pretrained(
                directory,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # _compare_weights names the weight and its shapes
            )
        attention = getattr(model.config, "_attn_implementation", None)
        if attention and attention != getattr(loaded.config, "_attn_implementation", None):
            loaded.set_attn_implementation(attention)  # the file does not keep the choice
        reloaded = place_like(loaded, model)
        stored = packed_state(model) if has_grids(model) else model.state_dict()
        _compare_weights(stored, reloaded.state_dict())
        with quiet_package(model.config):  # a packed model unpacks itself at its first forward
            generates = _compare_behaviour(model, reloaded, dense_fault)
    except Exception as error:  # a wrong config can make the model's code raise anything
        raise RuntimeError(
            f"the saved model failed its verification: {error}. Nothing was kept on disk"
        ) from error
    compared = "logits and cached generation" if generates else "and logits"
    return f"reloaded with AutoModelForCausalLM: equal weights, {compared}"


def _compare_weights(memory: Mapping[str, Tensor], disk: Mapping[str, Tensor]) -> None:
    if set(memory) != set(disk):
        unmatched = sorted(set(memory) ^ set(disk))
        raise RuntimeError(
            f"{len(unmatched)} tensors are only on one side, in memory or on disk, e.g. "
            f"{unmatched[0]}"
        )
    for name, tensor in memory.items():
        _compare_tensor(name, tensor, disk[name])


def _compare_tensor(name: str, memory: Tensor, disk: Tensor) -> None:
    if memory.shape != disk.shape or memory.dtype != disk.dtype:
        raise RuntimeError(
            f"{name} is {tuple(memory.shape)} {memory.dtype} in memory and {tuple(disk.shape)} "
            f"{disk.dtype} on disk"
        )
    if not torch.equal(memory, disk.to(memory.device)):
        nan = memory.is_floating_point() and bool(memory.isnan().any())
        fault = "holds NaN" if nan else "has other values on disk than in memory"
        raise RuntimeError(f"{name} {fault}")


def generation_fault(model: PreTrainedModel) -> str:
    """Return how generation with the cache differs from that without it; empty, if it does not.

    Some families of transformers differ when nothing is pruned. That is no fault of a pruned model.
    """
    if not model.can_generate():
        return ""
    ids = _probe_ids(model)
    try:
        plain = greedy_tokens(model, ids, _NEW_TOKENS, use_cache=False)
        cached = greedy_tokens(model, ids, _NEW_TOKENS)
    except Exception as error:  # the model's own code can raise anything
        return f"generation with the cache fails ({type(error).__name__}: {error})"
    with evaluating(model):
        # Single tokens and whole sequences are summed in other orders, and may pick other experts.
        allowed = 4 * _allowed(model(ids).logits)
    if torch.equal(plain, cached) or _is_tie(model, plain, cached, allowed):
        return ""
    return "generation with the cache gives other tokens than without it"


def _probe_ids(model: PreTrainedModel) -> Tensor:
    """Return random ids (2, T), so short that tokens can follow."""
    generator = torch.Generator().manual_seed(0)
    length = min(16, (longest_sequence(model) or 64) - _NEW_TOKENS)
    ids = torch.randint(vocabulary_size(model), (2, length), generator=generator)
    return ids.to(compute_device(model))


def _allowed(logits: Tensor) -> float:
    """Return by how much logits may differ up to rounding."""
    return _LOGIT_TOLERANCE.get(logits.dtype, 1e-4) * logits.float().abs().max().item()


def _compare_behaviour(
    model: PreTrainedModel, reloaded: PreTrainedModel, dense_fault: str | None
) -> bool:
    """Compare logits, then generation with the cache; return whether the latter was compared."""
    ids = _probe_ids(model)
    with evaluating(model), evaluating(reloaded):
        logits, reloaded_logits = model(ids).logits, reloaded(ids).logits
    difference = (logits.float() - reloaded_logits.float()).abs().max().item()
    allowed = _allowed(logits)
    if not difference <= allowed:  # written so that NaN fails
        raise RuntimeError(f"logits differ by {difference:.3g}, allowed is {allowed:.3g}")
    if not model.can_generate():
        return False
    if fault := generation_fault(model):
        if not generation_fault(reloaded):
            raise RuntimeError(
                f"of the model in memory, {fault}; check that its layers are numbered 0, 1, 2, ... "
                "(layer_idx)"
            )
        _tell_generation_fault(fault, dense_fault)
        return False
    tokens = greedy_tokens(model, ids, _NEW_TOKENS)
    reloaded_tokens = greedy_tokens(reloaded, ids, _NEW_TOKENS)
    equal = torch.equal(tokens, reloaded_tokens)
    if not equal and not _is_tie(model, tokens, reloaded_tokens, allowed):
        raise RuntimeError("greedy generation with the cache gives other tokens than in memory")
    return True


def _tell_generation_fault(fault: str, dense_fault: str | None) -> None:
    """Raise for a fault that the dense model does not have; tell one that it has, or may have."""
    if dense_fault == "":
        raise RuntimeError(f"{fault}, which the dense model does not do")
    if dense_fault is None:
        log.warning("%s; compare with the dense model: some families do so unpruned", fault)
    else:
        log.info("%s, as does the dense model", fault)


def _is_tie(
    model: PreTrainedModel, tokens: Tensor, reloaded_tokens: Tensor, allowed: float
) -> bool:
    """Return whether each row's first difference is between tokens of nearly equal logits.

    Kernels on a GPU may add in another order from run to run, which decides such ties.
    """
    with evaluating(model):
        logits = model(tokens).logits.float()
    for a, b, scores in zip(tokens, reloaded_tokens, logits, strict=True):
        for first in (a != b).nonzero().flatten().tolist()[:1]:
            if (scores[first - 1, a[first]] - scores[first - 1, b[first]]).abs() > allowed:
                return False
    return True


def _compare_files(model: PreTrainedModel, directory: Path, trust_remote_code: bool) -> None:
    """Compare the model with the saved config and files; read one tensor of the files at a time."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    memory = dict(model.state_dict())
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in memory.items()}:
        raise RuntimeError("config.json describes other weights than the model in memory has")
    # On disk some families have other names for weights, and experts are stored one by one.
    memory = revert_weight_conversion(model, memory)
    names_on_disk: set[str] = set()
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                if name not in memory:
                    raise RuntimeError(f"{name} is on disk and not in memory")
                _compare_tensor(name, memory[name], tensors.get_tensor(name))
                names_on_disk.add(name)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = set(memory) - names_on_disk - tied
    if missing:
        raise RuntimeError(f"{len(missing)} tensors are not on disk, e.g. {min(missing)}")
