"""Registers the classes of sliced models with transformers.

It is not done in sliced.py: an exported sliced.py must not register its classes a second time.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from prunelight.models.families.sliced import MODELS

for _made in MODELS.values():
    AutoConfig.register(_made.config_class.model_type, _made.config_class)
    AutoModelForCausalLM.register(_made.config_class, _made)
