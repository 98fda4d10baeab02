"""What must hold for every class of ours: it loads everywhere, generates, and is pruned again."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from own_models import EVERY, KINDS, own_model, shared_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sliced_models import WINDOWS
from source_tree import ROOT, imported
from text_tokenizers import make_tokenizer
from transformers import AutoModel, AutoModelForCausalLM

import prunelight
from prunelight.callbacks import DLP
from prunelight.models.families.architectures import ARCHITECTURES
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import lora_targets, matrices
from prunelight.models.families.own_classes import dropped_sublayers
from prunelight.models.families.own_classes.registration import (
    CLASS_MODULES,
    code_file,
    family_of,
    prefix_of,
)
from prunelight.pruning.remove_layers import remove_layers
from prunelight.recovery.lora import LoRA, attach_lora, merge_lora

IDS = [f"{kind}-{family}" for kind, family in EVERY]
EACH = pytest.mark.parametrize(("kind", "family"), EVERY, ids=IDS)
ONE_OF_A_KIND = pytest.mark.parametrize(
    ("kind", "family"),
    [("sliced", "opt"), ("dropped", "phi3"), ("gaps", "phi3"), ("widths", "phi3")],
)
NEW_TOKENS = 12  # beyond the sliding windows of 8


@torch.no_grad()
def logits(model, windows=WINDOWS):
    return model(windows, use_cache=False).logits


@torch.no_grad()
def last_states(model, windows=WINDOWS):
    return model(windows, use_cache=False).last_hidden_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every model, saved with its code, in a directory of its kind and family."""
    root, tokenizer = tmp_path_factory.mktemp("own"), make_tokenizer(bos_token="<s>")
    for kind, family in EVERY:
        model = own_model(kind, family)
        prunelight.save(model, tokenizer, root / kind / family, export_remote_code=True)
    return root


@EACH
def test_prefix_class_and_code_belong_together(kind, family):
    module, model = KINDS[kind], shared_model(kind, family)
    assert type(model) is module.CLASSES[family]
    model_type = model.config.model_type
    assert model_type == module.PREFIX + family
    assert (prefix_of(model_type), family_of(model_type)) == (module.PREFIX, family)
    assert CLASS_MODULES[module.PREFIX] == module.__name__
    assert str(code_file(model_type)) == module.__file__
    assert (prefix_of(family), family_of(family), code_file(family)) == ("", family, None)


@EACH
def test_a_saved_model_is_read_again_with_the_head_and_without(kind, family, saved):
    """`prunelight.save` has compared weights, logits and generation by then."""
    model = shared_model(kind, family)
    again = AutoModelForCausalLM.from_pretrained(saved / kind / family)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    headless = AutoModel.from_pretrained(saved / kind / family)
    assert type(headless).__name__ == type(model).__name__.removesuffix("ForCausalLM") + "Model"
    assert torch.equal(last_states(headless), last_states(model.base_model))


STRANGER = """
import sys
sys.modules["prunelight"] = None  # an import of it, by whatever code, now fails
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
ids = torch.arange(3, 67).view(4, 16)
for directory in sys.argv[1:]:
    expected = load_file(directory + "/expected.safetensors")
    for auto, name in ((AutoModelForCausalLM, "logits"), (AutoModel, "last_hidden_state")):
        model = auto.from_pretrained(directory, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        with torch.no_grad():
            found = getattr(model(ids, use_cache=False), name)
        torch.testing.assert_close(found, expected[name], msg=f"{name} of {directory}")
print(len(sys.argv) - 1)
"""


def test_an_exported_directory_loads_without_prunelight(saved, tmp_path):
    ids, directories = torch.arange(3, 67).view(4, 16), []
    for kind, family in EVERY:
        model, directory = shared_model(kind, family), saved / kind / family
        states = last_states(model.base_model, ids)
        expected = {"logits": logits(model, ids), "last_hidden_state": states}
        (tmp_path / kind).mkdir(exist_ok=True)
        copied = shutil.copytree(directory, tmp_path / kind / family)
        save_file(expected, copied / "expected.safetensors")
        directories.append(str(copied))
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *directories],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == str(len(EVERY))


@ONE_OF_A_KIND
def test_later_saves_write_the_code_too_and_name_all_classes(
    kind, family, saved, tmp_path, tiny_tokenizer
):
    again = AutoModelForCausalLM.from_pretrained(saved / kind / family)
    del again.config.auto_map["AutoModel"]  # as an earlier version left it
    prunelight.save(again, tiny_tokenizer, tmp_path / "next")
    file = code_file(again.config.model_type)
    assert (tmp_path / "next" / file.name).read_bytes() == file.read_bytes()
    begin = f"{file.stem}.{type(again).__name__.removesuffix('ForCausalLM')}"
    assert json.loads((tmp_path / "next" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": f"{begin}Config",
        "AutoModel": f"{begin}Model",
        "AutoModelForCausalLM": f"{begin}ForCausalLM",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_file_needs_only_torch_and_transformers(kind):
    source = (ROOT / KINDS[kind].__file__).read_text()
    roots = {name.split(".")[0] for name in imported(source)}
    assert roots <= {"__future__", "functools", "sys", "typing", "torch", "transformers"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["dropped", "widths"])
def test_experts_have_the_names_on_disk_that_other_programs_read(kind, family, saved, tmp_path):
    names = set(load_file(saved / kind / family / "model.safetensors"))
    assert any(".experts.0." in name for name in names)
    assert not any("gate_up_proj" in name for name in names)
    model = own_model(kind, family)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})  # as before
    model.config.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


@EACH
def test_generation_with_a_cache_gives_what_it_gives_without(kind, family):
    model = own_model(kind, family)
    model.generation_config.eos_token_id = None
    prompt = WINDOWS[:2]
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(prompt, use_cache=False, **options)
    for cached in (
        model.generate(prompt, **options),
        model.generate(prompt, cache_implementation="static", **options),
    ):
        assert torch.equal(cached.sequences, expected.sequences)
        # Single tokens and whole sequences are summed in different orders by the kernels.
        for one, other in zip(cached.logits, expected.logits, strict=True):
            assert (one - other).abs().max() < 1e-4 * other.abs().max()
    beams = model.generate(prompt, num_beams=3, max_new_tokens=4)
    assert torch.equal(
        beams, model.generate(prompt, num_beams=3, max_new_tokens=4, use_cache=False)
    )


@EACH
def test_peft_adapts_the_model_by_its_defaults(kind, family, saved):
    model = AutoModelForCausalLM.from_pretrained(saved / kind / family)
    expected, known = logits(model), set(lora_targets(model)[0])
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    targets = set(adapted.peft_config["default"].target_modules)
    assert targets
    assert targets <= known
    assert torch.equal(logits(adapted), expected)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    changed = logits(adapted)
    assert not torch.allclose(changed, expected)
    assert torch.allclose(logits(adapted.merge_and_unload()), changed, atol=1e-3)


PEFT = """
import sys
{imports}
import peft
from peft.utils import constants
tables = [constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
          constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING]
for table in tables:
    for prefix in ("prunelight_", "prunelight_sliced_", "prunelight_widths_"):
        assert table[prefix + "llama"] == table["llama"]
assert constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["prunelight_phi3"]
assert "phi3" not in constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
"""


@pytest.mark.parametrize(
    "imports",
    ["import peft, prunelight", "import prunelight\nassert 'peft' not in sys.modules"],
    ids=["peft first", "prunelight first"],
)
def test_peft_knows_our_model_types_whichever_is_imported_first(imports):
    done = subprocess.run(
        [sys.executable, "-c", PEFT.format(imports=imports)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


@EACH
def test_our_lora_merges_and_zeros_can_be_added(kind, family):
    model = own_model(kind, family)
    plan = DLP(0.5).plan(model, WINDOWS)
    assert {len(scores) for scores in plan.scores.values()} == {model.config.num_hidden_layers}
    prunelight.apply(model, plan, WINDOWS)
    zeros = {name: matrix.parameter == 0 for name, matrix in matrices(model).items()}
    assert zeros.keys() == matrices(shared_model(kind, family)).keys()
    assert all(zero.any() for zero in zeros.values())
    expected = logits(model)
    merged = merge_lora(attach_lora(model, LoRA(dropout=0.0)))
    assert type(merged) is type(shared_model(kind, family))
    assert torch.allclose(logits(merged), expected, atol=1e-5)


@EACH
def test_layers_can_be_removed_again_unless_they_were_sliced(
    kind, family, tmp_path, tiny_tokenizer
):
    model, whole = own_model(kind, family), shared_model(kind, family)
    if kind == "sliced":
        with pytest.raises(ValueError, match="this model is sliced"):
            remove_layers(model, [1])
        return
    remove_layers(model, [1, 5])
    for name, value in whole.config.to_dict().items():
        if name.startswith(("layer_", "drop_", "gap_")) and value is not None:
            assert getattr(model.config, name) == [value[i] for i in (0, 2, 3, 4)]
    prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(decoder_layers(again)) == 4
    assert torch.equal(logits(again), logits(model))


@EACH
def test_a_model_is_copied_pickled_and_built_from_its_config(kind, family):
    model = own_model(kind, family)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    built = AutoModelForCausalLM.from_config(pickle.loads(pickle.dumps(model.config)))
    assert type(built) is type(model)
    assert {n: p.shape for n, p in built.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    deviations = [p.std().item() for n, p in decoder_layers(built).named_parameters() if p.ndim > 1]
    assert max(deviations) < 0.03 or kind == "sliced", "shortcuts alone start as other linears do"


@ONE_OF_A_KIND
def test_hidden_states_are_recorded_and_another_attention_can_be_set(kind, family):
    model = own_model(kind, family)
    with torch.no_grad():
        states = model(WINDOWS, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    expected = logits(model)
    model.set_attn_implementation("eager")
    for layer in decoder_layers(model):
        attention = getattr(layer.self_attn, "config", None)  # none where it was dropped
        assert attention is None or attention._attn_implementation == "eager"
    assert torch.allclose(logits(model), expected, atol=1e-4 * expected.abs().max())


def test_the_names_in_the_exported_file_are_those_of_the_table():
    droppable = {f for f, e in ARCHITECTURES.items() if e.sublayers and e.sublayers.droppable}
    assert droppable == set(dropped_sublayers.FAMILIES)
    for family in droppable:
        names = ARCHITECTURES[family].sublayers
        assert {n: getattr(names, n) for n in dropped_sublayers.NAMES} == dropped_sublayers.NAMES
