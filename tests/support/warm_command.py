"""The command line in this process, over and over, and what became of each call."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from prunelight.cli import main


class FirstForward(BaseException):
    """A model was about to compute: nothing was refused before."""


@dataclass(frozen=True)
class End:
    """How a call ended: "one line", "first forward", "traceback", "lines" or "ended"."""

    kind: str
    text: str = ""
    loaded: bool = False


@contextmanager
def stopping_at_forward(loaded: list[bool]) -> Iterator[None]:
    """Raise FirstForward when a language model is called; note in `loaded` that one was read."""

    def stop(module: torch.nn.Module, *_: Any) -> None:
        if isinstance(module, PreTrainedModel):
            raise FirstForward

    read = PreTrainedModel.from_pretrained.__func__  # watched, then put back

    def watched(cls: type, *arguments: Any, **named: Any) -> Any:
        loaded.append(True)
        return read(cls, *arguments, **named)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(stop)
    PreTrainedModel.from_pretrained = classmethod(watched)  # type: ignore[method-assign]
    try:
        yield
    finally:
        hook.remove()
        PreTrainedModel.from_pretrained = classmethod(read)  # type: ignore[method-assign]


def call(arguments: Sequence[str]) -> End:
    """Run the command up to the first forward of a model."""
    loaded: list[bool] = []
    errors, argv = io.StringIO(), list(sys.argv)
    try:
        with stopping_at_forward(loaded), redirect_stderr(errors), redirect_stdout(io.StringIO()):
            main(list(arguments))
    except FirstForward:
        return End("first forward", loaded=bool(loaded))
    except SystemExit as stopped:
        lines = [stopped.code] if isinstance(stopped.code, str) else errors.getvalue().splitlines()
        told = [line for line in lines if line.startswith("prunelight: error: ")]
        one = len(told) == 1 and "\n" not in told[0] and stopped.code not in (0, None)
        return End("one line" if one else "lines", "\n".join(told or lines), bool(loaded))
    except BaseException as error:  # every fault is a finding
        return End("traceback", f"{type(error).__name__}: {error}", bool(loaded))
    finally:
        sys.argv[:] = argv
    return End("ended", errors.getvalue(), bool(loaded))
