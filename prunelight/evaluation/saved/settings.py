"""What `prunelight evaluate` measures."""

from __future__ import annotations

from dataclasses import dataclass, field

from prunelight.runtime.arguments import at_least, check_fields

_OF_A_PART = {
    "texts": ("seq_len", "max_windows", "keep_tail"),
    "tasks": ("tasks_dir", "limit", "num_fewshot", "apply_chat_template"),
}


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured of a model.

    Attributes:
        texts: sources to measure perplexity on, as `prunelight.read_documents` takes them; may be
            empty.
        seq_len: tokens of a window; None for 2048, or the model's context where that is shorter.
        max_windows: the first so many windows of each text; None for all.
        keep_tail: the tokens that fill no window are a shorter last one; else they are left out, as
            in the papers.
        tasks: names of lm-eval.
        tasks_dir: directory of task files and data, for tasks that need no network.
        limit: the first so many questions of each task; None for all.
        num_fewshot: examples before a question; None for the number that the task says.
        apply_chat_template: ask in the form of the model's chat template.
        probes: look for collapse: arithmetic, brackets, copying, repetition; and show samples.
        cost: measure what serving costs on this machine.
        batch_size: windows, or questions, of a forward; None for about 1024 tokens of windows.

    Raises:
        ValueError: if a number is out of range, a text or task is named twice, a setting has no
            effect, or there is nothing to measure.
    """

    texts: list[str] = field(default_factory=lambda: ["sample:validation"])
    seq_len: int | None = None
    max_windows: int | None = None
    keep_tail: bool = False
    tasks: list[str] = field(default_factory=list)
    tasks_dir: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    probes: bool = True
    cost: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(
            self,
            seq_len=at_least(2),
            max_windows=at_least(1),
            limit=at_least(1),
            num_fewshot=at_least(0),
            batch_size=at_least(1),
        )
        for part, options in _OF_A_PART.items():
            for option in options:
                value = getattr(self, option)
                if value not in (None, False) and not getattr(self, part):
                    raise ValueError(
                        f"{option}={value!r} has no effect without {part}; leave it out"
                    )
        for option, names in (("text", self.texts), ("tasks", self.tasks)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{option}={twice[0]!r} is named twice; name each once")
        if not (self.texts or self.tasks or self.probes or self.cost):
            raise ValueError(
                "there is nothing to measure; give a text or a task, or set probes or cost"
            )
