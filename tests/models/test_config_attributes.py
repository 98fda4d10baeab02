"""What every family must go through reads no field that some family's config lacks."""

import ast

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from source_tree import ROOT
from transformers import AutoConfig
from transformers.integrations.heterogeneity.configuration_utils import (
    AmbiguousGlobalPerLayerAttributeError,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Folders and files through which each model goes, whatever is pruned.
EVERY_MODEL = (
    "models/*.py",
    "calibration/*.py",
    "evaluation/*.py",
    "run/*.py",
    "training/*.py",
    "planning/*.py",
    "recovery/*.py",
)
# Read after a check that they are there, or where a multimodal config cannot come.
CHECKED = {
    "num_hidden_layers": "of a text config, or of a model whose layers were found",
    "rope_parameters": "asked for first",
}


def has(config, name):
    """Whether a config has a field, be it one whose value depends on the layer."""
    try:
        return hasattr(config, name)
    except AmbiguousGlobalPerLayerAttributeError:
        return False


def fields_read(path):
    """Return the names that are read of something called config, without a default."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if (isinstance(node.value, ast.Attribute) and node.value.attr == "config")
        or (isinstance(node.value, ast.Name) and node.value.id == "config")
    }


@pytest.fixture(scope="module")
def configs():
    made = []
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            made.append(AutoConfig.for_model(family))
        except (ImportError, ValueError, StrictDataclassClassValidationError):
            continue
    assert len(made) > 150
    return made


def test_no_field_is_read_that_a_config_may_lack(configs):
    files = [file for glob in EVERY_MODEL for file in (ROOT / "prunelight").glob(glob)]
    files = [file for file in files if file.name != "engines.py"]  # reads by family
    read = {name: file.name for file in files for name in fields_read(file)}
    assert {"model_type", "_name_or_path"} <= set(read)
    lacking = {
        name: (file, [config.model_type for config in configs if not has(config, name)][:3])
        for name, file in read.items()
        if name not in CHECKED
    }
    # Names that no config has are of other things called config: torch's, a dict's.
    known = {name for config in configs for name in dir(config)}
    assert {name: found for name, found in lacking.items() if found[1] and name in known} == {}
