"""What the cells of one process share: the dense model, the windows, the texts, the scores.

A process loads the dense model once. Each cell prunes a copy of it.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.windows import Windows, check_readable, split_windows
from prunelight.comparison.settings import ComparisonSettings, DataSettings
from prunelight.data.corpora import is_corpus
from prunelight.data.corpus_reading import characters_of
from prunelight.data.instructions import is_instruction_row
from prunelight.data.rows import Row
from prunelight.data.sources import read_documents
from prunelight.data.token_windows import bos_token_id, pack_windows, tokenize_documents
from prunelight.evaluation.quality.reference_memory import ReferenceMemory
from prunelight.evaluation.quality.text_windows import TextWindows, text_windows
from prunelight.evaluation.speed import forward_seconds
from prunelight.models.loading import load
from prunelight.models.placement import move_if_it_fits, to_device, with_index
from prunelight.models.sizes import parameter_count
from prunelight.planning.fingerprints import describe_windows
from prunelight.scoring.remembered import Memory
from prunelight.training.text_datamodule import TextDataModule

log = logging.getLogger(__name__)


class Bench:
    """The dense model and its data, each made when it is first asked for.

    Args:
        settings: of the comparison.
        device: where models compute; None takes the first GPU, or the CPU.
    """

    def __init__(self, settings: ComparisonSettings, device: str | None = None) -> None:
        self.settings = settings
        given = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(given)
        self.memory = Memory()
        self.dense_logits = ReferenceMemory()
        self._calibration: dict[int, Windows] = {}
        self._quantized: dict[tuple[str, int], PreTrainedModel] = {}

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        of = self.settings.model
        log.info("loading %s", of.name)
        model, tokenizer = load(of.name, dtype=of.dtype, trust_remote_code=of.trust_remote_code)
        return move_if_it_fits(model, self.device), tokenizer

    @property
    def dense(self) -> PreTrainedModel:
        """The dense model, which no cell changes."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._loaded[1]

    def copy_of_dense(self) -> PreTrainedModel:
        """Return a copy that a cell may prune."""
        return copy.deepcopy(self.dense)

    def quantized_dense(
        self, kind: str, seed: int, make: Callable[[], PreTrainedModel]
    ) -> PreTrainedModel:
        """Return a copy of the dense model in fewer bits, which is made once for each seed."""
        if (kind, seed) not in self._quantized:
            self._quantized[kind, seed] = make()
        return copy.deepcopy(self._quantized[kind, seed])

    @cached_property
    def parameters(self) -> int:
        """Parameters of the dense model."""
        return parameter_count(self.dense)

    def calibration(self, seed: int) -> Windows:
        """Return the calibration windows that a seed draws, (num_calibration, seq_len)."""
        if seed not in self._calibration:
            data = self.settings.data
            module = TextDataModule(self.tokenizer, seed=seed, **data_arguments(data))
            windows = self._written(module) if module.self_written else module.calibration_windows()
            check_readable(self.dense, windows)
            self._calibration[seed] = windows
        return self._calibration[seed]

    def _written(self, module: TextDataModule) -> Windows:
        """Return windows that the dense model writes, on a GPU if there is one."""
        if self.device.type != "cpu" or not torch.cuda.is_available():
            return module.calibration_windows(self.dense)
        gpu = with_index(torch.device("cuda"))
        try:
            return module.calibration_windows(move_if_it_fits(self.dense, gpu))
        finally:
            to_device(self.dense, self.device)

    @cached_property
    def texts(self) -> dict[str, TextWindows]:
        """Name of each held-out text -> its windows."""
        data, texts = self.settings.data, {}
        for name, source in data.texts.items():
            windows = held_out_text(self.tokenizer, name, source, data)
            check_readable(self.dense, windows.ids)
            texts[name] = windows
        return texts

    @cached_property
    def task_set(self) -> Any:
        """The tasks, checked and with their rows; None without any. It needs no model."""
        settings = self.settings
        if not settings.tasks:
            return None
        from prunelight.evaluation.tasks.task_set import check_tasks

        return check_tasks(settings.tasks, tasks_dir=settings.tasks_dir, limit=settings.limit)

    @cached_property
    def forward_seconds(self) -> float:
        """F: seconds of one forward of the calibration windows through the dense model."""
        return forward_seconds(self.dense, self.calibration(self.settings.seeds[0]))

    def facts(self) -> dict[str, Any]:
        """Return what identifies the model and the windows, as JSON values."""
        calibration = {
            str(seed): describe_windows(*split_windows(self.calibration(seed)))["fingerprint"]
            for seed in self.settings.seeds
        }
        texts = {name: describe_windows(text.ids) for name, text in self.texts.items()}
        return {"calibration": calibration, "texts": texts}


def data_arguments(data: DataSettings) -> dict[str, Any]:
    """Return the arguments of a TextDataModule that calibrates as the comparison says."""
    return {
        "calibration": data.calibration,
        "seq_len": data.seq_len,
        "num_calibration": data.num_calibration,
        "text_field": data.text_field,
        "bos": data.bos,
    }


def held_out_text(
    tokenizer: PreTrainedTokenizerBase, name: str, source: str, data: DataSettings
) -> TextWindows:
    """Return the first windows of a text, by the protocol of `prunelight evaluate`.

    Rows of instructions become plain text, joined by the EOS token.

    Raises:
        ValueError: if the text is too short.
    """
    # A corpus has a split to evaluate on; a dataset of instructions mostly has train alone.
    split, seq_len = "test" if is_corpus(source) else "train", data.held_out_seq_len
    enough = None if data.num_windows is None else characters_of(data.num_windows * seq_len)
    rows = read_documents(source, split=split, text_field=data.text_field, enough=enough)
    if any(is_instruction_row(row) for row in rows):
        stream = tokenize_documents(tokenizer, [plain_text(row, data.text_field) for row in rows])
        start = bos_token_id(tokenizer, data.bos)
        ids = pack_windows(stream, seq_len, bos_token_id=start)[: data.num_windows].long()
        protocol = (
            f"{len(rows)} instructions with their responses as plain text, joined by EOS tokens; "
            f"the first {len(ids)} windows of {seq_len} tokens that do not overlap"
        )
        text = TextWindows(name, protocol, ids)
    else:
        text = text_windows(
            tokenizer,
            source,
            seq_len,
            max_windows=data.num_windows,
            bos=data.bos,
            text_field=data.text_field,
        )
        text = replace(text, text=name)
    if len(text.ids) < (data.num_windows or 2):
        raise ValueError(
            f"the text {source} holds {len(text.ids)} windows of seq_len={seq_len}, and "
            f"num_windows={data.num_windows or 2} are asked for; lower one of them, or give more "
            "text"
        )
    return text


def plain_text(row: Row, text_field: str) -> str:
    """Return the text of a row; an instruction and its response become paragraphs."""
    if not is_instruction_row(row):
        return str(row[text_field])
    messages: Sequence[Mapping[str, Any]] = row.get("messages") or []
    fields = ("prompt", "instruction", "input", "response", "output")
    parts = [message.get("content") for message in messages] or [row.get(f) for f in fields]
    return "\n\n".join(str(part).strip() for part in parts if part)


@cache
def bench_of(settings: str, device: str | None) -> Bench:
    """Return the bench of this process for settings (as JSON text): loaded once."""
    return Bench(settings_of(json.loads(settings)), device)


def settings_of(values: dict[str, Any]) -> ComparisonSettings:
    """Return the settings of their JSON form."""
    from prunelight.comparison.settings import Claim, LauncherSettings, ModelSettings

    claim = values.get("claim")

    return ComparisonSettings(
        **{
            **values,
            "model": ModelSettings(**values["model"]),
            "data": DataSettings(**values["data"]),
            "launcher": LauncherSettings(**values["launcher"]),
            "claim": None if claim is None else Claim(**claim),
        }
    )
