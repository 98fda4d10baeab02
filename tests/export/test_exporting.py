"""What every export asks first, what it may replace, and how a failure leaves the disk."""

import json
import sys

import pytest
from runs import write_model
from transformers import AutoConfig

import prunelight
from prunelight.cli import main
from prunelight.export.exporting import export
from prunelight.export.gguf.target import GgufTarget, check_same_tokens, sample_texts
from prunelight.export.targets import NotReadableError
from prunelight.export.widths import block_warnings, parallel_warnings
from prunelight.models.saving import check_unchanged


@pytest.fixture
def directory(tmp_path):
    return write_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"to": "onnx"}, ValueError, "to='onnx' must be one of gguf, ctranslate2, decilm"),
        ({"dtype": "f8"}, ValueError, "dtype='f8' must be one of auto, f32, f16, bf16, q8_0"),
        ({"quantize": "q9"}, ValueError, "quantize='q9' must be one of q2_k"),
        ({"out": "{}/model/x.gguf"}, ValueError, "lies in the directory of the model"),
        ({"out": "{}/x.bin"}, ValueError, "must be a file that ends in .gguf"),
        ({"engine_python": "{}/python"}, ValueError, "there is no such program"),
        ({"engine_python": sys.executable}, NotReadableError, "has no llama.cpp; there: pip inst"),
        ({"quantize": "q4_k_m"}, ImportError, "needs llama.cpp's quantizer; install it with: pip"),
    ],
)
def test_bad_options_are_one_error_before_anything_is_written(
    directory, tmp_path, arguments, error, words
):
    arguments = {
        name: value.format(tmp_path) if "{}" in value else value
        for name, value in arguments.items()
    }
    to = arguments.pop("to", "gguf")
    with pytest.raises(error, match=words):
        export(directory, to, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_no_saved_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be the directory of a saved model"):
        export(tmp_path / "none", "gguf")
    with pytest.raises(ValueError, match="has no config.json"):
        export(tmp_path, "gguf")
    directory = tmp_path / "model"
    write_model(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights in safetensors"):
        export(directory, "gguf")


def test_an_export_replaces_its_own_file_and_no_other(directory, tmp_path):
    first = export(directory, "gguf")
    assert first.path == tmp_path / "model-f32.gguf"  # beside the model, with its dtype
    assert export(directory, "gguf").path == first.path
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="no export to gguf wrote it.*with --out, or remove"):
        export(directory, "gguf", out=foreign)
    assert foreign.read_bytes() == b"mine"
    folder = tmp_path / "folder"
    folder.mkdir()
    assert export(directory, "gguf", out=folder).path == folder / "model-f32.gguf"


def test_the_record_says_which_proof_it_was(directory, tmp_path):
    done = export(directory, "gguf", dtype="f16")
    record = json.loads((tmp_path / "model-f16.gguf.export.json").read_text())
    assert record["proof"]["engine"] == done.proof.engine == "transformers (GGUF)"
    assert record["proof"]["largest_difference"] == done.proof.largest_difference < 0.01
    assert "llama.cpp itself did not read the export" in record["proof"]["note"]
    assert record["dtype"] == "f16"
    assert record["source"]["name"] == "model"


def test_the_card_of_the_model_says_which_program_read_its_export(directory, tmp_path):
    export(directory, "gguf")  # prunelight did not save this one
    assert not (tmp_path / "model" / "README.md").exists()
    ours = tmp_path / "ours"
    prunelight.save(*prunelight.load(directory), ours)
    export(ours, "gguf", dtype="f16")
    done = export(ours, "gguf", dtype="f16")
    card = (ours / "README.md").read_text(encoding="utf-8")
    assert card.count("- gguf, f16: `ours-f16.gguf`, transformers (GGUF)") == 1
    assert done.proof.line() in card
    check_unchanged(ours)


def test_without_a_reader_an_export_must_be_asked_for(tmp_path, caplog):
    directory = write_model(tmp_path / "model", "granite")
    with pytest.raises(NotReadableError, match=r"pip install xllamacpp.*--unproven true to write"):
        export(directory, "gguf")
    assert not list(tmp_path.glob("*.gguf"))
    done = export(directory, "gguf", unproven=True)
    assert done.proof is None
    assert "NOT PROVEN HERE" in caplog.text
    assert (
        json.loads(done.path.with_name(f"{done.path.name}.export.json").read_text())["proof"]
        is None
    )


def test_an_export_that_fails_its_proof_leaves_nothing(directory, tmp_path, monkeypatch):
    read = GgufTarget.read_back

    def wrong(self, source, out, windows, options):
        return read(self, source, out, [window[::-1] for window in windows], options)

    monkeypatch.setattr(GgufTarget, "read_back", wrong)
    with pytest.raises(RuntimeError, match="was not kept: .* computes other logits"):
        export(directory, "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_tokens_are_named():
    check_same_tokens("text", [1, 2], [1, 2])
    with pytest.raises(RuntimeError, match=r"from token 1 on: \[3\] where the tokenizer makes \[2"):
        check_same_tokens("text", [1, 2], [1, 3])
    assert all(text == text.strip() for text in sample_texts())


def test_widths_that_do_not_divide_are_told():
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    assert block_warnings(config, None) == block_warnings(config, "q8_0") == []
    (told,) = block_warnings(config, "q4_k_m")
    assert "no multiple of 256: hidden_size 576; llama.cpp keeps such matrices in larger" in told
    (told,) = parallel_warnings(config)
    assert "not divisible by 2: attention heads 9, key-value heads 3" in told
    config.num_attention_heads, config.num_key_value_heads = 8, 2
    assert parallel_warnings(config) == []  # several devices hold the same key-value head


def test_the_command_line_exports(directory, tmp_path, capsys):
    main(["export", directory, "--to", "gguf", "--out", str(tmp_path / "x.gguf")])
    assert (tmp_path / "x.gguf").stat().st_size > 0
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path / "none"), "--to", "gguf"])
    assert str(stopped.value.code).startswith("prunelight: error: ")
    assert "\n" not in str(stopped.value.code)
