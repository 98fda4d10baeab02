"""Bytes that a training step keeps until its backward, of each token, layer and hidden unit.

    python tests/support/saved_bytes.py

prints a line for each way to train a small Llama whose MLP is 2.75 times as wide as its states.
"""

import sys

import torch
from peft.tuners.lora.layer import LoraLayer
from tiny import tiny_model, token_windows

from prunelight.recovery.lora import LoRA, attach_lora, keep_as_peft

HIDDEN, LAYERS, TOKENS = 256, 4, 128


def small_llama(dtype, num_layers=LAYERS):
    return tiny_model(
        hidden_size=HIDDEN,
        intermediate_size=int(2.75 * HIDDEN),
        num_hidden_layers=num_layers,
        num_key_value_heads=4,
        dtype=dtype,
    )


def saved_bytes(model, forward, dtype=None):
    """Return the bytes of all tensors, or of those of one type, that a forward of a model keeps.

    Tensors of one memory count once; weights do not count.
    """
    weights = [*model.parameters(), *model.buffers()]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in weights}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses and dtype in (None, tensor.dtype):
            storages[storage.data_ptr()] = storage  # held: no other memory gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages.values())


def per_unit(make, dtype=None):
    """Return bytes a token, layer and hidden unit: what twice as many layers add."""

    def of_layers(num_layers):
        model = make(num_layers).train()
        arguments = {"use_cache": False, "logits_to_keep": 1}
        return saved_bytes(model, lambda: model(token_windows(1, TOKENS), **arguments), dtype)

    return (of_layers(2 * LAYERS) - of_layers(LAYERS)) / (TOKENS * LAYERS * HIDDEN)


def full(dtype):
    def make(num_layers):
        return small_llama(dtype, num_layers).requires_grad_(True)

    return make


def adapted(dtype, dropout, *, as_peft=False):
    def make(num_layers):
        model = attach_lora(small_llama(dtype, num_layers), LoRA(dropout=dropout))
        for layer in model.modules():
            if as_peft and isinstance(layer, LoraLayer):
                keep_as_peft(layer)
        return model

    return make


WAYS = {
    "full, bfloat16": full(torch.bfloat16),
    "LoRA, bfloat16, dropout 0.05": adapted(torch.bfloat16, 0.05),
    "LoRA, bfloat16, no dropout": adapted(torch.bfloat16, 0.0),
    "LoRA of peft, bfloat16, dropout 0.05": adapted(torch.bfloat16, 0.05, as_peft=True),
    "LoRA of peft, bfloat16, no dropout": adapted(torch.bfloat16, 0.0, as_peft=True),
    "LoRA, float32, dropout 0.05": adapted(torch.float32, 0.05),
    "LoRA of peft, float32, dropout 0.05": adapted(torch.float32, 0.05, as_peft=True),
}


def main():
    for name, make in WAYS.items():
        total, wide = per_unit(make), per_unit(make, torch.float32)
        sys.stdout.write(f"{name}: {total:.1f} bytes, {wide:.1f} of them float32\n")


if __name__ == "__main__":
    main()
