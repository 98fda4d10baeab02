"""A config of a comparison: bad input is one line, before any model is read."""

from pathlib import Path

import pytest
from runs import write_model

from prunelight.commands.compare import main
from prunelight.comparison.contest import compare
from prunelight.comparison.methods import entrants_of
from prunelight.comparison.running.fits import check_recovery
from prunelight.comparison.running.launching import check_launcher
from prunelight.comparison.settings import (
    ComparisonSettings,
    DataSettings,
    LauncherSettings,
    ModelSettings,
)
from prunelight.config_files import find_configs

SHORTGPT = {"class_path": "prunelight.callbacks.ShortGPT"}


def settings(**changes):
    return ComparisonSettings(
        **{"model": ModelSettings("nowhere"), "methods": [SHORTGPT], **changes}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, r"methods=\[\] names no method"),
        ({"amounts": [25]}, r"must lie in \(0, 1\); 0.25 is 25 %"),
        ({"amounts": [0.0]}, r"holds 0.0, and each must lie in \(0, 1\)"),
        ({"zeros": [1.0]}, r"zeros=\[1.0\] holds 1.0"),
        ({"amounts": [0.1, 0.1]}, "holds 0.1 twice; name it once"),
        ({"amounts": []}, r"amounts=\[\] asks for nothing"),
        ({"seeds": []}, r"seeds=\[\] must not be empty"),
        ({"max_kld": 0.0}, "max_kld=0.0 must be above 0"),
        ({"min_top1": 1.5}, r"min_top1=1.5 must lie in \(0, 1\]"),
        ({"max_kld": 0.1, "min_top1": 0.9}, "give one of the two"),
        ({"limit": 5}, "limit=5 has no effect without tasks"),
        ({"equal": "latency", "max_kld": 0.1}, "equal='latency' has no effect with max_kld=0.1"),
        ({"equal": "ratio", "max_kld": 0.1}, "equal='ratio' has no effect with max_kld=0.1"),
        (
            {"equal": "latency", "launcher": LauncherSettings("joblib", n_jobs=2)},
            "equal='latency' measures time, which 2 processes on one device disturb",
        ),
        (
            {"serving": True, "launcher": LauncherSettings("joblib", n_jobs=2)},
            "serving=True measures time, which 2 processes on one device disturb",
        ),
        ({"limit": 0, "tasks": ["piqa"]}, "limit=0 must be at least 1"),
        ({"equal": "speed"}, "equal='speed' must be one of parameters"),
    ],
)
def test_a_bad_setting_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_folder_of_tasks_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no directory; give that of the tasks' files"):
        settings(tasks=["piqa"], tasks_dir=str(tmp_path / "no"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"texts": {}}, ValueError, "texts={} must not be empty"),
        ({"texts": {"a": "sample:validatoin"}}, ValueError, "did you mean sample:validation"),
        ({"texts": {"a": "/nowhere.txt"}}, FileNotFoundError, "'/nowhere.txt' does not exist"),
        ({"calibration": "gone.jsonl"}, FileNotFoundError, "'gone.jsonl' does not exist"),
        ({"num_windows": 1}, ValueError, "num_windows=1 must be at least 2"),
    ],
)
def test_bad_data_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        DataSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_jobs": 2}, "runs in one process"),
        ({"kind": "joblib", "cluster": "local"}, "cluster='local' has no effect"),
        ({"kind": "slurm"}, "kind='slurm' must be one of sequential, joblib, submitit"),
    ],
)
def test_a_bad_launcher_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LauncherSettings(**changes)


def test_a_launcher_without_its_package_names_the_pip_line(monkeypatch):
    monkeypatch.setattr("prunelight.comparison.running.launching.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'prunelight\[cluster\]'"):
        check_launcher(settings(launcher=LauncherSettings(kind="submitit")))


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"class_path": "prunelight.callbacks.ShortGTP"}, ValueError, "did you mean .*ShortGPT"),
        ({"class_path": "no.module.Method"}, ValueError, "there is no method 'no.module.Method'"),
        ({"class_path": "pathlib.Path"}, ValueError, "is no pruning method"),
        ({"class_path": "prunelight.callbacks.PruningCallback"}, ValueError, "no argument for an"),
        ({"init_args": {}}, TypeError, "must be a mapping with class_path"),
        ({**SHORTGPT, "arguments": {}}, ValueError, "has no key 'arguments'"),
        ({**SHORTGPT, "init_args": [1]}, TypeError, r"init_args=\[1\] of ShortGPT must be a map"),
        ({**SHORTGPT, "init_args": {"num_layers": 3}}, ValueError, "num_layers=3 of ShortGPT says"),
        ({**SHORTGPT, "init_args": {"layers": [3]}}, ValueError, r"layers=\[3\] of ShortGPT says"),
        (
            {**SHORTGPT, "init_args": {"parameter_ratio": 0.2}},
            ValueError,
            "parameter_ratio=0.2 of ShortGPT says how much",
        ),
        ({**SHORTGPT, "init_args": {"ratio": 0.2}}, ValueError, "ratio=0.2 of ShortGPT says how"),
        (
            {**SHORTGPT, "sweep": ["score"]},
            TypeError,
            r"sweep=\['score'\] must be a mapping of one argument",
        ),
        ({**SHORTGPT, "sweep": {"score": []}}, ValueError, "sweep of score: .* at least one value"),
        ({**SHORTGPT, "sweep": {"num_layers": [1]}}, ValueError, "num_layers=1 of ShortGPT says"),
        (
            {**SHORTGPT, "init_args": {"score": "angular"}, "sweep": {"score": ["reverse"]}},
            ValueError,
            "score='angular' stands beside a sweep of score",
        ),
        (
            {"class_path": "DLP", "init_args": {"schedule": {"end": 3}}},
            ValueError,
            "DLP with a schedule prunes while it trains",
        ),
    ],
)
def test_a_bad_method_is_refused(entry, error, message):
    with pytest.raises(error, match=message):
        entrants_of([entry])


def test_two_methods_of_one_label_are_refused():
    with pytest.raises(ValueError, match="holds two of the label 'ShortGPT'"):
        entrants_of([SHORTGPT, {**SHORTGPT, "init_args": {"score": "angular"}}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scor": "angular"}, "the method ShortGPT has no key 'scor'; did you mean score"),
        ({"score": "best"}, "ShortGPT: score='best' must be one of"),
    ],
)
def test_a_bad_argument_of_a_method_is_refused_before_the_model_is_read(
    arguments, message, tmp_path
):
    methods = [{**SHORTGPT, "init_args": arguments}]
    with pytest.raises(ValueError, match=message):
        compare(settings(methods=methods, out=str(tmp_path / "out")))


def test_settings_of_a_method_are_read_from_a_mapping():
    (one,) = entrants_of(
        [
            {
                "class_path": "prunelight.callbacks.WeightPruning",
                "init_args": {"solver": "sparsegpt", "sparsegpt": {"block_size": 64}},
            }
        ]
    )
    assert one.make({"sparsity": 0.5}).sparsegpt.block_size == 64


@pytest.mark.parametrize(
    ("recovery", "message"),
    [
        ({"modle": {}}, "recovery has no key 'modle'; did you mean model"),
        ({"model": 3}, "recovery.model=3 must be a mapping"),
        ({"model": {"name": "x"}}, "recovery.model.name='x' is set by the comparison"),
        ({"trainer": {"callbacks": []}}, "recovery.trainer.callbacks=.* is set by the comparison"),
        ({"model": {"recovery": "lora"}}, "says not how long to train"),
        (
            {"model": {"learning_rat": 1}, "trainer": {"max_steps": 1}},
            "recovery cannot be read: .*learning_rat",
        ),
    ],
)
def test_a_bad_recovery_is_refused(recovery, message, tmp_path):
    name = write_model(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        check_recovery(settings(model=ModelSettings(name), recovery=recovery))


@pytest.mark.parametrize(
    "name",
    [
        "compare_25.yaml",
        "compare_recovery.yaml",
        "compare_healing.yaml",
        "compare_budget.yaml",
        "compare_calibration.yaml",
        "owl_m_sweep.yaml",
    ],
)
def test_shipped_configs_parse_and_say_how_they_are_run(name):
    from prunelight.commands.compare import _parser

    _, path = find_configs(["--config", name])
    parsed = _parser().parse_args(["--config", path])
    made = _parser().instantiate(parsed)
    config = ComparisonSettings(
        **{field: made[field] for field in ComparisonSettings.__dataclass_fields__}
    )
    for one in entrants_of(config.methods):
        one.check()
    text = Path(path).read_text(encoding="utf-8")
    assert f"prunelight compare --config {name}" in text


@pytest.mark.parametrize("given", [["--config", "compare_52.yaml"], ["--config=compare_52.yaml"]])
def test_a_misspelt_config_is_answered_with_the_nearest_installed_one(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config 'compare_52.yaml' is neither a file here nor installed" in line
    assert "compare_25.yaml" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": {"books": "bookcorpus"}}, r"no split 'test', only train; write bookcorpus\[tr"),
        ({"calibration": "wikitext2:rows"}, "cannot be joined by 'rows'; choose blank_lines"),
    ],
)
def test_a_corpus_without_that_part_is_refused_before_anything_is_read(changes, message):
    with pytest.raises(ValueError, match=message):
        DataSettings(**changes)


def test_corpora_and_files_of_the_hub_need_no_file_of_their_name():
    texts = {"wiki": "wikitext2", "web": "hf://datasets/allenai/c4/en/c4-validation.*.json.gz[:99]"}
    assert DataSettings(calibration="c4[train[:200]]", texts=texts).texts == texts
