"""`prunelight.evaluate_saved`: what `prunelight evaluate` does, from Python."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from prunelight.evaluation.probes.examiner import (
    VERSION,
    probe_results,
    probes_json,
    samples_json,
)
from prunelight.evaluation.probes.probing import run_probes
from prunelight.evaluation.probes.results import compare_probes
from prunelight.evaluation.probes.samples import samples
from prunelight.evaluation.quality.bootstrap import exp_or_infinity
from prunelight.evaluation.quality.divergence import against_reference
from prunelight.evaluation.quality.text_quality import text_quality
from prunelight.evaluation.quality.text_windows import (
    TextWindows,
    check_text_length,
    text_windows,
)
from prunelight.evaluation.quality.token_losses import EVALUATION_TOKENS
from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.saved.record import FORMAT, Record, check_out
from prunelight.evaluation.saved.settings import EvaluationSettings
from prunelight.evaluation.saved.subject import Subject, check_same_tokenizer, find_device
from prunelight.evaluation.serving.cost import serving_cost
from prunelight.evaluation.tasks.catalog import spelled_out
from prunelight.evaluation.tasks.results import TaskResult
from prunelight.evaluation.tasks.running import run_tasks
from prunelight.evaluation.tasks.saving import task_result, tasks_answer
from prunelight.evaluation.tasks.task_set import TaskSet, check_tasks
from prunelight.planning.fingerprints import fingerprint_of, library_versions, without_folders
from prunelight.runtime.devices import device_name
from prunelight.runtime.files.directory_lock import DirectoryLock
from prunelight.runtime.origin import command_line, date_now, machine_facts
from prunelight.runtime.processes import ProcessGroup
from prunelight.runtime.progress import Bar

log = logging.getLogger(__name__)

PAPER_SEQ_LEN = 2048  # tokens of a window in the papers' tables
_QUESTIONS = 8  # of a forward


def evaluate_saved(
    name: str,
    settings: EvaluationSettings = EvaluationSettings(),  # noqa: B008 (frozen)
    *,
    reference: str | None = None,
    out: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    offload: bool = False,
    group: ProcessGroup | None = None,
) -> Json:
    """Measure a model, and write OUT/evaluation.json.

    Args:
        name: of the model, what `prunelight.load` takes.
        settings: what is measured.
        reference: of the dense model, with the same tokenizer; None measures the model alone.
        out: directory of the result; None for `evaluation-<name>` in the current directory.
        dtype: of the weights: auto, float32, bfloat16 or float16.
        device: such as "cuda:0" or "cpu"; "auto" takes a GPU if there is one.
        trust_remote_code: run Python code that comes with the models.
        attn_implementation: attention that they compute with; None: transformers chooses.
        offload: keep models off the device, with one layer there at a time, even if they fit.
        group: processes that share the work; None for this one alone.

    Returns:
        What the file holds; docs/evaluating.md says what each entry means.

    Raises:
        ValueError: for a model, a text, a task or a setting that cannot be used, before anything is
            computed.
        OSError: if the result cannot be written.
        RuntimeError: if another process evaluates into the same directory.
    """
    group = group or ProcessGroup()
    if offload and settings.cost:
        raise ValueError(
            "offload=True cannot be combined with cost=True: speeds are those of a model on "
            "its device; measure them in a run of their own"
        )
    folder = out_folder(name, out)
    check_out(folder)
    place = find_device(device)
    subject_of = partial(
        Subject,
        dtype=dtype,
        device=place,
        trust=trust_remote_code,
        attention=attn_implementation,
        offload=offload,
    )
    subject = subject_of(name)
    dense = None
    if reference is not None:
        dense = subject_of(reference)
        check_same_tokenizer(subject, dense)
    texts = _texts(subject, dense, settings)
    names = spelled_out(settings.tasks) if settings.tasks else []
    tasks = [_task_set(subject, name, settings) for name in names]
    with group.failing_together():
        lock = DirectoryLock(folder, "out") if group.rank == 0 else None
    try:
        return _Evaluation(subject, dense, settings, texts, tasks, Record(folder, group)).run()
    finally:
        if lock is not None:
            lock.release()


def out_folder(name: str, out: str | Path | None) -> Path:
    """Return the directory of a result; without `out` it is `evaluation-<name>` here."""
    default = f"evaluation-{without_folders(name.rstrip('/')).replace('/', '--')}"
    return Path(default if out is None else out).expanduser()


def _texts(
    subject: Subject, dense: Subject | None, settings: EvaluationSettings
) -> list[TextWindows]:
    """Return the windows of each text.

    Raises:
        ValueError: if a text cannot be read, fills no window, or its windows are too long.
    """
    seq_len = settings.seq_len or min(PAPER_SEQ_LEN, subject.context or PAPER_SEQ_LEN)
    texts = []
    for source in settings.texts:
        for each in (subject, dense):
            check_text_length(seq_len, each.context if each is not None else None)
        texts.append(
            text_windows(
                subject.tokenizer,
                source,
                seq_len,
                max_windows=settings.max_windows,
                keep_tail=settings.keep_tail,
            )
        )
    return texts


def _task_set(subject: Subject, name: str, settings: EvaluationSettings) -> TaskSet:
    """Return one task or group, with its rows; each is a part of its own."""
    return check_tasks(
        [name],
        tasks_dir=settings.tasks_dir,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        apply_chat_template=settings.apply_chat_template,
        tokenizer=subject.tokenizer,
    )


class _Evaluation:
    """One evaluation whose input was checked."""

    def __init__(
        self,
        subject: Subject,
        dense: Subject | None,
        settings: EvaluationSettings,
        texts: list[TextWindows],
        tasks: list[TaskSet],
        record: Record,
    ) -> None:
        self.subject, self.dense, self.settings = subject, dense, settings
        self.texts, self.tasks, self.record, self.group = texts, tasks, record, record.group
        self.known = _known(record, subject)
        self.known_of_dense = None if dense is None else _known(record, dense)

    def run(self) -> Json:
        """Measure what is not on disk yet, and write the result."""
        result = self._facts()
        for measured in self._on_texts():
            for name, value in measured.items():
                result[name] = [*result.get(name, []), *value]
        result |= self._probes(result) | self._on_tasks() | self._serving()
        return self.record.finish(result)

    def _on_texts(self) -> Iterator[Json]:
        for text in self.texts:
            depends = [text.text, text.protocol, fingerprint_of(text.ids.tolist())]
            name = f"text {text.text}"
            yield self.record.part(name, self._key(*depends), partial(self._on_text, text))

    def _on_text(self, text: TextWindows) -> Json:
        batch_size, model = self.settings.batch_size, self.subject.model
        tokens = batch_size * text.seq_len if batch_size else EVALUATION_TOKENS
        if self.dense is None:
            quality = text_quality(model, text, batch_tokens=tokens, group=self.group)
            return {"texts": [asdict(quality)]}
        ours, theirs, divergence = against_reference(
            model, self.dense.model, text, batch_tokens=tokens, group=self.group
        )
        return {
            "texts": [asdict(ours)],
            "reference_texts": [asdict(theirs)],
            "divergence": [asdict(divergence)],
        }

    def _on_tasks(self) -> Json:
        """Return the results of tasks, and the flips between model and reference."""
        if not self.tasks:
            return {}
        ours = self._task_results(self.subject)
        if self.dense is None:
            return tasks_answer(ours, None)
        theirs = self._task_results(self.dense)
        return tasks_answer(ours, theirs) | {"reference_tasks": tasks_answer(theirs, None)["tasks"]}

    def _task_results(self, subject: Subject) -> dict[str, TaskResult]:
        results: dict[str, TaskResult] = {}
        for tasks in self.tasks:
            key = self._key_of(subject, tasks.describe(), self.settings.batch_size)
            label = f"task {tasks.names[0]} of {without_folders(subject.name)}"
            told = self.record.part(label, key, partial(self._ask, subject, tasks))
            results |= {name: task_result(each) for name, each in told.items()}
        return results

    def _ask(self, subject: Subject, tasks: TaskSet) -> Json:
        results = run_tasks(
            subject.model,
            subject.tokenizer,
            tasks,
            batch_size=self.settings.batch_size or _QUESTIONS,
            group=self.group,
        )
        answer: Json = tasks_answer(results, None)["tasks"]
        return answer

    def _probes(self, measured: Json) -> Json:
        """Return what probes find, samples side by side, and a warning for each hidden collapse.

        Args:
            measured: the texts, by whose perplexity a collapse is hidden.
        """
        if not self.settings.probes:
            return {}
        ours = self._probe(self.subject)
        if self.dense is None:
            return {"probes": ours["probes"], "samples": ours["samples"]}
        theirs = self._probe(self.dense)
        found, reference = probe_results(ours["probes"]), probe_results(theirs["probes"])
        pairs = zip(ours["samples"], theirs["samples"], strict=False)
        ratios = [
            float(each["ln_perplexity_ratio"]["value"]) for each in measured.get("divergence", [])
        ]
        warnings = [
            warning
            for ratio in ratios[:1]
            for warning in compare_probes(reference, found, perplexity_ratio=exp_or_infinity(ratio))
        ]
        return {
            "probes": probes_json(found, reference),
            "reference_probes": theirs["probes"],
            "samples": [{**own, "reference": other["text"]} for own, other in pairs],
            "warnings": warnings,
        }

    def _probe(self, subject: Subject) -> Json:
        label = f"probes of {without_folders(subject.name)}"
        key = self._key_of(subject, "probes", VERSION)
        measure = partial(_probe, subject)
        return self.record.part(label, key, lambda: self.group.run_on_rank_zero(measure))

    def _serving(self) -> Json:
        if not self.settings.cost:
            return {}
        return self.record.part(
            "serving", self._key("serving"), lambda: self.group.run_on_rank_zero(self._cost)
        )

    def _cost(self) -> Json:
        return serving_cost(self.subject.model, None if self.dense is None else self.dense.model)

    def _key(self, *depends: object) -> str:
        """Return the fingerprint of a part that depends on the models and on further values."""
        models = [None if each is None else each["facts"]["fingerprint"] for each in self._both]
        dtypes = [None if each is None else each["dtype"] for each in self._both]
        return fingerprint_of(models, {**self._circumstances, "dtypes": dtypes}, *depends)

    def _key_of(self, subject: Subject, *depends: object) -> str:
        """Return the fingerprint of a part that depends on one model and on further values."""
        known = self.known if subject is self.subject else self.known_of_dense
        assert known is not None
        circumstances = {**self._circumstances, "dtypes": [known["dtype"]]}
        return fingerprint_of(known["facts"]["fingerprint"], circumstances, *depends)

    @property
    def _both(self) -> tuple[Json, Json | None]:
        return self.known, self.known_of_dense

    @property
    def _circumstances(self) -> Json:
        return {"device": device_name(self.subject.device), "versions": library_versions()}

    def _facts(self) -> Json:
        """Return what is known before anything is measured."""
        dtypes = [None if each is None else each["dtype"] for each in self._both]
        if None not in dtypes and dtypes[0] != dtypes[1]:
            log.warning(
                "the model is in %s and its reference in %s; --dtype gives both the same", *dtypes
            )
        return {
            "format": FORMAT,
            "model": self.known["facts"],
            "reference": None if self.known_of_dense is None else self.known_of_dense["facts"],
            "facts": {
                "date": date_now(),
                "command": command_line(sys.argv),
                "machine": machine_facts(),
                "device": device_name(self.subject.device),
                "dtype": dtypes[0],
                "reference_dtype": dtypes[1],
                "versions": library_versions(),
                "processes": self.group.size,
            },
        }


def _known(record: Record, subject: Subject) -> Json:
    """Return dtype and facts of a model, without its weights where an earlier start read them."""
    if subject.files is None:  # of the hub
        return subject.describe()
    return record.known(f"model {without_folders(subject.name)}", subject.files, subject.describe)


def _probe(subject: Subject) -> Json:
    """Return what probes find of a model, and its samples."""
    with Bar(f"probes of {without_folders(subject.name)}"):
        generated = samples(subject.model, subject.tokenizer)
        results = run_probes(subject.model, subject.tokenizer, generated=generated)
    return {"probes": probes_json(results), "samples": samples_json(generated)}
