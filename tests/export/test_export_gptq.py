"""An export to GPTQ: what it writes, what its record says, and what is refused before it begins."""

import json
import os

import pytest
import torch
from own_models import own_model
from runs import write_model
from tiny import token_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunelight
from prunelight.callbacks import WeightPruning
from prunelight.cli import main
from prunelight.export.exporting import export
from prunelight.export.targets import Rounding
from prunelight.models.engines import loads_in
from prunelight.models.families.matrices import matrices
from prunelight.pruning.rounding.gptq import GPTQ
from prunelight.pruning.rounding.quantize import quantize_gptq

pytest.importorskip("compressed_tensors", reason="pip install 'prunelight[gptq]'")
BRIEF = Rounding(num_calibration=4, seq_len=32, num_windows=4)
VLLM = "PRUNELIGHT_VLLM_PYTHON"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model")


def test_an_export_is_what_was_quantized_in_memory_and_says_what_it_cost(directory, tmp_path):
    done = export(directory, "gptq", rounding=BRIEF, out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    told = record["rounding"]
    assert (told["bits"], told["group_size"], record["quantize"]) == (4, 32, "w4a16")
    model, tokenizer = prunelight.load(directory)
    rows = prunelight.read_documents("sample:calibration")
    windows = prunelight.calibration_windows(tokenizer, [row["text"] for row in rows], 4, 32)
    quantize_gptq(model, windows, GPTQ())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = token_windows(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits)
    for of in ("source", "gptq"):
        assert told["perplexity"][of]["low"] < told["perplexity"][of]["value"]
    assert told["perplexity"]["source"]["value"] != told["perplexity"]["gptq"]["value"]
    assert done.proof.engine == "transformers"
    assert done.proof.mean_kl == record["proof"]["mean_kl"] > 0


def test_an_export_can_be_evaluated_and_pruned_but_not_exported_again(directory, tmp_path):
    path = export(directory, "gptq", rounding=BRIEF, out=tmp_path / "out").path
    model, _ = prunelight.load(path)
    answers = loads_in(model)
    assert answers["vLLM"] == "yes"
    assert "packed by compressed-tensors, which llama.cpp does not read" in answers["llama.cpp"]
    for to in ("gptq", "ctranslate2"):
        with pytest.raises(ValueError, match="quantized"):
            export(path, to)


def test_the_zeros_of_a_sparse_model_are_in_its_export(directory, tmp_path):
    model, tokenizer = prunelight.load(directory)
    plan = WeightPruning(0.5).plan(model, token_windows(4, 16))
    model = prunelight.apply(model, plan, token_windows(4, 16))
    zeros = {name: matrix.parameter == 0 for name, matrix in matrices(model).items()}
    prunelight.save(model, tokenizer, tmp_path / "sparse")
    done = export(tmp_path / "sparse", "gptq", rounding=BRIEF)
    assert done.path == tmp_path / "sparse-w4a16-gptq"
    exported, _ = prunelight.load(done.path)
    for name, of in zeros.items():
        assert not exported.get_submodule(name).weight[of].any()
    record = json.loads((done.path / "export.json").read_text())
    assert record["rounding"]["zeros_kept"] == sum(int(of.sum()) for of in zeros.values())


def test_a_class_of_our_own_is_exported_with_a_warning(tmp_path, directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = own_model("dropped", "llama")
    model.resize_token_embeddings(len(tokenizer))
    prunelight.save(model, tokenizer, tmp_path / "own")
    done = export(tmp_path / "own", "gptq", rounding=BRIEF)
    assert "where prunelight is imported, and vLLM does not load it" in done.warnings[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "3"], "bits=3 must be 4 or 8"),
        (["--group_size", "48"], "group_size=48 must divide the 32 inputs of model.layers.0"),
        (["--num_calibration", "0"], "num_calibration=0 must be at least 1"),
        (["--seq_len", "1"], "seq_len=1 must be at least 2"),
        (["--calibration", "nothing.txt"], "nothing.txt"),
        (["--calibration", "sample:instructions"], "must hold text; it has rows without a field"),
        (["--quantize", "q4_k_m"], "gptq has no quantization of its own"),
        (["--dtype", "q8_0"], "dtype='q8_0' must be one of auto, f32, f16, bf16"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_written(
    options, words, directory, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        main(["export", directory, "--to", "gptq", "--out", str(tmp_path / "out"), *options])
    assert words in f"{stop.value}{capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_options_of_rounding_have_no_effect_on_other_formats(directory):
    with pytest.raises(ValueError, match="bits=8 has no effect on an export to gguf; leave it out"):
        export(directory, "gguf", rounding=Rounding(bits=8))


@pytest.mark.engines
def test_vllm_computes_what_was_quantized(tmp_path):
    if not os.environ.get(VLLM):
        pytest.skip(f"{VLLM} names no Python with vLLM")
    # Its kernels take widths that are multiples of 32 and heads of 32.
    name = write_model(
        tmp_path / "model", hidden_size=256, intermediate_size=512, num_attention_heads=8
    )
    done = export(name, "gptq", dtype="bf16", rounding=BRIEF, engine_python=os.environ[VLLM])
    assert done.proof.engine == "vLLM"
