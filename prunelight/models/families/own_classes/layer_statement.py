"""What layers that differ have, stated as transformers states it: `per_layer_config`.

transformers 5.23 has the field in every config. Its models of the families that we prune do not
read it yet, so our classes stay, with lists of their own. Programs that read the field see the same
facts there.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PretrainedConfig

from prunelight.models.families.own_classes import dropped_sublayers, layer_widths
from prunelight.models.families.own_classes.registration import prefix_of

_SETTINGS = {
    layer_widths.PREFIX: layer_widths.layer_settings,
    dropped_sublayers.PREFIX: dropped_sublayers.layer_settings,
}


def state_layers(config: PretrainedConfig, directory: Path) -> None:
    """Add `per_layer_config` to the config.json of a model of ours, if its layers differ.

    Args:
        config: of the model that was saved in the directory.
        directory: what `save_pretrained` wrote.
    """
    settings = _SETTINGS.get(prefix_of(config.model_type), lambda _: {})(config)
    if not settings:
        return
    file = directory / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    digits = len(str(max(settings)))  # so that the order of names is that of layers
    values["per_layer_config"] = {f"{i:0{digits}d}": fields for i, fields in settings.items()}
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
