"""Files of format 1, written by commit a55f54c (tests/fixtures/format_1/make.py), still serve.

A run that was killed goes on in a copy of its directory: it reuses the pruned base, trains from the
saved step, and ends like the run of the same old code that was never killed. Directories that the
old code saved load, resume and keep their logits; the same arguments still give the same plans.
"""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.cli import main

FORMAT_1 = Path(__file__).resolve().parents[1] / "fixtures" / "format_1"
KILLED = ("killed_shortgpt", "killed_gradual", "killed_nf4")
SAVED_STEP = 4  # optimizer steps that last.ckpt holds
CLOSE = 1e-3  # processors sum in other orders; a lost state of a callback changes losses by 1e-2


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


EXPECTED = read_json(FORMAT_1 / "expected.json")
METHODS = read_json(FORMAT_1 / "methods.json")
LOGITS = load_file(FORMAT_1 / "logits.safetensors")


def copied(name, tmp_path, monkeypatch):
    """Copy a directory of format 1, make the copy the current directory, and return it."""
    directory = tmp_path / name
    shutil.copytree(FORMAT_1 / name, directory)
    monkeypatch.chdir(directory)
    return directory


def edit_config(change):
    config = yaml.safe_load(Path("config.yaml").read_text())
    change(config)
    Path("config.yaml").write_text(yaml.safe_dump(config))


def checkpoint_of(directory):
    return torch.load(directory / "run" / "checkpoints" / "last.ckpt", weights_only=True)


def skip_if_libraries_differ(directory):
    """Skip where a library has other defaults than the one that format 1 took them from."""
    checkpoint = checkpoint_of(directory)
    (base,) = (directory / "run").glob("pruned-*")
    config = json.loads(AutoConfig.from_pretrained(base).to_json_string(use_diff=False))
    odd = config.keys() ^ checkpoint["prunelight"]["config"].keys()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    odd |= optimizer.defaults.keys() ^ (
        checkpoint["prunelight_resume"]["settings"]["optimizer"].keys() - {"class"}
    )
    if odd:
        pytest.skip(f"transformers or torch of format 1 had other defaults: {sorted(odd)}")


@pytest.fixture(params=KILLED)
def killed(request, tmp_path, monkeypatch):
    """A copy of the directory of a killed run, which is the current directory."""
    if request.param == "killed_nf4":
        pytest.importorskip("bitsandbytes", reason="pip install 'prunelight[quantization]'")
    directory = copied(request.param, tmp_path, monkeypatch)
    skip_if_libraries_differ(directory)
    return directory


def contents(directory):
    """What a base holds, without the record of what was measured: a reuse says so there."""
    files = (file for file in directory.rglob("*") if file.name != "measured.json")
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def logged(directory, version, name):
    """The values of a metric by the logged step."""
    with (directory / "run" / "logs" / f"version_{version}" / "metrics.csv").open() as file:
        return {row["step"]: float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def keys_of(value, path=""):
    found = {path} if path else set()
    if isinstance(value, dict):
        for key in value:
            found |= keys_of(value[key], f"{path}/{key}")
    elif isinstance(value, list):
        for element in value:
            found |= keys_of(element, f"{path}[]")
    return found


def assert_same_report_keys(directory, name):
    expected = set(read_json(FORMAT_1 / "report_keys.json")[name])
    keys = keys_of(read_json(directory / "run" / "report.json"))
    keys, expected = without_fingerprints(keys), without_fingerprints(expected)
    assert expected <= keys
    # A method may get further arguments. What other programs make of the result is told since 0.2.
    further = ("/plans[]/arguments/", "/loads_in", "/costs[]/earlier_sec", "/stages[]/factors")
    further += ("/evaluation/examined", "/stages[]/examined")
    further += ("/curves", "/machine", "/data", "/seed", "/command", "/date")
    further += ("/outcomes[]/outliers_kept",)
    assert {key for key in keys - expected if not key.startswith(further)} == set()


def without_fingerprints(keys):
    """A base that is made anew has a fingerprint of format 2 in its name."""
    return {re.sub(r"pruned-[0-9a-f]{16}", "pruned", key) for key in keys}


# --- killed runs


def test_a_killed_run_goes_on_without_scoring_and_ends_like_a_whole_one(killed, caplog, recwarn):
    expected, run = EXPECTED[killed.name], killed / "run"
    (base,) = run.glob("pruned-*")
    before, measured = contents(base), read_json(base / "measured.json")

    main(["fit", "--config", "config.yaml"])

    assert f"reusing run/{base.name}" in caplog.text
    assert [*run.glob("pruned-*")] == [base]
    assert contents(base) == before
    report = read_json(run / "report.json")
    costs = {cost["name"]: cost for cost in report["costs"]}
    for cost in measured["costs"]:
        assert costs[cost["name"]] == {
            **cost,
            "reused": True,
            "earlier_seconds": 0.0,
        }, "it was measured anew"

    lost = "callbacks used to create the checkpoint need to be provided"
    assert not [w for w in recwarn if lost in str(w.message)], "a callback's state is dropped"
    states = checkpoint_of(killed)["callbacks"].values()
    assert max(len(state.get("history", ())) for state in states) == 2, "a validation is forgotten"
    losses = logged(killed, 1, "train/loss")
    assert min(map(int, losses)) == SAVED_STEP, "it starts anew"
    assert losses == pytest.approx(
        {step: loss for step, loss in expected["train/loss"].items() if step in losses}, rel=CLOSE
    )
    assert {**expected["killed"]["train/loss"], **losses}.keys() == expected["train/loss"].keys()
    for metric in ("perplexity", "linear_sparsity"):
        stages = {stage["name"]: stage[metric] for stage in report["stages"]}
        assert stages == pytest.approx(expected[metric], rel=CLOSE), metric
    for fact in ("mode", "optimizer_steps", "weights_of_step", "tokens_seen"):
        assert report["recovery"][fact] == expected["recovery"][fact], fact
    assert_same_report_keys(killed, killed.name)

    weights = load_file(run / "final" / "model.safetensors")
    norms = {name: weight.double().norm().item() for name, weight in weights.items()}
    assert norms == pytest.approx(expected["norms"], rel=CLOSE)
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    loss = model(torch.arange(3, 19)[None], labels=torch.arange(3, 19)[None]).loss
    assert math.isfinite(loss.item())


def test_validate_rebuilds_the_model_that_an_old_checkpoint_names(killed):
    """The checkpoint names its base by an absolute path, which the copy has to be told of."""
    path, checkpoint = Path("run/checkpoints/last.ckpt"), checkpoint_of(killed)
    (base,) = (killed / "run").glob("pruned-*")
    checkpoint["prunelight"]["base"] = str(base)
    torch.save(checkpoint, path)
    main(["validate", "--config", "config.yaml", "--ckpt_path", str(path)])
    perplexities = logged(killed, 1, "val/perplexity")
    expected = EXPECTED[killed.name]["killed"]["val/perplexity"]
    assert [*perplexities.values()] == pytest.approx([*expected.values()], rel=CLOSE)


def test_the_config_that_an_old_run_saved_still_parses(killed, capsys):
    # Lightning's own arguments change with its version.
    saved = yaml.safe_load(Path("run/logs/version_0/config.yaml").read_text())
    given = yaml.safe_load(Path("config.yaml").read_text())["trainer"]
    saved["trainer"] = {key: value for key, value in saved["trainer"].items() if key in given}
    Path("saved.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(SystemExit, match="^0$"):
        main(["fit", "--config", "saved.yaml", "--print_config"])
    parsed = yaml.safe_load(capsys.readouterr().out)
    for section in ("model", "data", "trainer"):
        for key, value in saved[section].items():
            assert of_format_1(parsed[section][key], value) == value, f"{section}.{key}"


def of_format_1(parsed, saved):
    """What was parsed, less the arguments that callbacks got since."""
    if isinstance(saved, dict):
        return {key: of_format_1(parsed.get(key), value) for key, value in saved.items()}
    if isinstance(saved, list) and isinstance(parsed, list) and len(saved) == len(parsed):
        return [of_format_1(*pair) for pair in zip(parsed, saved, strict=True)]
    return parsed


# --- an argument that format 1 did not have


class LaterShortGPT(ShortGPT):
    """ShortGPT of a later version, with an argument that changes nothing at its default."""

    def __init__(
        self,
        ratio: float | None = None,
        num_layers: int | None = None,
        score: str = "block_influence",
        ignore_first_tokens: int = 0,
        protected: list[int] | None = None,
        granularity: str = "layer",
        novelty: float = 0.0,
    ) -> None:
        super().__init__(ratio, num_layers, score, ignore_first_tokens, protected, granularity)
        self.novelty = novelty


# Plans and fingerprints hold this name; a config goes by the qualified name, so both are found.
LaterShortGPT.__name__ = "ShortGPT"


def fit_with_novelty(tmp_path, monkeypatch, novelty):
    """Start the killed run again with the later ShortGPT; return its bases and the one before."""
    directory = copied("killed_shortgpt", tmp_path, monkeypatch)
    skip_if_libraries_differ(directory)
    (before,) = (directory / "run").glob("pruned-*")

    def change(config):
        method = {"num_layers": 1, "novelty": novelty}
        path = f"{LaterShortGPT.__module__}.{LaterShortGPT.__qualname__}"
        config["trainer"]["callbacks"][0] = {"class_path": path, "init_args": method}

    edit_config(change)
    main(["fit", "--config", "config.yaml"])
    return sorted((directory / "run").glob("pruned-*")), before


def test_a_base_that_lacks_a_new_argument_counts_as_made_with_its_default(tmp_path, monkeypatch):
    bases, before = fit_with_novelty(tmp_path, monkeypatch, 0.0)
    assert bases == [before]


def test_a_base_that_lacks_a_new_argument_does_not_serve_another_value(tmp_path, monkeypatch):
    bases, before = fit_with_novelty(tmp_path, monkeypatch, 0.5)
    assert len(bases) == 2
    assert before in bases


# --- saved directories

LOAD = """
import sys, prunelight
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for name, expected in load_file(Path(sys.argv[1], "logits.safetensors")).items():
    model = AutoModelForCausalLM.from_pretrained(Path(sys.argv[1], name))
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(16).view(2, 8)).logits, expected)
    print(name, type(model).__name__)
"""
LOAD_WITHOUT_US = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
name = "saved_sliced_with_code"
model = AutoModelForCausalLM.from_pretrained(Path(sys.argv[1], name), trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.arange(16).view(2, 8)).logits
torch.testing.assert_close(logits, load_file(Path(sys.argv[1], "logits.safetensors"))[name])
assert "prunelight" not in sys.modules
"""


def run_python(script, tmp_path):
    """Run a script in a fresh process that finds prunelight where this one does."""
    root = Path(prunelight.__file__).resolve().parent.parent
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_MODULES_CACHE": str(tmp_path / "code")}
    command = [sys.executable, "-c", script, str(FORMAT_1)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_saved_directories_load_in_a_fresh_process_with_the_same_logits(tmp_path):
    classes = dict(line.split() for line in run_python(LOAD, tmp_path).splitlines())
    assert classes.keys() == METHODS.keys()
    assert classes["saved_shortgpt"] == classes["saved_sparse"] == "LlamaForCausalLM"


def test_a_sliced_directory_with_its_code_loads_without_prunelight(tmp_path):
    run_python(LOAD_WITHOUT_US, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_arguments_give_the_same_plan_and_weights(name, tmp_path, monkeypatch):
    """All saved directories come from the model and the text of the killed ShortGPT run."""
    directory = copied("killed_shortgpt", tmp_path, monkeypatch)
    shutil.rmtree(directory / "run")

    def change(config):
        config["model"]["recovery"] = "none"
        config["trainer"]["callbacks"][0] = METHODS[name]

    edit_config(change)
    main(["prune", "--config", "config.yaml"])
    assert_same_report_keys(directory, name)
    (ours,) = (directory / "run").glob("pruned-*")
    plan, expected = (read_json(place / "plan.json") for place in (ours, FORMAT_1 / name))
    for key in ("format", "method", "model", "calibration", "found", "steps"):
        assert plan[key] == expected[key], key
    for key, value in expected["arguments"].items():
        assert plan["arguments"][key] == value, key
    assert plan["scores"].keys() == expected["scores"].keys()
    for key, scores in expected["scores"].items():
        assert plan["scores"][key] == pytest.approx(scores, rel=1e-3, abs=1e-7), key
    ours, theirs = (load_file(p / "model.safetensors") for p in (ours, FORMAT_1 / name))
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_directory_can_be_recovered(name, tmp_path, monkeypatch):
    directory = copied("killed_shortgpt", tmp_path, monkeypatch)
    shutil.rmtree(directory / "run")
    saved = directory / name
    shutil.copytree(FORMAT_1 / name, saved)

    def change(config):
        config["model"]["name"] = name
        config["model"]["trust_remote_code"] = name.endswith("with_code")
        config["trainer"] |= {"max_steps": 2, "callbacks": []}

    edit_config(change)
    main(["fit", "--config", "config.yaml"])
    final = directory / "run" / "final"
    assert (final / "plan.json").read_bytes() == (saved / "plan.json").read_bytes()
    before, after = (load_file(place / "model.safetensors") for place in (saved, final))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    if name == "saved_sparse":
        assert all(torch.equal(before[key] == 0, after[key] == 0) for key in before)
    AutoModelForCausalLM.from_pretrained(final)
