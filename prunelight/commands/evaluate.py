"""`prunelight evaluate MODEL [--reference DENSE]`: quality of a model, alone or beside another.

Under torchrun the processes share the windows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

import torch
import torch.distributed as dist
from jsonargparse import Namespace
from rich.console import Console

from prunelight.evaluation.saved.evaluate import evaluate_saved, out_folder
from prunelight.evaluation.saved.record import FILE
from prunelight.evaluation.saved.settings import EvaluationSettings
from prunelight.evaluation.saved.table import evaluation_notes, evaluation_table
from prunelight.runtime.processes import ProcessGroup
from prunelight.verbs import VerbParser, add_offload, add_place, add_trust, run_verb

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    run_verb(_parser(), arguments, _evaluate)


def _evaluate(given: Namespace) -> None:
    values = {field.name: given[field.name] for field in fields(EvaluationSettings)}
    settings = EvaluationSettings(**values)
    with processes_of_torchrun() as (group, device):
        result = evaluate_saved(
            given.model,
            settings,
            reference=given.reference,
            out=given.out,
            dtype=given.dtype,
            device=device or given.device,
            trust_remote_code=given.trust_remote_code,
            attn_implementation=given.attn_implementation,
            offload=given.offload,
            group=group,
        )
        if group.rank == 0:
            console = Console()
            if not console.is_terminal:  # a file has no width
                console = Console(width=120)
            console.print(evaluation_table(result))
            for line in evaluation_notes(result):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            file = out_folder(given.model, given.out) / FILE
            console.print(f"Result: {file}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def processes_of_torchrun() -> Iterator[tuple[ProcessGroup, str | None]]:
    """Yield the processes that torchrun started, and the device of this one; undo it on exit.

    A process that was started alone is a group of one, and its device is None.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ProcessGroup(), None
        return
    device = None
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device is None else "nccl")
    group = ProcessGroup.of_default_group()
    try:
        with group.failing_together():
            yield group, device
    finally:
        dist.destroy_process_group()


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="prunelight evaluate",
        description="Measure a model on text and tasks, alone or beside the dense model. A killed "
        "evaluation goes on with the same command.",
    )
    add = parser.add_argument
    add("model", type=str, help="Hub id, directory, GGUF file or bundled name of the model.")
    add(
        "--reference",
        type=str | None,
        default=None,
        help="The dense model: adds KL, same-top-1 and other changes.",
    )
    add(
        "--texts",
        "--text",
        nargs="*",
        type=str,
        default=["sample:validation"],
        help="Texts for perplexity: files, bundled samples or datasets.",
    )
    add(
        "--seq_len",
        type=int | None,
        default=None,
        help="Tokens of a window; by default 2048, or the model's context if that is shorter.",
    )
    add(
        "--max_windows",
        type=int | None,
        default=None,
        help="Measure the first so many windows of each text; by default all.",
    )
    add(
        "--keep_tail",
        type=bool,
        default=False,
        help="Count the tokens that fill no window too, in a shorter last one; the papers do not.",
    )
    add(
        "--tasks",
        nargs="+",
        type=str,
        default=[],
        help="Tasks of lm-eval, such as arc_easy piqa gsm8k.",
    )
    add(
        "--tasks_dir",
        type=str | None,
        default=None,
        help="Directory of the tasks' data, so that no network is needed.",
    )
    add(
        "--limit",
        type=int | None,
        default=None,
        help="Ask the first so many questions of each task; by default all.",
    )
    add(
        "--num_fewshot",
        type=int | None,
        default=None,
        help="Examples before a question; by default as many as the task says.",
    )
    add(
        "--apply_chat_template",
        type=bool,
        default=False,
        help="Ask in the form of the model's chat template.",
    )
    add(
        "--probes",
        type=bool,
        default=True,
        help="Look for collapse: arithmetic, brackets, copying, repetition; and show samples.",
    )
    add("--cost", type=bool, default=False, help="Measure what serving costs on this machine.")
    add(
        "--batch_size",
        type=int | None,
        default=None,
        help="Windows, or questions, of a forward; by default about 1024 tokens of windows.",
    )
    add_place(parser)
    add_offload(parser)
    add_trust(parser)
    add(
        "--out",
        type=str | None,
        default=None,
        help="Directory of evaluation.json; by default evaluation-<model> here.",
    )
    return parser
