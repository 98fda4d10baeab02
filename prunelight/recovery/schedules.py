"""Learning-rate schedules of a recovery, and the checks of the recovery's arguments."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from prunelight.runtime.arguments import check_choice

log = logging.getLogger(__name__)

RECOVERIES = ("none", "lora", "full")

# Those that step by a measured loss cannot step with the optimizer.
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
SCHEDULES = [kind.value for kind in SchedulerType if kind.value not in _BY_METRIC]


def check_settings(
    recovery: str,
    *,
    learning_rate: float,
    warmup_steps: int,
    lr_scheduler: str,
    lr_scheduler_kwargs: dict[str, Any] | None = None,
) -> None:
    """Check the arguments of a recovery.

    Raises:
        ValueError: if an argument is out of its range.
    """
    check_choice("recovery", recovery, RECOVERIES)
    if learning_rate <= 0 or warmup_steps < 0:
        raise ValueError(
            f"learning_rate={learning_rate} must be above 0 and warmup_steps={warmup_steps} "
            "at least 0"
        )
    check_choice("lr_scheduler", lr_scheduler, SCHEDULES)
    trial_optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        make_schedule(lr_scheduler, trial_optimizer, 0, 100, lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs={lr_scheduler_kwargs} do not fit {lr_scheduler}: {error}"
        ) from error


def make_schedule(
    name: str,
    optimizer: Optimizer,
    warmup_steps: int,
    steps: float,
    arguments: dict[str, Any] | None = None,
) -> LRScheduler:
    """Return a learning-rate schedule of transformers.get_scheduler over `steps` steps.

    The decay of warmup_stable_decay takes a tenth of the steps unless `arguments` say otherwise.
    MiniCPM (arXiv:2404.06395, section 4.2) reaches with such a decay what a longer one reaches.

    Raises:
        ValueError: if `steps` is infinite.
    """
    if steps == float("inf"):
        raise ValueError(
            "max_steps=-1 without max_epochs leaves the end of the learning-rate schedule "
            "open; set trainer.max_steps or trainer.max_epochs"
        )
    if warmup_steps >= steps:
        log.warning("warmup_steps=%d reaches past the %d steps", warmup_steps, steps)
    settings = {**_our_defaults(name, steps), **(arguments or {})}
    return get_scheduler(name, optimizer, warmup_steps, int(steps), settings)


def describe_schedule(name: str, steps: float) -> dict[str, Any]:
    """Return what a schedule takes for arguments that it is not given, ours and transformers'."""
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    parameters = inspect.signature(function).parameters
    defaults = {
        key: parameter.default
        for key, parameter in parameters.items()
        if parameter.default is not parameter.empty and key != "last_epoch"
    }
    return {**defaults, **_our_defaults(name, steps)}


def _our_defaults(name: str, steps: float) -> dict[str, Any]:
    wsd = name == "warmup_stable_decay"
    return {"num_decay_steps": max(int(steps) // 10, 1)} if wsd else {}
