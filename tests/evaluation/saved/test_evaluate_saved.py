import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from source_tree import ROOT
from task_files import write_tasks
from text_tokenizers import make_tokenizer
from tiny import tiny_model

import prunelight
from prunelight.commands import evaluate as verb
from prunelight.evaluation.quality import text_quality as measuring
from prunelight.evaluation.quality.divergence import against_reference
from prunelight.evaluation.quality.text_windows import text_windows
from prunelight.evaluation.saved.evaluate import evaluate_saved
from prunelight.evaluation.saved.settings import EvaluationSettings
from prunelight.evaluation.tasks.running import run_tasks
from prunelight.evaluation.tasks.task_set import check_tasks

WORDS = "The river runs past the old mill and down to the sea. "


def write_model(path, *, seed=0, **changes):
    tokenizer = make_tokenizer(bos_token="<s>")
    tiny_model("llama", seed=seed, vocab_size=len(tokenizer), **changes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two models of one tokenizer, and two texts."""
    root = tmp_path_factory.mktemp("saved")
    (root / "one.txt").write_text(WORDS * 40, encoding="utf-8")
    (root / "two.txt").write_text("".join(reversed(WORDS)) * 40, encoding="utf-8")
    write_model(root / "pruned", num_hidden_layers=4)
    write_model(root / "dense", seed=1)
    return root


def settings(places, *texts, **changes):
    files = [str(places / text) for text in texts or ("one.txt",)]
    return EvaluationSettings(**{"texts": files, "seq_len": 32, "probes": False, **changes})


def test_offload_to_where_the_model_is_is_told(places, tmp_path, caplog):
    asked = settings(places, max_windows=2)
    evaluate_saved(str(places / "pruned"), asked, out=tmp_path, device="cpu", offload=True)
    assert "offload=True has no effect with device=cpu: the model is there" in caplog.text


def test_speeds_are_not_those_of_a_model_off_its_device(places, tmp_path):
    asked = settings(places, cost=True)
    with pytest.raises(ValueError, match="offload=True cannot be combined with cost=True"):
        evaluate_saved(str(places / "pruned"), asked, out=tmp_path / "out", offload=True)
    assert not (tmp_path / "out").exists()


def test_the_command_hands_offload_on(places, tmp_path, caplog):
    verb.main(arguments(places, "--out", str(tmp_path), "--device", "cpu", "--offload", "true"))
    assert "offload=True has no effect with device=cpu: the model is there" in caplog.text


def test_the_file_holds_what_the_functions_give(places, tmp_path):
    pruned, dense = str(places / "pruned"), str(places / "dense")
    asked = settings(places, "one.txt", "two.txt")
    result = evaluate_saved(pruned, asked, reference=dense, out=tmp_path)
    assert result == json.loads((tmp_path / "evaluation.json").read_text())
    assert result["format"] == 1
    assert result["model"]["name"] == "pruned"
    assert (result["model"]["layers"], result["reference"]["layers"]) == (4, 6)
    assert [text["text"] for text in result["texts"]] == ["one.txt", "two.txt"]
    assert len(result["reference_texts"]) == len(result["divergence"]) == 2
    model, tokenizer = prunelight.load(pruned)
    text = text_windows(tokenizer, places / "two.txt", 32)
    ours, theirs, divergence = against_reference(model, prunelight.load(dense)[0], text)
    assert result["texts"][1]["window_nll"] == ours.window_nll
    assert result["reference_texts"][1]["perplexity"]["value"] == theirs.perplexity.value
    assert result["divergence"][1]["kl"]["value"] == divergence.kl.value
    assert "probes" not in result
    assert "tasks" not in result
    assert str(tmp_path) not in json.dumps(result)


def test_a_model_alone_has_no_reference(places, tmp_path):
    result = evaluate_saved(str(places / "pruned"), settings(places), out=tmp_path)
    assert result["reference"] is None
    assert "divergence" not in result
    assert math.isfinite(result["texts"][0]["perplexity"]["low"])


def test_a_finished_evaluation_is_not_measured_again(places, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "prunelight")
    pruned = str(places / "pruned")
    first = evaluate_saved(pruned, settings(places), out=tmp_path)
    calls = []
    monkeypatch.setattr(measuring, "token_losses", lambda *_: calls.append(1))
    monkeypatch.setattr("prunelight.evaluation.saved.subject.load", None)  # no weight is read
    assert evaluate_saved(pruned, settings(places), out=tmp_path) == first
    assert "is complete: nothing was left to measure" in caplog.text
    assert calls == []


def test_a_further_text_keeps_what_was_measured_and_a_changed_one_does_not(
    places, tmp_path, caplog
):
    caplog.set_level("INFO", "prunelight")
    pruned, text = str(places / "pruned"), tmp_path / "own.txt"
    shutil.copy(places / "one.txt", text)
    evaluate_saved(pruned, settings(places, str(text)), out=tmp_path / "out")
    both = settings(places, str(text), "two.txt")
    result = evaluate_saved(pruned, both, out=tmp_path / "out")
    assert "measured before, and kept: text own.txt" in caplog.text
    assert len(result["texts"]) == 2
    caplog.clear()
    text.write_text(WORDS[5:] * 40, encoding="utf-8")
    again = evaluate_saved(pruned, both, out=tmp_path / "out")
    assert again["texts"][0]["window_nll"] != result["texts"][0]["window_nll"]
    assert again["texts"][1] == result["texts"][1]


def test_other_weights_of_the_same_name_are_measured_again(places, tmp_path):
    write_model(tmp_path / "model")
    first = evaluate_saved(str(tmp_path / "model"), settings(places), out=tmp_path / "out")
    write_model(tmp_path / "model", seed=5)
    second = evaluate_saved(str(tmp_path / "model"), settings(places), out=tmp_path / "out")
    assert first["model"]["fingerprint"] != second["model"]["fingerprint"]
    assert first["texts"][0]["window_nll"] != second["texts"][0]["window_nll"]


def test_a_damaged_part_is_measured_again(places, tmp_path, caplog):
    first = evaluate_saved(str(places / "pruned"), settings(places), out=tmp_path)
    for part in (tmp_path / "parts").iterdir():
        part.write_text(part.read_text()[:-40])
    assert evaluate_saved(str(places / "pruned"), settings(places), out=tmp_path) == first
    assert "that part is measured again" in caplog.text


def test_a_killed_evaluation_goes_on_with_what_is_missing(places, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "prunelight")
    asked, calls = settings(places, "one.txt", "two.txt"), []
    original = measuring.token_losses

    def stopped(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(measuring, "token_losses", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate_saved(str(places / "pruned"), asked, out=tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    monkeypatch.setattr(measuring, "token_losses", original)
    result = evaluate_saved(str(places / "pruned"), asked, out=tmp_path)
    assert "measured before, and kept: text one.txt" in caplog.text
    assert [text["text"] for text in result["texts"]] == ["one.txt", "two.txt"]


def test_what_serving_costs_stands_beside_the_reference(places, tmp_path):
    asked = settings(places, cost=True)
    result = evaluate_saved(
        str(places / "pruned"), asked, reference=str(places / "dense"), out=tmp_path
    )
    assert result["serving"]["batches"].keys() == result["reference_serving"]["batches"].keys()
    assert result["serving"]["ratios"]


def test_tasks_and_probes_stand_beside_the_reference_and_are_kept(tmp_path, monkeypatch, caplog):
    pytest.importorskip("lm_eval")
    rows = write_tasks(tmp_path / "rows")
    pruned = write_model(tmp_path / "pruned", num_hidden_layers=4, max_position_embeddings=256)
    dense = write_model(tmp_path / "dense", seed=1, max_position_embeddings=256)
    options = [pruned, "--reference", dense, "--texts", "--tasks", "piqa"]
    options += ["--tasks_dir", str(rows), "--limit", "8", "--out", str(tmp_path / "out")]
    verb.main(options)
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    task = told["tasks"]["piqa"]
    model, tokenizer = prunelight.load(pruned)
    alone = run_tasks(model, tokenizer, check_tasks(["piqa"], tasks_dir=rows, limit=8))["piqa"]
    assert task["value"] == alone.value
    assert task["outcomes"] == alone.outcomes
    assert told["reference_tasks"]["piqa"]["outcomes"] != ""
    flips = told["flips"]["piqa"]
    assert task["value"] - told["reference_tasks"]["piqa"]["value"] == pytest.approx(
        (flips["wrong_to_right"] - flips["right_to_wrong"]) / 8
    )
    assert told["probes"].keys() == told["reference_probes"].keys()
    assert len(told["samples"]) == len([each for each in told["samples"] if each["reference"]])
    monkeypatch.setattr("prunelight.evaluation.saved.evaluate.run_tasks", None)
    monkeypatch.setattr("prunelight.evaluation.saved.evaluate.run_probes", None)
    verb.main(options)
    assert "nothing was left to measure" in caplog.text


def test_two_evaluations_into_one_directory_are_refused(places, tmp_path):
    held = "from prunelight.runtime.files.directory_lock import DirectoryLock; from pathlib import "
    held += "Path; lock = DirectoryLock(Path(r'{}')); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", held.format(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=r"is in use by process \d+ .* choose another out"):
            evaluate_saved(str(places / "pruned"), settings(places), out=tmp_path)
        other.communicate("\n")
    assert evaluate_saved(str(places / "pruned"), settings(places), out=tmp_path)["texts"]


# --- what is refused, before anything is computed --------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"max_windows": 0}, "max_windows=0 must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"texts": ["a.txt", "a.txt"]}, "text='a.txt' is named twice"),
        ({"tasks": ["piqa", "piqa"]}, "tasks='piqa' is named twice"),
        ({"texts": [], "probes": False}, "there is nothing to measure"),
        ({"limit": 5}, "limit=5 has no effect without tasks; leave it out"),
        ({"tasks_dir": "rows"}, "tasks_dir='rows' has no effect without tasks"),
        ({"apply_chat_template": True}, "apply_chat_template=True has no effect without tasks"),
        ({"texts": [], "seq_len": 64}, "seq_len=64 has no effect without texts"),
        ({"texts": [], "keep_tail": True}, "keep_tail=True has no effect without texts"),
    ],
)
def test_settings_that_cannot_be_are_one_line(changes, fault):
    with pytest.raises(ValueError, match=fault):
        EvaluationSettings(**changes)


def test_models_and_texts_that_cannot_be_measured_are_refused(places, tmp_path, monkeypatch):
    monkeypatch.setattr("prunelight.evaluation.saved.subject.load", None)  # no weight is read

    def refused(fault, name="pruned", asked=None, kind=ValueError, **changes):
        with pytest.raises(kind, match=fault):
            evaluate_saved(
                str(places / name),
                asked or settings(places),
                **{"out": tmp_path / "out", **changes},
            )

    refused("must be an existing directory", "none")
    (tmp_path / "empty").mkdir()
    refused("has no config.json", tmp_path / "empty")
    refused("is no model but holds some: give one of dense, pruned in it", places)
    other = tmp_path / "other"
    shutil.copytree(places / "dense", other)
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.add_tokens(["river"])
    tokenizer.save_pretrained(other)
    refused(
        r"another tokenizer than .* \(1 entries of .* give the model that was", reference=str(other)
    )
    refused("does not exist", asked=settings(places, "none.txt"), kind=FileNotFoundError)
    (tmp_path / "blank.txt").write_text(" \n")
    refused("is empty; give a source that holds text", asked=settings(tmp_path, "blank.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\xd8x")
    refused("is not UTF-8 text", asked=settings(tmp_path, "bytes.txt"))
    (tmp_path / "short.txt").write_text("Too short.")
    refused("fill no window of seq_len=32", asked=settings(tmp_path, "short.txt"))
    refused(
        "seq_len=256 must be at most 128, the model's context",
        asked=settings(places, seq_len=256),
    )
    refused("device='cuda:99' cannot be used here", device="cuda:99")
    refused("dtype='float8' must be one of", dtype="float8")


def test_places_that_cannot_hold_a_result_are_refused(places, tmp_path):
    def refused(out, fault):
        with pytest.raises(ValueError, match=fault):
            evaluate_saved(str(places / "pruned"), settings(places), out=out)

    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file; give a directory")
    refused(places / "pruned", "lies in the directory of a model")
    refused(places / "pruned" / "below", "lies in the directory of a model")
    (tmp_path / "evaluation.json").write_text('{"results": 1}')
    refused(tmp_path, "was not written by this version of prunelight evaluate; move it")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"results": 1}
    with pytest.raises(OSError, match="cannot write"):
        evaluate_saved(str(places / "pruned"), settings(places), out="/proc/here")


# --- the command -----------------------------------------------------------------------------


def arguments(places, *more):
    given = [str(places / "pruned"), "--reference", str(places / "dense"), "--seq_len", "32"]
    return [*given, "--probes", "false", "--text", str(places / "one.txt"), *more]


def test_the_command_prints_a_table_beside_the_reference(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    verb.main(arguments(places))
    shown = capsys.readouterr().out
    for word in ("pruned", "dense", "perplexity", "same top-1", "KL in nats", "95 % bootstrap"):
        assert word in shown
    assert (tmp_path / "evaluation-pruned" / "evaluation.json").is_file()
    assert "Result: evaluation-pruned/evaluation.json" in shown


def test_a_fault_is_one_line(places, capsys):
    with pytest.raises(SystemExit) as stopped:
        verb.main(arguments(places, "--limit", "0"))
    assert str(stopped.value).startswith("prunelight: error: limit=0 must be at least 1")
    assert len(str(stopped.value).splitlines()) == 1


def test_two_processes_write_what_one_writes(places, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "prunelight.cli", "evaluate"]
    command += [*arguments(places), "--out", str(tmp_path / "two"), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    together = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    alone = evaluate_saved(
        str(places / "pruned"),
        settings(places),
        reference=str(places / "dense"),
        out=tmp_path / "one",
        device="cpu",
    )
    assert together["facts"]["processes"] == 2
    assert torch.tensor(together["texts"][0]["window_nll"]).allclose(
        torch.tensor(alone["texts"][0]["window_nll"]), rtol=1e-6
    )
    assert together["divergence"][0]["kl"]["value"] == pytest.approx(
        alone["divergence"][0]["kl"]["value"], rel=1e-4
    )
    assert done.stdout.count("Result:") == 1
