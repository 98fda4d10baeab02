"""A model that is measured, by its name: what is checked before its weights are read."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.report.plan_facts import Json
from prunelight.models.families.config_fields import decoder_config, maximum_length
from prunelight.models.families.layers import decoder_layers
from prunelight.models.loading import (
    check_attention,
    check_hub,
    file_states,
    find_source,
    load,
    load_config,
    load_tokenizer,
    resolve_dtype,
)
from prunelight.models.placement import move_if_it_fits, with_index
from prunelight.models.sizes import linear_sparsity, parameter_bytes, parameter_count
from prunelight.planning.fingerprints import (
    fingerprint_of,
    library_versions,
    model_fingerprint,
    without_folders,
)

# Cut apart differently by tokenizers of one vocabulary: digits, spaces, accents, blank lines.
_PROBE_TEXT = "The river 12,345 (naïve) runs\n\n past  the old mill. "


class Subject:
    """A model to measure: its tokenizer at once, its weights when they are asked for.

    Args:
        name: what `prunelight.load` takes.
        dtype: of the weights.
        device: on which it runs.
        trust: run Python code that comes with the model.
        attention: that the model computes with; None: transformers chooses.
        offload: keep it off the device, with one layer there at a time, even if it fits.

    Raises:
        ValueError: if the name is none of a model, it has no tokenizer, or dtype or attention are
            unknown.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str,
        device: torch.device,
        trust: bool,
        attention: str | None = None,
        offload: bool = False,
    ) -> None:
        check_is_no_run(name)
        resolve_dtype(dtype)
        check_attention(attention, trust_remote_code=trust)
        self.attention, self.offload = attention, offload
        self.name, self.dtype, self.device, self.trust = name, dtype, device, trust
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name, trust_remote_code=trust)

    @cached_property
    def context(self) -> int | None:
        """The longest text in tokens that the model reads, by its config; None without a limit."""
        config = load_config(check_hub(find_source(self.name)), trust_remote_code=self.trust)
        return maximum_length(decoder_config(config))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, computing on its device."""
        model, _ = load(
            self.name,
            dtype=self.dtype,
            trust_remote_code=self.trust,
            attn_implementation=self.attention,
        )
        return move_if_it_fits(model, self.device, offload=self.offload)

    @property
    def files(self) -> str | None:
        """What identifies the model without reading its weights; None for a model of the hub."""
        states = file_states(self.name)
        if states is None:
            return None
        place = str(Path(find_source(self.name).location).resolve())
        chosen = () if self.attention is None else (self.attention,)
        return fingerprint_of(place, states, self.dtype, library_versions(), *chosen)

    def describe(self) -> Json:
        """Return dtype, name, fingerprint and sizes.

        `zeros` is their share in the decoder's linear layers.
        """
        try:
            num_layers = len(decoder_layers(self.model))
        except TypeError:  # of a structure that is not known
            num_layers = None
        facts = {
            "name": without_folders(self.name.rstrip("/")),
            "fingerprint": model_fingerprint(self.model),
            "parameters": parameter_count(self.model),
            "layers": num_layers,
            "size_bytes": parameter_bytes(self.model),
            "zeros": linear_sparsity(self.model),
        }
        return {"dtype": str(self.model.dtype).removeprefix("torch."), "facts": facts}


def check_is_no_run(name: str) -> None:
    """Check that a name is not that of a run, whose models are in directories below it.

    Raises:
        ValueError: if it is; names the models.
    """
    path = Path(name).expanduser()
    if not path.is_dir() or (path / "config.json").is_file():
        return
    models = sorted(file.parent.name for file in path.glob("*/config.json"))
    if models:
        raise ValueError(
            f"{name!r} is no model but holds some: give one of {', '.join(models[:4])} in it"
        )


def check_same_tokenizer(subject: Subject, dense: Subject) -> None:
    """Check that two models read a text as the same tokens.

    Raises:
        ValueError: if they do not.
    """
    ours, theirs = subject.tokenizer.get_vocab(), dense.tokenizer.get_vocab()
    apart = [each.tokenizer(_PROBE_TEXT)["input_ids"] for each in (subject, dense)]
    if ours == theirs and apart[0] == apart[1]:
        return
    num_other = len({*ours.items()} ^ {*theirs.items()})
    how = f"{num_other} entries of the vocabularies differ" if num_other else "they cut texts apart"
    raise ValueError(
        f"reference={dense.name!r} has another tokenizer than {subject.name!r} ({how}), so their "
        "probabilities cannot be compared; give the model that was pruned, or no reference"
    )


def find_device(device: str) -> torch.device:
    """Return a device by its name; "auto" is a GPU if there is one.

    Raises:
        ValueError: if there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = with_index(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device={device!r} cannot be used here ({reason}); give cpu, cuda, cuda:N or auto"
        ) from error
    return torch.device("cpu") if found.type == "cpu" else found  # cpu:0 is no other place
