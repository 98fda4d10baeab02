"""What `import prunelight` gives: names at their first use, and models that transformers loads."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from tiny import tiny_model, token_windows
from transformers import conversion_mapping
from transformers.models.auto import configuration_auto

import prunelight
import prunelight.callbacks
from prunelight.callbacks import SliceGPT, WidthPruning
from prunelight.models.families.own_classes.registration import (
    CLASS_MODULES,
    REGISTERED,
    TABLE,
    TABLE_MODULE,
)
from prunelight.pruning.drop_sublayers import drop_sublayers

ROOT = Path(prunelight.__file__).resolve().parent.parent
HEAVY = (
    *("torch", "transformers", "lightning", "peft", "matplotlib", "datasets", "bitsandbytes"),
    *("jsonargparse", "torchmetrics", "scipy", "numpy", "rich"),
)


def fresh(code, *arguments):
    """Run code in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error:.*the old path goes", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_print_nothing():
    code = "import prunelight.callbacks; from prunelight import RecoveryModule, TextDataModule"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


@pytest.mark.parametrize(
    "code",
    [
        "import prunelight; dir(prunelight); hasattr(prunelight, 'nothing')",
        "import prunelight.data, prunelight.models, prunelight.calibration, prunelight.evaluation",
        "import prunelight.scoring, prunelight.recovery, prunelight.models.families",
        "import prunelight.module",
        "from prunelight.cli import main; main(['--version'])",
        "from prunelight.cli import main; main(['--help'])",
    ],
)
def test_imports_and_help_need_the_standard_library_alone(code):
    show = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert fresh(f"{code}\n{show}").splitlines()[-1] == "[]"


def test_every_name_is_served_and_known_to_type_checkers():
    stub = Path(prunelight.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    lines = [node for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom)]
    homes = {line.names[0].name: line.module for line in lines}
    assert homes.pop("__version__") == "prunelight.version"
    assert homes == {name: f"prunelight.{home}" for name, home in prunelight._HOMES.items()}
    assert sorted(homes) == prunelight.__all__
    for name, home in homes.items():
        made = getattr(prunelight, name)
        assert made is getattr(importlib.import_module(home), name)
        assert made.__module__ == home, "defined there"
    assert set(homes) <= set(dir(prunelight))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        prunelight.nothing  # noqa: B018


def test_no_callback_is_a_name_of_the_package():
    """LightningCLI writes the shortest import path of a class into a run's config."""
    assert not set(prunelight.__all__) & set(prunelight.callbacks.__all__)


def classes_in(hint):
    """Our classes in a type hint."""
    if inspect.isclass(hint) and hint.__module__.startswith("prunelight."):
        yield hint
    for part in get_args(hint):
        yield from classes_in(part)


def shortest_path(made):
    """The import path that jsonargparse writes: the first module on the way that has the name."""
    parts = made.__module__.split(".")
    for last in range(1, len(parts) + 1):
        module = ".".join(parts[:last])
        if getattr(importlib.import_module(module), made.__name__, None) is made:
            return f"{module}.{made.__name__}"


@pytest.mark.filterwarnings("error:.*the old path goes:DeprecationWarning")
def test_configs_of_runs_name_new_paths():
    callbacks = [getattr(prunelight.callbacks, name) for name in prunelight.callbacks.__all__]
    assert {shortest_path(made) for made in callbacks} == {
        f"prunelight.callbacks.{name}" for name in prunelight.callbacks.__all__
    }
    owners = (prunelight.RecoveryModule, prunelight.TextDataModule, *callbacks)
    hints = [hint for owner in owners for hint in get_type_hints(owner.__init__).values()]
    settings = {made for hint in hints for made in classes_in(hint)}
    assert {prunelight.LoRA, prunelight.Schedule} < settings
    for made in settings:
        shortest_path(made)  # an old path would warn


LOAD = """
import pickle, sys, threading
{first}
{second}
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
configs = []
def ask():
    configs.append(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
threads = [threading.Thread(target=ask) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert configs == ["LayerWidthsLlamaConfig"] * 4, configs
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert directory.endswith(type(model).__name__)
    assert type(pickle.loads(pickle.dumps(model.config))) is type(model.config)
    assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)
    headless = type(AutoModel.from_pretrained(directory)).__name__
    assert headless.removesuffix("Model") + "ForCausalLM" == type(model).__name__
for table in (CONFIG_MAPPING, pickle.loads(pickle.dumps(CONFIG_MAPPING))):
    assert "prunelight_nothing" not in table and "llama" in table and "prunelight_llama" in table
print(*[name for name in ("lightning", "peft", "matplotlib") if name in sys.modules])
"""
IMPORTS = ("from transformers import AutoModelForCausalLM", "import prunelight")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A model of each kind that transformers alone does not know."""
    root, windows = tmp_path_factory.mktemp("models"), token_windows(8)
    model = tiny_model("llama")
    plan = SliceGPT(slice_ratio=0.25, round_to=4).plan(model, windows)
    prunelight.apply(model, plan, windows).save_pretrained(root / "SlicedLlamaForCausalLM")
    model = tiny_model("llama")
    plan = WidthPruning(0.3, multiple=8, allocation="global").plan(model, windows)
    prunelight.apply(model, plan, windows).save_pretrained(root / "LayerWidthsLlamaForCausalLM")
    dropped = drop_sublayers(tiny_model("llama"), [4], [2])
    dropped.save_pretrained(root / "PrunelightLlamaForCausalLM")
    return sorted(root.iterdir())


@pytest.mark.parametrize("order", [IMPORTS, IMPORTS[::-1]], ids=["transformers", "prunelight"])
def test_plain_from_pretrained_loads_our_models_in_a_fresh_process(directories, order):
    code = LOAD.format(first=order[0], second=order[1])
    assert fresh(code, *directories) == "", "nothing is imported that loading does not need"


WITHOUT_THE_PRIVATE_NAME = """
import sys
import prunelight
from prunelight.models.families.own_classes import registration
registration.REGISTERED = "_another_name"
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    assert directory.endswith(type(AutoModelForCausalLM.from_pretrained(directory)).__name__)
"""


def test_a_transformers_without_the_private_name_loads_them_too(directories):
    fresh(WITHOUT_THE_PRIVATE_NAME, *directories)


def test_the_private_names_of_transformers_exist():
    assert configuration_auto.__name__ == TABLE_MODULE
    table = getattr(configuration_auto, TABLE)
    assert isinstance(getattr(table, REGISTERED), dict)
    assert conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    assert callable(conversion_mapping.register_checkpoint_conversion_mapping)
    for module in CLASS_MODULES.values():
        importlib.import_module(module)
    expected = {f"{prefix}llama" for prefix in CLASS_MODULES}
    assert len(expected) == 3
    assert expected < set(getattr(table, REGISTERED))


def test_an_unknown_model_type_is_transformers_own_error():
    with pytest.raises(ValueError, match="prunelight_nothing"):
        configuration_auto.AutoConfig.for_model("prunelight_nothing")
