"""What each of two processes does that share the prompts of tasks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import tiny_model
from transformers import AutoTokenizer

from prunelight.evaluation.tasks.running import run_tasks
from prunelight.evaluation.tasks.task_set import check_tasks
from prunelight.runtime.processes import ProcessGroup


class Broken(torch.nn.Module):
    """Fails in each forward."""

    def forward(self, *_, **__):
        raise ValueError("the memory of this rank is gone")


def work(rank, root, tasks):
    torch.set_num_threads(1)
    root = Path(root)
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)
    group = ProcessGroup.of_default_group()
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    task_set = check_tasks(tasks.split(), tasks_dir=root / "tasks")
    counted, model = [], tiny_model()
    model.register_forward_hook(lambda *_: counted.append(1))
    results = run_tasks(model, tokenizer, task_set, batch_size=4, group=group)
    said = {"results": {name: asdict(result) for name, result in results.items()}}
    if rank == 1:
        model.model.layers[0] = Broken()
    try:
        run_tasks(model, tokenizer, task_set, batch_size=4, group=group)
    except (ValueError, RuntimeError) as error:
        said["error"] = str(error)
    (root / f"rank-{rank}.json").write_text(json.dumps({**said, "forwards": len(counted)}))
    dist.destroy_process_group()
