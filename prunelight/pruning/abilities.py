"""What each kind of pruning can do with a model, read off its structure: `prunelight families`.

No weight is read: the model is built from its config on the meta device. docs/families.md holds the
same question, asked of a tiny random model of every family and answered by pruning it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from shutil import get_terminal_size
from textwrap import fill

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunelight.models.engines import loads_in
from prunelight.models.families.architectures import sublayers_of
from prunelight.models.families.config_fields import check_reloadable, decoder_config
from prunelight.models.families.experts.layout import experts_of
from prunelight.models.families.experts.routed import check_scorable
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.matrices import (
    dense_places,
    lora_targets,
    matrices,
    share_of_matrices,
)
from prunelight.models.families.removable import removable_layers
from prunelight.models.loading import (
    check_hub,
    find_source,
    load_config,
    quiet_transformers,
)
from prunelight.pruning.drop_sublayers import check_droppable
from prunelight.pruning.slicing.slice_hidden import check_sliceable


def abilities(model: PreTrainedModel) -> dict[str, str]:
    """Return for each kind of pruning what it can do with a model, or why it cannot.

    Args:
        model: may be on the meta device; no weight is read.

    Returns:
        "depth", "attention and MLP", "width", "experts", "slicing", "sparsity", "LoRA" and each
        engine -> one line.
    """
    questions: dict[str, Callable[[PreTrainedModel], str]] = {
        "depth": _depth,
        "attention and MLP": _sublayers,
        "width": _width,
        "experts": _experts,
        "slicing": _slicing,
        "sparsity": _sparsity,
        "LoRA": _lora,
    }
    answers = {kind: _answer(question, model) for kind, question in questions.items()}
    return answers | {f"read by {engine}": text for engine, text in loads_in(model).items()}


def unloaded_model(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return a model without weights, on the meta device.

    Args:
        name: what `load` takes, or a model type of transformers for its default config.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ValueError: if there is no such model, or its config describes none.
        TypeError: if transformers has no causal language model for it.
    """
    config = _config_of(name, trust_remote_code)
    try:
        with quiet_transformers(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise TypeError(
            f"transformers has no causal language model for {name!r} ({config.model_type})"
        ) from error
    except (TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"the config of {name!r} describes no {config.model_type} that can be built: "
            f"{type(error).__name__}: {error}"
        ) from error
    return model


def show(arguments: Sequence[str]) -> None:
    """Print what each kind of pruning can do with the model that the command line names."""
    parser = ArgumentParser("prunelight families", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "model",
        nargs="?",
        help="hub id, directory, GGUF file, bundled name, or a model type such as olmoe; without "
        "it the model types are listed",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the model's code")
    given = parser.parse_args(arguments)
    if given.model is None:
        sys.stdout.write(fill(", ".join(family_names()), get_terminal_size().columns) + "\n")
        return
    try:
        answers = abilities(unloaded_model(given.model, trust_remote_code=given.trust_remote_code))
    except (TypeError, ValueError, ImportError) as error:
        sys.exit(f"prunelight: error: {error}")
    indent = max(len(kind) for kind in answers) + 2
    for kind, text in answers.items():
        lines = fill(f"{kind:{indent}}{text}", 100, subsequent_indent=" " * indent)
        sys.stdout.write(f"{lines}\n")


def _config_of(name: str, trust_remote_code: bool) -> PretrainedConfig:
    if name in CONFIG_MAPPING_NAMES:
        return decoder_config(AutoConfig.for_model(name))
    source = check_hub(find_source(name))
    return decoder_config(load_config(source, trust_remote_code=trust_remote_code))


def family_names() -> list[str]:
    """Return the model types for which transformers has a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _answer(question: Callable[[PreTrainedModel], str], model: PreTrainedModel) -> str:
    try:
        check_reloadable(model)
        return question(model)
    except (TypeError, ValueError) as error:
        return f"no: {error}"


def _depth(model: PreTrainedModel) -> str:
    return f"{removable_layers(model).what_can_go()} ({layers_path(model)})"


def _sublayers(model: PreTrainedModel) -> str:
    check_droppable(model)
    return "attention or MLP of any layer, but the first attention of each kind"


def _width(model: PreTrainedModel) -> str:
    names = sublayers_of(model)
    return "key-value groups" + (" and neurons" if names.neurons else ", no neurons of experts")


def _experts(model: PreTrainedModel) -> str:
    experts = experts_of(model)
    if experts.fault:
        raise TypeError(experts.fault)
    check_scorable(model, experts)
    most = experts.groups * ((experts.count - experts.fewest) // experts.groups)
    groups = f", as many of each of {experts.groups} groups" if experts.groups > 1 else ""
    return f"{most} of {experts.count} can go in each of {len(experts.layers)} layers{groups}"


def _slicing(model: PreTrainedModel) -> str:
    check_sliceable(model)
    return "hidden states"


def _sparsity(model: PreTrainedModel) -> str:
    text = f"{len(matrices(model))} matrices of {len(decoder_layers(model))} layers"
    places = dense_places(model)
    if not places:
        return text
    dense = "; ".join(f"{', '.join(sorted(names))} ({why})" for why, names in places.items())
    share = 100 * share_of_matrices(model)
    return f"{text}, {share:.2f} % of the decoder's weights; dense stay {dense}"


def _lora(model: PreTrainedModel) -> str:
    names, stacks = lora_targets(model)
    return ", ".join([*names, *stacks])
