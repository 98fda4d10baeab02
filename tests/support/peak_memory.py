"""The most memory that steps of a training take on a CPU, as a share of the estimate.

    MALLOC_MMAP_THRESHOLD_=100000 python tests/support/peak_memory.py lora float32 [checkpointing]

or full, or bfloat16. A random Llama of 134M parameters, two windows of 1024 tokens. The environment
variable lets the allocator give memory back at once.
"""

import gc
import re
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prunelight.losses import language_loss, linear_loss
from prunelight.models.placement import copy_without_values
from prunelight.models.sizes import parameter_count
from prunelight.recovery.distillation.language_head import LanguageHead
from prunelight.recovery.lora import LoRA, make_trainable
from prunelight.recovery.memory.recovery_memory import Batch, recovery_memory
from prunelight.recovery.prepared_model import RecoverySettings

CPU = torch.device("cpu")


def private_bytes():
    """Return the resident memory of this process that is no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def train(model, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(5, 32000, (2, 1024))
    for _ in range(steps):
        head = LanguageHead(model)
        states = head.hidden_states({"input_ids": ids, "use_cache": False}).flatten(0, 1)
        rows = torch.arange(len(states))
        weight = head.module.weight
        linear_loss(states, weight, None, language_loss(ids.flatten()), rows).backward()
        optimizer.step()
        optimizer.zero_grad()


def main():
    recovery, name, *more = sys.argv[1:]
    dtype, checkpointing = getattr(torch, name), bool(more)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
    )
    model = LlamaForCausalLM(config).to(dtype)
    settings = RecoverySettings(recovery, gradient_checkpointing=checkpointing)
    outline = copy_without_values(model)
    estimated = recovery_memory(outline, settings, Batch(2, 1024), dtype, CPU)
    gc.collect()
    before = private_bytes() - parameter_count(model) * dtype.itemsize
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = make_trainable(model, recovery, LoRA()).train()
    peak, done = [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], private_bytes())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(trained, steps=2)
    finally:
        done.set()
        watcher.join()
    share = (peak[0] - before) / estimated.total
    sys.stdout.write(
        f"{' '.join([recovery, name, *more])}: {share:.2f} of {estimated.total / 1e9:.2f} GB\n"
    )


if __name__ == "__main__":
    main()
