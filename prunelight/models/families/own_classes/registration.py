"""Plain `AutoModelForCausalLM.from_pretrained` loads our model classes after `import prunelight`.

`import prunelight` must be quick, so it imports neither torch nor transformers, and our classes do
not exist yet. transformers asks its table `CONFIG_MAPPING` which config class a model type needs.
This file adds one rule to that table: a question about a model type that begins with "prunelight_"
first imports the modules of our classes, which register themselves. Where the table itself is not
imported yet, the rule waits for that import.

Private names of transformers for this stand in this file alone: TABLE and REGISTERED, tested with
transformers 5.23. Without them, our modules are imported as soon as transformers' own classes are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PREFIX = "prunelight_"  # of the model types in our config.json files
TABLE_MODULE = "transformers.models.auto.configuration_auto"
MODELS_MODULE = "transformers.models.auto.modeling_auto"
TABLE = "CONFIG_MAPPING"  # model type -> config class
REGISTERED = "_extra_content"  # the part of the table that AutoConfig.register writes
CLASS_MODULES = (  # an import registers their classes
    "prunelight.models.families.own_classes.sliced",
    "prunelight.models.families.own_classes.dropped_sublayers",
)


def import_classes() -> None:
    """Import our model classes, which registers them."""
    for module in CLASS_MODULES:
        importlib.import_module(module)


class RegisteredConfigs(dict[str, Any]):
    """Registered config classes by model type; a question about one of ours imports ours first."""

    def __contains__(self, model_type: object) -> bool:
        """Return whether the model type is registered."""
        if isinstance(model_type, str) and model_type.startswith(PREFIX):
            import_classes()
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


# Module of transformers -> what follows its import. The second comes after the first.
AFTER_IMPORT: dict[str, Callable[[ModuleType], object]] = {
    TABLE_MODULE: set_rule,
    MODELS_MODULE: import_classes_without_rule,
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
    """Set the rule now for what is imported of transformers, and later for what is not."""
    for module, follow in AFTER_IMPORT.items():
        if module in sys.modules:
            follow(sys.modules[module])
    if not any(isinstance(finder, TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TableFinder())
