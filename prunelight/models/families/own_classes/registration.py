"""Plain `from_pretrained` loads our model classes after `import prunelight`, and peft knows them.

`import prunelight` must be quick, so it imports neither torch nor transformers nor peft, and our
classes do not exist yet. transformers asks its table `CONFIG_MAPPING` which config class a model
type needs. This file adds one rule to that table: a question about a model type that begins with
"prunelight_" first imports the modules of our classes, which register themselves. peft has tables
of the modules that it adapts by default; this file adds our model types to them. A table that is
not imported yet gets its rule or its rows right after its import.

Private names of transformers for this stand in this file alone: TABLE and REGISTERED, tested with
transformers 5.23. Without them, our modules are imported as soon as transformers' own classes are.
The tables of peft are those of its module `peft.utils.constants` that have names like TARGETS.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

PREFIX = "prunelight_"  # of the model types in our config.json files
TABLE_MODULE = "transformers.models.auto.configuration_auto"
MODELS_MODULE = "transformers.models.auto.modeling_auto"
TABLE = "CONFIG_MAPPING"  # model type -> config class
REGISTERED = "_extra_content"  # the part of the table that AutoConfig.register writes

PEFT_MODULE = "peft.utils.constants"
TARGETS = re.compile(r"TRANSFORMERS_MODELS_TO_\w+_MODULES_MAPPING")  # model type -> module names
# What LoRA adapts by default in families for which peft has no row: query and value, as elsewhere.
QUERY_AND_VALUE = {
    **{family: ["q_proj", "v_proj"] for family in ("granite", "qwen3_moe", "smollm3")},
    "phi3": ["qkv_proj"],
}

# How the model types of a kind of class begin -> the module that makes and registers the classes.
# The family of a model type is what follows. The last prefix is also the start of the others.
CLASS_MODULES = {
    f"{PREFIX}sliced_": "prunelight.models.families.own_classes.sliced",
    f"{PREFIX}widths_": "prunelight.models.families.own_classes.layer_widths",
    PREFIX: "prunelight.models.families.own_classes.dropped_sublayers",
}


def prefix_of(model_type: str) -> str:
    """Return the prefix of one of our model types; "" for those of transformers."""
    return next((prefix for prefix in CLASS_MODULES if model_type.startswith(prefix)), "")


def family_of(model_type: str) -> str:
    """Return the model type of the dense model, which names the family."""
    return model_type.removeprefix(prefix_of(model_type))


def code_file(model_type: str) -> Path | None:
    """Return the file of the code that one of our models needs; None for other model types."""
    module = CLASS_MODULES.get(prefix_of(model_type))
    spec = None if module is None else importlib.util.find_spec(module)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def import_classes() -> None:
    """Import our model classes, which registers them."""
    for module in CLASS_MODULES.values():
        importlib.import_module(module)


def take_class(model: Any, model_class: Any) -> None:
    """Give a model and its config another class of their family, in place."""
    model.__class__ = model_class
    model.config.__class__ = model_class.config_class
    model.config.model_type = model_class.config_class.model_type
    model.config.architectures = [model_class.__name__]


def make_class(model_type: str) -> None:
    """Make and register the classes of one of our model types, if it has a family."""
    classes = importlib.import_module(CLASS_MODULES[prefix_of(model_type)]).CLASSES
    with suppress(KeyError):  # transformers does not have the family, or it cannot be sliced
        classes[family_of(model_type)]


class RegisteredConfigs(dict[str, Any]):
    """Registered config classes by model type; a question about one of ours imports ours first."""

    def __contains__(self, model_type: object) -> bool:
        """Return whether the model type is registered."""
        if isinstance(model_type, str) and model_type.startswith(PREFIX):
            import_classes()
            if not super().__contains__(model_type):
                make_class(model_type)
        return super().__contains__(model_type)


def set_rule(table_module: Any) -> bool:
    """Give transformers' table the rule for our model types, in place, once.

    Returns:
        Whether the table has the private part that the rule needs.
    """
    table = getattr(table_module, TABLE, None)
    registered = getattr(table, REGISTERED, None)
    if isinstance(registered, dict) and not isinstance(registered, RegisteredConfigs):
        setattr(table, REGISTERED, RegisteredConfigs(registered))
    return isinstance(registered, dict)


def import_classes_without_rule(models_module: Any) -> None:
    """Import our model classes where the table cannot have the rule."""
    if not set_rule(sys.modules[TABLE_MODULE]):
        import_classes()


def add_targets(constants: Any) -> None:
    """Give peft's tables a row for each of our model types, in place: that of its family."""
    for name, table in vars(constants).items():
        if not TARGETS.fullmatch(name):
            continue
        rows = {**QUERY_AND_VALUE, **table} if "_TO_LORA_" in name else dict(table)
        for family, modules in rows.items():
            table.update({f"{prefix}{family}": modules for prefix in CLASS_MODULES})


# Module -> what follows its import. MODELS_MODULE comes after TABLE_MODULE.
AFTER_IMPORT: dict[str, Callable[[ModuleType], object]] = {
    TABLE_MODULE: set_rule,
    MODELS_MODULE: import_classes_without_rule,
    PEFT_MODULE: add_targets,
}


class TableFinder(MetaPathFinder):
    """Finds those modules where Python finds them, and sees to what follows."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of one of those modules; None for every other module."""
        spec = PathFinder.find_spec(fullname, path) if fullname in AFTER_IMPORT else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_follow(module: ModuleType) -> None:
            execute(module)
            AFTER_IMPORT[fullname](module)

        spec.loader.exec_module = execute_and_follow  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Set rule and rows now for what is imported already, and later for what is not."""
    for module, follow in AFTER_IMPORT.items():
        if module in sys.modules:
            follow(sys.modules[module])
    if not any(isinstance(finder, TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TableFinder())
