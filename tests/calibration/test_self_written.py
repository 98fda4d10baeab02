"""The dense model writes its own calibration windows: what they are, when they are written anew."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import constants
from runs import VARIED_TEXT, make_data, make_module, make_trainer, write_model
from text_tokenizers import make_tokenizer
from tiny import tiny_model, token_windows

import prunelight
from prunelight.calibration import self_written
from prunelight.calibration.self_written import prefixes_for, self_written_windows
from prunelight.callbacks import DepthPruning, ShortGPT
from prunelight.comparison.grid import start_key
from prunelight.comparison.settings import ComparisonSettings, DataSettings, ModelSettings
from prunelight.evaluation.perplexity import perplexity
from prunelight.models.placement import move_if_it_fits
from prunelight.training.score_text import windows_of_text


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Keep what is written in a directory of the test."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.fixture
def generations(monkeypatch):
    """Count the batches that a model writes."""
    counted = []
    write = self_written._written
    monkeypatch.setattr(
        self_written, "_written", lambda *given: counted.append(given[1]) or write(*given)
    )
    return counted


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "kept"


def files(home):
    return sorted(home.rglob("*.safetensors"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mamba", "rwkv", "qwen3_moe"])
def test_windows_continue_the_prefixes_and_the_least_probable_are_dropped(family, kept):
    model, prefixes = tiny_model(family), token_windows(10, 4)
    before = torch.get_rng_state()
    all_of_them = self_written_windows(model, prefixes, 16, 10, kept)
    best = self_written_windows(model, prefixes, 16, 8, kept)
    assert torch.equal(torch.get_rng_state(), before)
    assert all_of_them.shape == (10, 16)
    assert all_of_them.dtype == torch.long
    assert torch.equal(all_of_them[:, :4], prefixes)
    by_perplexity = sorted(range(10), key=lambda i: perplexity(model, all_of_them[i : i + 1]))
    assert torch.equal(best, all_of_them[sorted(by_perplexity[:8])])


def test_the_same_windows_are_written_once(generations, kept):
    model, prefixes = tiny_model(), token_windows(5, 4)
    first = self_written_windows(model, prefixes, 16, 4, kept)
    assert torch.equal(self_written_windows(model, prefixes, 16, 4, kept), first)
    assert len(generations) == 1


def test_another_seed_model_prefix_or_length_has_windows_of_its_own(tmp_path, generations):
    name, other = write_model(tmp_path / "model"), write_model(tmp_path / "other", "gpt2")
    given = [
        {},
        {"seed": 1},
        {"seq_len": 24},
        {"calibration": "self:sample:train"},
        {"num_calibration": 5},
    ]
    for arguments in given:
        data = make_data(name, tmp_path, **{"calibration": "self", **arguments})
        first, again = (data.calibration_windows(prunelight.load(name)[0]) for _ in range(2))
        assert torch.equal(first, again)
    assert len(generations) == len(given)
    make_data(other, tmp_path, calibration="self").calibration_windows(prunelight.load(other)[0])
    assert len(generations) == len(given) + 1


def test_a_killed_writing_loses_one_batch(generations, kept, monkeypatch, caplog):
    monkeypatch.setattr(self_written, "_TOKENS_AT_ONCE", 32)  # two windows
    model, prefixes = tiny_model(), token_windows(6, 4)
    whole = self_written_windows(model, prefixes, 16, 6, kept)
    for file in files(kept)[1:]:
        file.unlink()
    generations.clear()
    assert torch.equal(self_written_windows(model, prefixes, 16, 6, kept), whole)
    assert len(generations) == 2
    files(kept)[0].write_bytes(files(kept)[0].read_bytes()[:-9])
    assert torch.equal(self_written_windows(model, prefixes, 16, 6, kept), whole)
    assert len(generations) == 3
    assert "0.safetensors is damaged" in caplog.text


def test_batches_draw_numbers_of_their_own(kept, monkeypatch):
    monkeypatch.setattr(self_written, "_TOKENS_AT_ONCE", 32)
    prefix = token_windows(1, 4).expand(6, 4)
    windows = self_written_windows(tiny_model(), prefix, 16, 6, kept)
    assert len({tuple(window.tolist()) for window in windows}) == 6


def test_of_two_that_write_at_once_the_first_counts(kept, monkeypatch):
    model, prefixes, write = tiny_model(), token_windows(5, 4), self_written._written
    first = self_written_windows(model, prefixes, 16, 5, kept, seed=1)
    (of_first,) = files(kept)
    hidden = of_first.rename(of_first.with_suffix(".hidden"))

    def late(*given):
        part = write(*given)
        hidden.rename(of_first)  # the other one was faster
        return part

    monkeypatch.setattr(self_written, "_written", late)
    assert torch.equal(self_written_windows(model, prefixes, 16, 5, kept, seed=2), first)


def test_a_models_own_settings_of_generation_change_nothing(kept, tmp_path):
    model, prefixes = tiny_model(), token_windows(5, 4)
    plain = self_written_windows(model, prefixes, 16, 5, kept)
    own = {"temperature": 0.1, "top_p": 0.1, "repetition_penalty": 9.0, "min_p": 0.9}
    model.generation_config.update(**own)
    assert torch.equal(self_written_windows(model, prefixes, 16, 5, tmp_path / "other"), plain)
    assert model.generation_config.min_p == 0.9


def test_windows_longer_than_learned_positions_are_refused_before_any_is_written(kept, generations):
    model = tiny_model("gpt2", max_position_embeddings=32)
    with pytest.raises(ValueError, match="seq_len=40 must be at most 32"):
        self_written_windows(model, token_windows(5, 4), 40, 4, kept)
    assert not generations


def test_a_home_that_cannot_be_written_is_told_before_any_is_written(tmp_path, generations):
    (tmp_path / "file").write_text("no directory", encoding="utf-8")
    with pytest.raises(OSError, match=r"calibration='self' keeps .*; set the environment variable"):
        self_written_windows(tiny_model(), token_windows(5, 4), 16, 4, tmp_path / "file" / "kept")
    assert not generations


def test_a_streamed_model_takes_what_was_written_where_it_was_whole(kept):
    prefixes = token_windows(5, 4)
    written = self_written_windows(tiny_model(), prefixes, 16, 4, kept)
    model = move_if_it_fits(tiny_model(), torch.device("meta"), offload=True)
    assert torch.equal(self_written_windows(model, prefixes, 16, 4, kept), written)


def test_a_streamed_model_is_refused(kept):
    model = move_if_it_fits(tiny_model(), torch.device("meta"), offload=True)
    with pytest.raises(ValueError, match="calibration='self': the layers of this model go"):
        self_written_windows(model, token_windows(5, 4), 16, 4, kept)


def test_data_of_the_model_needs_the_model_and_text(tmp_path):
    rows = [{"instruction": "Add.", "output": "two and two are four " * 9}] * 20
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    name = make_tokenizer()
    with pytest.raises(ValueError, match="needs the dense model"):
        make_data(name, tmp_path, calibration="self").calibration_windows()
    with pytest.raises(ValueError, match="takes prefixes of text, and the source holds instr"):
        make_data(
            name, tmp_path, calibration=f"self:{tmp_path / 'rows.jsonl'}", seq_len=128
        ).calibration_windows(tiny_model())
    with pytest.raises(ValueError, match="'self' must stand alone"):
        make_data(name, tmp_path, calibration=["self", "sample:train"])
    with pytest.raises(ValueError, match=r"num_calibration=9999 takes 12499 prefixes of"):
        make_data(name, tmp_path, calibration="self", num_calibration=9999).calibration_windows(
            tiny_model()
        )
    with pytest.raises(ValueError, match="seq_len=3 must be at least 4 where calibration='self'"):
        make_data(name, tmp_path, calibration="self", seq_len=3).calibration_windows(tiny_model())
    with pytest.raises(ValueError, match="calibration names 'sample:train' twice"):
        make_data(name, tmp_path, calibration=["sample:train", "sample:train"])


def test_a_text_of_a_method_of_its_own_is_not_written(tmp_path):
    model, _ = prunelight.load(write_model(tmp_path / "model"))
    with pytest.raises(ValueError, match="redundancy_text='self': a method reads a text"):
        windows_of_text(model, "self", 4, 16, 0, "redundancy_text")


def test_a_contest_notes_the_state_of_a_file_of_prefixes(tmp_path):
    text = tmp_path / "varied.txt"
    text.write_text(VARIED_TEXT, encoding="utf-8")
    settings = ComparisonSettings(
        ModelSettings("tiny"),
        [{"class_path": "ShortGPT"}],
        data=DataSettings(calibration=f"self:{text}"),
    )
    before = start_key(settings)
    text.write_text(VARIED_TEXT * 2, encoding="utf-8")
    assert start_key(settings) != before


@pytest.mark.parametrize("bos", ["never", "always"])
def test_prefixes_are_of_the_source_and_windows_of_the_asked_length(tmp_path, bos):
    name = write_model(tmp_path / "model")
    model, tokenizer = prunelight.load(name)
    text = tmp_path / "varied.txt"
    text.write_text(VARIED_TEXT, encoding="utf-8")
    data = make_data(tokenizer, tmp_path, calibration=f"self:{text}", bos=bos)
    windows = data.calibration_windows(model)
    assert windows.shape == (4, 32)
    prefixes = data.examples("calibration")
    assert len(prefixes) >= prefixes_for(4)
    width = 8 + (bos == "always")
    assert {len(example[0]) for example in prefixes} == {width}
    starts = {tuple(example[0].tolist()) for example in prefixes}
    assert all(tuple(window[:width].tolist()) in starts for window in windows)


def test_a_fit_and_a_plan_see_the_same_windows_and_a_resume_writes_none(tmp_path, generations):
    name = write_model(tmp_path / "model")
    arguments = {"calibration": "self", "seed": 3}
    for _ in range(2):
        trainer = make_trainer(tmp_path / "run", ShortGPT(num_layers=2))
        trainer.fit(make_module(name), make_data(name, tmp_path, **arguments))
    assert len(generations) == 1
    model, tokenizer = prunelight.load(name)
    windows = make_data(tokenizer, tmp_path, **arguments).calibration_windows(model)
    assert len(generations) == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    plan = ShortGPT(num_layers=2).plan(model, windows)
    assert report["plans"][0]["calibration"] == plan.to_dict()["calibration"]


def test_what_windows_of_this_number_cannot_do_is_told_before_any_is_written(tmp_path, generations):
    name = write_model(tmp_path / "model")
    trainer = make_trainer(tmp_path / "run", DepthPruning(num_layers=2))
    data = make_data(name, tmp_path, calibration="self", num_calibration=1)
    with pytest.raises(ValueError, match="windows"):
        trainer.fit(make_module(name), data)
    assert not generations


def test_the_commands_and_two_processes_see_the_same_windows(tmp_path):
    name, home = write_model(tmp_path / "model"), tmp_path / "hf"
    config = {
        "model": {"name": name, "probes": False},
        "data": {
            **{"calibration": "self", "seq_len": 32, "num_calibration": 4, "num_validation": 4},
        },
        "trainer": {
            **{"accelerator": "cpu", "default_root_dir": str(tmp_path / "run")},
            "callbacks": [{"class_path": "ShortGPT", "init_args": {"num_layers": 2}}],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    prune = ["prune", "--config", "config.yaml", "--trainer.devices", "2"]
    prune += ["--trainer.strategy", "ddp"]
    plan = ["plan", name, "--method", "ShortGPT", "--num_layers", "2", "--out", "plan.json"]
    plan += ["--data.calibration", "self", "--data.seq_len", "32", "--data.num_calibration", "4"]
    score = ["score", name, "--scores", "block_influence", "--out", "scores", *plan[-6:]]
    of_scores = ["plan", "scores", *plan[2:6], "--out", "plan-of-scores.json"]
    for command in (prune, plan, score, of_scores):
        done = subprocess.run(
            [sys.executable, "-m", "prunelight.cli", *command],
            cwd=tmp_path,
            env={**os.environ, "HF_HOME": str(home)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    (of_run,) = (tmp_path / "run").glob("pruned-*/plan.json")
    told = [json.loads(f.read_text()) for f in (of_run, tmp_path / "plan.json")]
    told += [json.loads((tmp_path / "plan-of-scores.json").read_text())]
    assert len({plan["calibration"]["fingerprint"] for plan in told}) == 1
    assert len({json.dumps(plan["steps"]) for plan in told}) == 1
    assert len(files(home)) == 1
