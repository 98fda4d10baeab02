"""The command line, in this process where that is enough and in a real one where it is not."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from runs import TEXT, write_model
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.cli import OPTIONS, VERBS, help_text, main
from prunelight.lightning_cli import (
    CLI,
    TRAINER_TITLE,
    Trainer,
    find_configs,
    our_error,
    pruning_methods,
)
from prunelight.models.families.matrices import matrices
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule

# Configs of `compare` and `reproduce` are parsed by tests/comparison.
CONFIGS = [
    path
    for path in sorted(Path(str(files("prunelight.configs"))).rglob("*.yaml"))
    if "prunelight compare" not in path.read_text(encoding="utf-8")
]


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def arguments(name, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config = {
        "model": {"name": name, "learning_rate": 0.01, "warmup_steps": 0},
        "data": {
            **dict.fromkeys(("train", "validation", "calibration"), str(tmp_path / "text.txt")),
            "seq_len": 32,
            "batch_size": 2,
            "num_calibration": 4,
            "num_validation": 3,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path / "run"),
            "callbacks": [{"class_path": "ShortGPT", "init_args": {"num_layers": 2}}],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["--config", str(path)]


def run(*arguments):
    """Run the real command in a process of its own."""
    command = [sys.executable, "-m", "prunelight.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def fails(capsys, *arguments):
    """Run the command and return its one line of error."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert isinstance(stopped.value.code, str)
    assert "\n" not in stopped.value.code
    return stopped.value.code


def help_of(capsys, verb):
    """Return what `prunelight VERB --help` shows."""
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_verbs_and_the_options_that_most_runs_need(capsys):
    for arguments in (["--help"], ["-h"], ["--config", "quickstart.yaml", "--help"]):
        main(arguments)
        assert capsys.readouterr().out == help_text()
    text = " ".join(help_text().split())
    for sentence in (*VERBS.values(), *OPTIONS.values()):
        assert sentence in text
        assert sentence[0].isupper()
        assert sentence.endswith(".")
    assert set(VERBS) == set(CLI.subcommands())


def test_lines_of_help_fit_the_terminal(monkeypatch):
    for columns in (60, 80, 160):
        monkeypatch.setenv("COLUMNS", str(columns))
        rows = help_text().split("verbs:")[1].split("example:")[0].splitlines()
        assert max(map(len, rows)) <= max(columns, 66)


def test_a_command_without_a_verb_is_an_error_that_shows_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == help_text()


def test_version_is_told(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"prunelight {prunelight.__version__}\n"


def test_help_of_a_verb_shows_our_options_before_those_of_lightning(capsys):
    text = help_of(capsys, "fit")
    assert text.startswith("usage: prunelight fit --config FILE [--OPTION VALUE ...]\n")
    ours = (
        "\n  --model.name ",
        "\n  --data.train ",
        "\n  --trainer.callbacks ",
        "\n  --ckpt_path ",
    )
    places = [text.index(part) for part in (VERBS["fit"], *ours, f"\n{TRAINER_TITLE}:")]
    assert places == sorted(places)
    assert text.index("\n  --trainer.fast_dev_run ") > places[-1]
    assert text.index("\n  --trainer.max_steps ") < places[-1]
    for option in OPTIONS:
        assert f" {option.split()[0]} " in text
    one_line = " ".join(text.split())
    assert f"Pruning methods for --trainer.callbacks: {', '.join(pruning_methods())}." in one_line


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_cuts_no_sentence(verb, capsys):
    text = help_of(capsys, verb)
    assert VERBS[verb] in " ".join(text.split())
    titles = [line for line in text.splitlines()[4:] if line and not line.startswith(" ")]
    assert all(title.endswith(":") for title in titles)
    assert "make sure you never run on your" not in text, "the first line of a longer sentence"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses_and_says_how_it_is_run(config):
    text = config.read_text(encoding="utf-8")
    assert f"prunelight fit --config {config.name}" in text
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(RecoveryModule, "model")
    parser.add_lightning_class_args(TextDataModule, "data")
    parser.link_arguments("model.name", "data.tokenizer")
    parsed = parser.parse_string(text)
    assert parsed.data.tokenizer == parsed.model.name


def test_fit_writes_a_run_and_ends_with_the_table(arguments, tmp_path, capsys):
    main(["fit", *arguments])
    shown = capsys.readouterr().out
    for word in ("dense", "pruned", "recovered", "perplexity", "decode"):
        assert word in shown
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert model.config.num_hidden_layers == 4
    assert list((tmp_path / "run" / "logs").glob("**/metrics.csv"))


def test_prune_stops_after_the_pruned_directory(arguments, tmp_path, capsys):
    main(["prune", *arguments])
    (base,) = (tmp_path / "run").glob("pruned-*")
    assert prunelight.load(base)[0].config.num_hidden_layers == 4
    assert not (tmp_path / "run" / "final").exists()
    assert not list((tmp_path / "run").glob("**/*.ckpt"))
    stages = json.loads((tmp_path / "run" / "report.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["dense", "pruned"]
    assert "pruned" in capsys.readouterr().out


def with_zeros(arguments, method, **settings):
    """Replace the method of the config by one that puts in zeros."""
    path = Path(arguments[1])
    config = yaml.safe_load(path.read_text())
    callback = {"class_path": method, "init_args": settings}
    config["trainer"] |= {"callbacks": [callback], "max_steps": 4}
    path.write_text(yaml.safe_dump(config))
    return arguments


def share_of_zeros(directory):
    found = matrices(prunelight.load(directory)[0])
    weights = torch.cat([matrix.parameter.flatten() for matrix in found.values()])
    return (weights == 0).double().mean().item()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("WeightPruning", {"pattern": "2:4", "solver": "magnitude"}),
        ("DLP", {"pattern": "2:4", "solver": "sparsegpt", "sparsegpt": {"dampening": 0.1}}),
        ("DLP", {"sparsity": 0.5, "schedule": {"start_step": 1, "end_step": 3, "every": 1}}),
    ],
    ids=["uniform", "sparsegpt", "gradual"],
)
def test_fit_leaves_the_zeros_that_the_config_asks_for(arguments, tmp_path, method, settings):
    main(["fit", *with_zeros(arguments, method, **settings)])
    assert share_of_zeros(tmp_path / "run" / "final") == pytest.approx(0.5, abs=1 / 32)


def test_an_old_config_of_dlp_with_owl_works_and_is_told_what_to_write(arguments, tmp_path):
    with_zeros(arguments, "prunelight.callbacks.DLP", sparsity=0.5, allocation="owl")
    done = run("prune", *arguments)
    assert done.returncode == 0, done.stderr
    told = "write prunelight.callbacks.WeightPruning(sparsity=0.5, allocation='owl')"
    assert done.stderr.count(told) == 1
    (base,) = (tmp_path / "run").glob("pruned-*")
    assert prunelight.Plan.load(base / "plan.json").method == "DLP"
    assert share_of_zeros(base) == pytest.approx(0.5, abs=1 / 32)


def test_prune_refuses_a_schedule_which_prunes_while_the_model_trains(arguments, tmp_path, capsys):
    with_zeros(arguments, "DLP", sparsity=0.5, schedule={"start_step": 0, "end_step": 4})
    assert "prunes while the model trains; use fit" in fails(capsys, "prune", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_wrong_solver_names_the_argument_and_the_choices(arguments, capsys):
    with_zeros(arguments, "WeightPruning", sparsity=0.5, solver="wnda")
    with pytest.raises(SystemExit):
        main(["fit", *arguments])
    message = capsys.readouterr().err
    assert "solver=" in message
    assert "sparsegpt" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 70}, "sparsity=70.0 must lie in [0, 1)"),
        ({"pattern": "2/4"}, "pattern='2/4' must be N:M"),
        ({"pattern": "5:7"}, "model.layers.0.self_attn.q_proj has 32"),
        ({"sparsity": 0.5, "alpha": 0.9, "strict": True}, "take a smaller alpha"),
        ({"sparsity": 0.5, "schedule": {"start_step": 0, "end_step": 5}}, "4 optimizer steps"),
        ({"sparsity": 0.5, "schedule": {"start_step": 5, "end_step": 5}}, "below end_step=5"),
    ],
)
def test_a_fault_of_dlp_is_one_line_too(arguments, capsys, tmp_path, settings, message):
    assert message in fails(capsys, "fit", *with_zeros(arguments, "DLP", **settings))
    assert not list((tmp_path / "run").glob("pruned-*"))


def with_methods(arguments, *methods, **model):
    """Replace the method of the config by others: (name, arguments)."""
    path = Path(arguments[1])
    config = yaml.safe_load(path.read_text())
    config["trainer"]["callbacks"] = [{"class_path": n, "init_args": a} for n, a in methods]
    config["model"] |= model
    path.write_text(yaml.safe_dump(config))
    return arguments


def test_depth_then_width_in_one_config_with_latency(arguments, tmp_path):
    latency = {"num_tokens": 4, "num_warmup": 1, "num_runs": 2}
    depth = ("SlidingLayerMerging", {"num_layers": 2})
    width = ("WidthPruning", {"neuron_ratio": 0.25, "head_ratio": 0.5, "multiple": 8})
    main(["fit", *with_methods(arguments, depth, width, latency=latency)])
    root = tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(root / "final")
    config = model.config
    assert (config.num_hidden_layers, config.intermediate_size) == (4, 48)
    assert (config.num_key_value_heads, config.num_attention_heads) == (1, 2)
    report = json.loads((root / "report.json").read_text())
    assert all(stage["latency_seconds"] > 0 for stage in report["stages"])
    assert report["evaluation"]["latency"]["num_tokens"] == 4
    text = (root / "report.md").read_text()
    assert "| throughput (tokens/s) |" in text
    assert "2 of 6 decoder layers merged away (33.33 %) + 1 of 2 key-value groups kept" in text
    assert "merged windows outlined](cka-2.png)" in text
    assert (root / "cka-2.png").is_file()
    # Without timing, the stages of the base are measured anew.
    main(["fit", *with_methods(arguments, depth, width, latency=None)])
    report = json.loads((root / "report.json").read_text())
    assert report["stages"][0]["latency_seconds"] is None
    assert report["costs"][1]["reused"]


def test_a_model_without_sublayers_recovers_and_its_report_says_how_to_load_it(arguments, tmp_path):
    method = ("ShortGPT", {"num_layers": 2, "granularity": "attention"})
    main(["fit", *with_methods(arguments, method)])
    assert "import prunelight  # its class" in (tmp_path / "run" / "report.md").read_text()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert sum(final.config.drop_attention) == 2


def test_analyze_draws_and_prunes_nothing(arguments, tmp_path):
    main(["analyze", *arguments, "--kernel", "rbf"])
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    pictures = {f"analysis-{name}.png" for name in ("angular_distance", "cka", "layers")}
    names = {"analysis.json", "analysis.md", *pictures}
    assert names <= set(found)
    assert not {name for name in found if name.startswith(("pruned", "final", "report"))}
    analysis = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert analysis["settings"] == {"kernel": "rbf", "ignore_first_tokens": 1}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (("SlidingLayerMerging", {"num_layers": 5}), "spare protected=[5] can remove at most 4"),
        (("SlidingLayerMerging", {"threshold": 2.0}), "threshold=2.0 must be at most 1"),
        (("SLEB", {"num_layers": 5}), "only 4 of 6 are not protected"),
        (("ShortenedLlama", {"num_layers": 1, "score": "taylor"}), "only 0 of 6 are not protected"),
        (("WidthPruning", {"intermediate_size": 60}), "must be a multiple of 64; take 64"),
        (("WidthPruning", {"num_key_value_heads": 3}), "=3 cannot be kept of the 2 groups"),
    ],
)
def test_a_fault_of_a_depth_or_width_method_is_one_line_too(
    arguments, capsys, tmp_path, method, message
):
    assert message in fails(capsys, "fit", *with_methods(arguments, method))
    assert not list((tmp_path / "run").glob("pruned-*"))


def test_width_after_sublayers_is_refused_before_anything_is_computed(arguments, capsys, tmp_path):
    drop = ("ShortGPT", {"num_layers": 1, "granularity": "mlp"})
    width = ("WidthPruning", {"head_ratio": 0.5})
    message = fails(capsys, "fit", *with_methods(arguments, drop, width))
    assert "ShortGPT drops sublayers, or puts matrices at gaps, before WidthPruning" in message
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_bad_timing_protocol_is_one_line(arguments, capsys):
    with_methods(arguments, ("ShortGPT", {"num_layers": 1}), latency={"num_runs": 1})
    assert "latency.num_runs=1 must be at least 2" in fails(capsys, "fit", *arguments)


def test_fit_after_prune_reuses_its_base(arguments, tmp_path):
    main(["prune", *arguments])
    (weights,) = (tmp_path / "run").glob("pruned-*/model.safetensors")
    written = weights.stat().st_mtime_ns
    main(["fit", *arguments])
    assert weights.stat().st_mtime_ns == written


def test_validate_and_test_evaluate_a_finished_directory(arguments, tmp_path, capsys):
    main(["fit", *arguments])
    final = str(tmp_path / "run" / "final")
    for verb in ("validate", "test"):
        capsys.readouterr()
        main([verb, *arguments, "--model.name", final])
        assert "perplexity" in capsys.readouterr().out


def test_the_console_script_prints_the_whole_config_with_the_linked_tokenizer(arguments, name):
    done = run("fit", *arguments, "--model.lora.r", "4", "--print_config")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["model"]["name"] == name
    assert config["model"]["lora"]["r"] == 4
    assert config["trainer"]["callbacks"][0]["class_path"] == "prunelight.callbacks.ShortGPT"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_an_installed_config_is_found_by_its_name_from_anywhere(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (config.name, f"{config.parent.name}/{config.name}"):
        assert find_configs(["fit", "--config", name])[-1] == str(config)
        assert find_configs(["fit", f"--config={name}"])[-1] == f"--config={config}"
    (tmp_path / config.name).write_text("model: {}\n")
    assert find_configs(["fit", "-c", config.name])[-1] == config.name, "a file here comes first"
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f"~/{config.name}", "-"):
        assert find_configs(["fit", "--config", name])[-1] == name, "jsonargparse reads these"


def test_two_configs_have_no_name_in_common():
    assert len(CONFIGS) == len({config.name for config in CONFIGS}) > 20


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("quikstart.yaml", ": quickstart.yaml"),
        ("quickstart", ": quickstart.yaml"),
        ("papers/dlp_wanda_50.yaml", ": dlp_wanda_70.yaml, wanda_50.yaml"),
        ("/nowhere/else.json", "shortgpt_paper.yaml"),
    ],
)
def test_an_unknown_config_is_one_line_with_names_that_are_near(capsys, name, near):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", name])
    (message,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert f"config {name!r} is neither a file here nor installed" in message
    assert near in message


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("evaluate m --seq_len x", "seq_len=x must be a whole number or null"),
        ("evaluate m --probes 3", "probes=3 must be true or false"),
        ("evaluate m --refernce d", "there is no option refernce; did you mean reference?"),
        ("evaluate", "the following arguments are required: model"),
        ("export m --to gguf --unproven maybe", "unproven=maybe must be true or false"),
        ("compare --config compare_25.yaml --model m", "must be a mapping with some of name, dt"),
        ("compare --config compare_25.yaml --launcher.kind slurm", "one of sequential, joblib"),
        ("compare --config compare_25.yaml --amounts 0.25", "amounts=0.25 must be null or a list"),
        ("compare --config compare_25.yaml --maxkld 1", "did you mean max_kld?"),
    ],
)
def test_a_wrong_option_of_a_verb_is_one_line(capsys, command, fault):
    verb, *_ = command.split()
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    (message,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert fault in message
    assert message.endswith(f"(prunelight {verb} --help says more)")


def test_a_config_that_gives_a_figure_says_which_model_the_alias_is():
    sentence = (
        "# smollm2-135m is SmolLM2-135M-Instruct, read from a 4-bit GGUF (Q4_1) and de-quantized"
    )
    texts = [config.read_text(encoding="utf-8") for config in CONFIGS]
    figures = [text.count("Measured") for text in texts]
    assert [text.count(sentence) for text in texts] == figures
    assert set(figures) == {0, 1}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.name", "/nowhere/model"], "'/nowhere/model' must be an existing directory"),
        (["--model.recovery", "lora", "--model.lora.r", "0"], "lora.r=0 must be at least 1"),
        (["--data.num_calibration", "9999"], "9999"),
        (["--data.seq_len", "129", "--data.num_calibration", "1"], "seq_len=129"),
        (["--trainer.strategy", "ddp_spawn"], "use strategy=ddp"),
        (["--trainer.strategy", "fsdp3"], "invalid strategy name: `strategy='fsdp3'`"),
        (["--trainer.strategy", "deepspeed_stage_2"], "you must have DeepSpeed installed"),
        (
            ["--trainer.accelerator", "cuda", "--trainer.devices", "99"],
            "no Trainer can be made of these settings",
        ),
        (
            ["--trainer.strategy", "ddp", "--trainer.devices", "9999"],
            "devices=9999 starts more processes than this machine has CPU cores",
        ),
        (
            ["--model.recovery", "none", "--trainer.strategy", "ddp", "--trainer.devices", "2"],
            "DDP takes no model without trained weights",
        ),
        (["--trainer.callbacks.num_layers", "6"], "would remove 6 of 6 decoder layers"),
        (["--trainer.callbacks.ratio", "0.5"], "give exactly one of ratio, num_layers"),
        (["--data.train", "/nowhere/text.txt"], "/nowhere/text.txt"),
        (["--model.lr_scheduler", "linaer"], "lr_scheduler='linaer' must be one of"),
        (["--ckpt_path", "/nowhere/a.ckpt"], "ckpt_path='/nowhere/a.ckpt' does not exist"),
    ],
)
def test_a_fault_is_one_line_that_names_the_value(arguments, capsys, tmp_path, extra, message):
    assert message in fails(capsys, "fit", *arguments, *extra)
    assert not list((tmp_path / "run").glob("pruned-*"))


def test_a_typo_in_a_yaml_key_names_the_key(arguments, capsys):
    path = Path(arguments[1])
    path.write_text(path.read_text().replace("learning_rate", "leraning_rate"))
    with pytest.raises(SystemExit):
        main(["fit", *arguments])
    assert "leraning_rate" in capsys.readouterr().err


def test_prune_without_a_method_is_refused(arguments, capsys):
    path = Path(arguments[1])
    config = yaml.safe_load(path.read_text())
    config["trainer"]["callbacks"] = []
    path.write_text(yaml.safe_dump(config))
    assert "has no pruning callback" in fails(capsys, "prune", *arguments)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="Expecting property name") as foreign:
        json.loads("{")
    assert our_error(foreign.value) is None
    with pytest.raises(ValueError, match="format=99") as ours:
        prunelight.Plan.from_dict({"format": 99})
    assert our_error(ours.value) is ours.value


def test_only_the_verbs_that_do_something_are_offered():
    assert set(CLI.subcommands()) == {"fit", "validate", "test", "prune", "analyze"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.quantization", "nf5"], "model.quantization=nf5 must be one of none, nf4, "),
        (
            ["--model.loss", "kdd"],
            "model.loss=kdd must be one of lm, kd, kd_topk; did you",
        ),
        (["--trainer.callbacks.score", "foo"], "score=foo must be one of block_infl"),
        (["--data.packing", "rows"], "data.packing=rows must be one of stream, documents"),
    ],
)
def test_a_value_that_is_no_choice_is_told_in_one_line(arguments, capsys, extra, message):
    with pytest.raises(SystemExit):
        main(["fit", *arguments, *extra])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
