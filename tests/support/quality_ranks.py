"""What two processes find of a tiny model on shared windows; rank 0 writes it (torchrun)."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import tiny_model, token_windows

from prunelight.evaluation.quality.divergence import against_reference
from prunelight.evaluation.quality.text_quality import text_quality
from prunelight.evaluation.quality.text_windows import TextWindows
from prunelight.models.placement import move_if_it_fits
from prunelight.runtime.processes import ProcessGroup


def measure(group=None):
    """Return quality and divergence of one tiny model against another; rank 1 streams it."""
    text = TextWindows("text", "protocol", token_windows(7, 24))
    model, reference = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    if group is not None and group.rank == 1:  # one device of a group may lack room
        move_if_it_fits(model, torch.device("cpu:0"), offload=True)
    found = [text_quality(model, text, batch_tokens=24, group=group)]
    found += against_reference(model, reference, text, batch_tokens=24, group=group)
    return [asdict(each) for each in found]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = measure(ProcessGroup.of_default_group())
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))
    dist.destroy_process_group()
