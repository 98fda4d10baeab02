"""The config of a DeciLM model, which vLLM asks for each layer: `block_configs[i].attention.no_op`.

This file needs only transformers: an export holds a copy, which vLLM runs under
`--trust-remote-code`. vLLM has the model's own code; transformers has none.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A dictionary whose values are attributes too, as vLLM reads them; nested ones likewise."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(
            {
                name: Block(value) if isinstance(value, dict) else value
                for name, value in values.items()
            }
        )

    def __getattr__(self, name: str) -> Any:
        """Return a value by its name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> Any:
        """Copy and pickle as what it was made from."""
        return Block, (dict(self),)


class DeciLMConfig(LlamaConfig):
    """Llama's config with what each layer has: its attention, its key-value heads, its MLP."""

    model_type = "nemotron-nas"
    block_configs: list[dict[str, Any]] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; the settings of layers get attributes."""
        if name == "block_configs" and value is not None:
            value = [Block(block) for block in value]
        super().__setattr__(name, value)
