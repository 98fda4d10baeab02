"""What `prunelight families` says of a model: by its config alone, and truly."""

import re
import subprocess
import sys

import pytest
from tiny import tiny_model
from tiny_families import tiny_family
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunelight.pruning.abilities import abilities, show, unloaded_model


def printed(capsys, *arguments):
    show(arguments)
    return " ".join(capsys.readouterr().out.split())


def test_a_model_on_disk_is_described_without_its_weights(tmp_path, capsys):
    tiny_model("mixtral").config.save_pretrained(tmp_path)  # no weights beside the config
    text = printed(capsys, str(tmp_path))
    assert "depth" in text
    assert "6 layers can go (model.layers)" in text.replace("5 of 6", "6")
    assert "dense stay mlp.gate.weight (picks experts)" in text
    assert "key-value groups, no neurons of experts" in text
    assert "mlp.experts.gate_up_proj" in text
    assert "has no sliced class" in text


@pytest.mark.parametrize(
    ("family", "kind", "text"),
    [
        ("olmo_hybrid", "depth", r"4 of 6 layers can go, all but \[3, 5\]; without layer 3"),
        ("minicpm3", "depth", "none of its layers can go; without layer 0"),
        ("xlm", "depth", "no: the decoder layers of xlm cannot be found"),
        ("gemma2", "attention and MLP", "no: gemma2 has norms after its sublayers"),
        ("mamba", "LoRA", "in_proj"),
        ("emu3", "LoRA", "no: Emu3ForCausalLM could not be loaded again"),
    ],
)
def test_each_kind_has_a_line_that_says_what_can_be_done_or_why_not(family, kind, text):
    model = tiny_model(family) if family == "gemma2" else tiny_family(family)
    answer = abilities(model)[kind]

    assert re.match(text, answer), answer
    assert "\n" not in answer


def test_a_model_type_of_transformers_stands_for_its_default_config():
    answers = abilities(unloaded_model("llama"))
    assert answers["depth"] == "31 of 32 layers can go (model.layers)"
    assert answers["sparsity"] == "224 matrices of 32 layers"
    assert answers["slicing"] == "hidden states"


def test_without_a_model_all_families_are_listed(capsys):
    text = printed(capsys)
    assert all(name in text for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize(
    ("name", "error"),
    [("./nowhere", "must be an existing directory"), ("clip", "no causal language model")],
)
def test_what_is_no_model_ends_in_one_line(name, error):
    with pytest.raises(SystemExit, match=f"prunelight: error: .*{error}"):
        show([name])


def test_the_command_line_has_the_verb():
    done = subprocess.run(
        [sys.executable, "-m", "prunelight.cli", "families", "gpt2"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "11 of 12 layers can go" in done.stdout
