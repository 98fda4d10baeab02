"""Old import paths give what they gave, and warn: all public names of before the folders."""

import importlib
import json
import pickle
import pkgutil
import sys
import warnings
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from runs import make_module, write_model
from tiny import tiny_model, token_windows

import prunelight
from prunelight.calibration.shared_windows import share_windows
from prunelight.callbacks import ShortGPT, TokenBudget
from prunelight.models.families.own_classes import dropped_sublayers, sliced
from prunelight.moved import (
    ATTRIBUTES,
    HOMES,
    REPLACED_ATTRIBUTES,
    SUCCESSORS,
    CallableModule,
    moved_attribute,
)
from prunelight.planning.steps import RemoveLayers
from prunelight.recovery.lora import LoRA
from prunelight.runtime.processes import ProcessGroup
from prunelight.scoring.angular_distance import angular_distance
from prunelight.scoring.block_influence import block_influence
from prunelight.scoring.weight_scores import weight_scores
from prunelight.training.recovery_module import RecoveryModule

TESTS = next(folder for folder in Path(__file__).parents if (folder / "fixtures").is_dir())
OLD_NAMES = json.loads((TESTS / "fixtures" / "format_1" / "public_names.json").read_text())
pytestmark = pytest.mark.filterwarnings("default:.*the old path goes:DeprecationWarning")


def asked(module, name):
    """Return an attribute and the warnings that asking for it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return getattr(module, name), caught


@pytest.mark.parametrize("old", OLD_NAMES)
def test_each_old_name_is_the_object_of_its_new_path_and_warns(old):
    module = importlib.import_module(old)
    for name in {name for names in OLD_NAMES[old].values() for name in names}:
        if name in SUCCESSORS.get(old, {}):
            continue
        value, caught = asked(module, name)
        home = HOMES.get(old, {}).get(name)
        if home is None or name in vars(module):
            if isinstance(value, CallableModule):
                assert value is sys.modules[home[0]]  # the tests below call it
            assert not caught, f"{old}.{name} is where it was"
            continue
        new_module, new_name = home
        assert value is getattr(importlib.import_module(new_module), new_name)
        (warning,) = caught
        assert issubclass(warning.category, DeprecationWarning)
        assert f"{old}.{name} is now {new_module}.{new_name};" in str(warning.message)
        assert warning.filename == __file__, "it points at who asks"


def test_the_table_holds_old_public_names_alone():
    for old, homes in HOMES.items():
        assert set(homes) <= {name for names in OLD_NAMES[old].values() for name in names}
    assert set(SUCCESSORS) <= set(HOMES)


@pytest.mark.parametrize("old", SUCCESSORS)
def test_a_name_that_is_gone_tells_what_does_its_work(old):
    module = importlib.import_module(old)
    for name, (place, successor) in SUCCESSORS[old].items():
        with pytest.raises(AttributeError, match=f"{place}.{successor} does its work now"):
            getattr(module, name)
        assert pkgutil.resolve_name(f"{place}.{successor}") is not None


def test_an_import_statement_warns_at_its_own_line():
    with pytest.warns(DeprecationWarning, match="training.recovery_module.RecoveryModule") as told:
        from prunelight.module import RecoveryModule as Old
    assert Old is RecoveryModule
    assert {warning.filename for warning in told} == {__file__}
    with pytest.warns(DeprecationWarning, match="recovery.lora.LoRA") as told:
        from prunelight.recovery import LoRA as OldLoRA
    assert OldLoRA is LoRA
    assert {warning.filename for warning in told} == {__file__}


def test_an_import_of_a_module_that_is_gone_warns_only_when_a_name_is_used():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import prunelight.adaptation

        assert prunelight.adaptation is sys.modules["prunelight.adaptation"]
    with pytest.warns(DeprecationWarning, match="prepared_model.PreparedModel"):
        prunelight.adaptation.Adapted  # noqa: B018


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"prunelight\.plan.*Nothing"):
        importlib.import_module("prunelight.plan").Nothing  # noqa: B018
    with pytest.raises(ImportError, match="Nothing"):
        from prunelight.recovery import Nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("prunelight.nothing")


def test_a_star_import_brings_the_old_names():
    names = {}
    with pytest.warns(DeprecationWarning, match=r"planning\.plan\.Plan;"):
        exec("from prunelight.plan import *", names)
    assert names["Plan"] is prunelight.Plan


def test_a_pickle_by_an_old_path_loads():
    with pytest.warns(DeprecationWarning, match="planning.plan.Plan"):
        assert pickle.loads(b"cprunelight.plan\nPlan\n.") is prunelight.Plan


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("sliced", "SlicedLlamaConfig", sliced),
        ("sliced", "SlicedOPTDecoderLayer", sliced),
        ("sliced", "SlicedSmolLM3ForCausalLM", sliced),
        ("sublayers", "PrunelightQwen3MoeConfig", dropped_sublayers),
        ("sublayers", "PrunelightGraniteForCausalLM", dropped_sublayers),
    ],
)
def test_a_pickle_of_a_class_that_is_made_for_a_family_loads(old, name, new):
    with pytest.warns(DeprecationWarning, match=f"prunelight.{old}.{name} is now"):
        assert pickle.loads(f"cprunelight.{old}\n{name}\n.".encode()) is vars(new)[name]


def test_a_module_that_was_imported_with_the_package_is_imported_when_it_is_asked_for(monkeypatch):
    monkeypatch.delattr(prunelight, "losses", raising=False)  # bound there by its first import
    losses, caught = asked(prunelight, "losses")
    assert losses is sys.modules["prunelight.losses"]
    assert not caught, "it is where it was"


def test_a_config_may_name_old_class_paths():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(pl.LightningModule, "model", subclass_mode=True)
    parser.add_argument("--callbacks", type=list[pl.Callback])
    config = """
    model:
      class_path: prunelight.module.RecoveryModule
      init_args:
        name: some/model
        lora: {class_path: prunelight.recovery.LoRA, init_args: {r: 4}}
    callbacks:
    - class_path: prunelight.callbacks.token_budget.TokenBudget
      init_args: {tokens: 9}
    """
    with pytest.warns(DeprecationWarning, match="RecoveryModule") as told:
        made = parser.instantiate(parser.parse_string(config))
    for new in ("RecoveryModule", "lora.LoRA", "callbacks.recovery.token_budget.TokenBudget"):
        assert any(new in str(warning.message) for warning in told)
    assert type(made.model) is RecoveryModule
    assert made.model.run.settings.lora == LoRA(r=4)
    assert type(made.callbacks[0]) is TokenBudget


def test_a_module_that_took_the_name_of_a_function_can_be_called_as_it():
    inputs, outputs = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    model, windows = tiny_model(), token_windows(2)
    from prunelight.evaluation import perplexity

    with pytest.warns(DeprecationWarning, match="now prunelight.evaluation.perplexity.perplexity"):
        found = perplexity(model, windows)
    assert found == prunelight.perplexity(model, windows)
    with pytest.warns(DeprecationWarning, match="block_influence.block_influence") as told:
        value = prunelight.scoring.block_influence(inputs, outputs)
    assert value == block_influence(inputs, outputs)
    assert told[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="angular_distance.angular_distance"):
        value = prunelight.scoring.angular_distance(inputs, outputs)
    assert torch.equal(value, angular_distance(inputs, outputs))
    with pytest.warns(DeprecationWarning, match="weight_scores.weight_scores"):
        scores = prunelight.scoring.weight_scores(model, windows, "mean")
    assert scores == weight_scores(model, windows, "mean")
    assert perplexity.evaluate is prunelight.evaluate, "it is a module too"


def test_old_attributes_of_a_module_are_the_runs_now_and_warn(tmp_path):
    module = make_module(write_model(tmp_path / "model"))
    for name, path in ATTRIBUTES.items():
        with pytest.warns(DeprecationWarning, match=rf"RecoveryModule\.{name} is now .*{path}"):
            assert getattr(module, name) == attrgetter(path)(module)
    with pytest.raises(AttributeError, match="has no attribute 'nowhere'"):
        _ = module.nowhere


def test_a_method_of_a_module_that_is_gone_tells_what_does_its_work(tmp_path):
    module = make_module(write_model(tmp_path / "model"))
    for name, successor in REPLACED_ATTRIBUTES.items():
        with pytest.raises(AttributeError, match=f"{name!r}; {successor} does its work now"):
            moved_attribute(module, name)
        assert callable(pkgutil.resolve_name(successor))


def test_setting_an_old_attribute_of_a_module_sets_the_runs_and_warns(tmp_path):
    module = make_module(write_model(tmp_path / "model"))
    before = module.run.settings
    with pytest.warns(DeprecationWarning, match="keep_zeros is now .*settings.keep_zeros") as told:
        module.keep_zeros = False
    assert told[0].filename == __file__
    assert module.run.settings == replace(before, keep_zeros=False) != before
    with pytest.warns(DeprecationWarning, match="gradual is now RecoveryModule.run.gradual"):
        module.gradual = True
    assert module.run.gradual is True
    protocol = prunelight.LatencyProtocol()
    with pytest.warns(DeprecationWarning, match="latency is now RecoveryModule.run.latency"):
        module.latency = protocol
    assert module.run.latency is protocol
    assert not {"keep_zeros", "gradual", "latency"} & set(vars(module))


def test_windows_are_shared_with_old_names_too():
    windows, group = token_windows(4), ProcessGroup()
    group.size = 2
    with pytest.warns(DeprecationWarning, match=r"share_windows\(group=...\)") as told:
        shared = share_windows(windows, ranks=group)
    assert told[0].filename == __file__
    assert shared.group is group
    with pytest.warns(DeprecationWarning, match="SharedWindows.group"):
        assert shared.ranks is group
    with pytest.raises(ValueError, match="two names of one argument; give group alone"):
        share_windows(windows, group, ranks=group)


def test_old_methods_of_a_process_group_do_what_they_did():
    group = ProcessGroup()
    with pytest.warns(DeprecationWarning, match="ProcessGroup.failing_together") as told:
        together = group.together()
    assert told[0].filename == __file__
    with pytest.raises(RuntimeError, match="inside"), together:
        raise RuntimeError("inside")
    with pytest.warns(DeprecationWarning, match="ProcessGroup.barrier"):
        group.meet()
    with pytest.warns(DeprecationWarning, match="ProcessGroup.run_on_rank_zero"):
        assert group.on_zero(lambda: 3) == 3


def test_a_method_may_still_end_in_decided():
    class OldMethod(ShortGPT):
        def plan(self, model, windows):
            return self.decided(model, windows, RemoveLayers((1,)), scores={})

    with pytest.warns(DeprecationWarning, match="is now PruningCallback.make_plan") as told:
        plan = OldMethod(num_layers=1).plan(tiny_model("llama"), token_windows(4))
    assert told[0].filename == __file__
    assert plan.steps == (RemoveLayers((1,)),)
