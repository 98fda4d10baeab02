"""The LightningDataModule of prunelight: text or instruction rows for recovery and calibration.

Text is packed into full windows without padding (labels are the tokens); instruction rows become
examples of their own length with the loss on the response, padded per batch. Training rows may
instead hold several whole documents or examples each, see data/document_rows.py. Training order
depends on seed and epoch only, so a resumed epoch repeats. Not done: training on a stream,
bucketing by length.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.self_written import (
    FORMAT,
    check_calibration_sources,
    is_self_written,
    prefix_length,
    prefixes_for,
    self_written_windows,
    sources_read,
)
from prunelight.calibration.windows import Windows
from prunelight.data.corpus_reading import characters_of
from prunelight.data.document_rows import cut_document, pack_documents
from prunelight.data.held_out_texts import ROLE, Sources, check_texts, role_of, told_protocol
from prunelight.data.instructions import instruction_example, is_instruction_row
from prunelight.data.rows import Row
from prunelight.data.sources import read_documents
from prunelight.data.token_files import read_examples, write_examples
from prunelight.data.token_windows import (
    Bos,
    bos_token_id,
    pack_windows,
    sample_indices,
    tokenize_documents,
    tokenized,
)
from prunelight.losses import IGNORED_LABEL
from prunelight.models.loading import load_tokenizer
from prunelight.planning.fingerprints import describe_windows, fingerprint_of, model_fingerprint
from prunelight.runtime.arguments import NOT_EMPTY, SEED, at_least, checked
from prunelight.training.resuming.resumable_loader import ResumableLoader
from prunelight.training.trainer import pruning_methods

log_once = rank_zero_only(logging.getLogger(__name__).info)

# N examples, T tokens of the longest
# input_ids and labels, and positions in a row of several documents: int32 (T,), which batches turn
# into LongTensors
Example = tuple[Tensor, ...]

CALIBRATION = "calibration"

# Calibration windows are drawn from so many times their number where a corpus is streamed, so that
# other seeds draw other windows.
DRAWN_FROM = 8


class TextDataModule(LightningDataModule):
    """Training, validation and calibration data from files, bundled samples or hub datasets.

    Args:
        tokenizer: a tokenizer, or the name of a model to load it from.
        train: source or sources of training rows, see `prunelight.data.sources.read_documents`.
        validation: the same, for validation and test. A mapping of names to sources takes several
            texts: the first is what a run watches and compares its stages on, each other one has
            figures of its own beside it.
        calibration: the same, for the windows that pruning looks at; of several sources each
            gives the same number. "self", or "self:SOURCE": the dense model writes them, each
            behind 8 tokens of the source (`sample:calibration`), see
            `prunelight.calibration.self_written`.
        seq_len: tokens of a text window, and the most of an instruction example.
        batch_size: examples per batch and process.
        num_calibration: windows (or instruction examples) drawn for calibration.
        num_validation: use only the first ones of the validation examples; None means all.
        packing: of training rows: "stream" cuts the text of all documents into windows and leaves
            instruction examples apart; "documents" puts several documents or examples into a row
            of `seq_len`, none of which sees another. Validation and calibration stay windows, so
            that perplexities compare.
        text_field: the field of a row that holds its text.
        bos: "auto", "always" or "never": whether each window starts with the BOS token.
        seed: of the training order and of the choice of calibration windows.
        num_workers: processes that load batches.
        trust_remote_code: run Python code that comes with the tokenizer.
        calibration_seq_len: tokens of a calibration window; None means `seq_len`.
        validation_seq_len: tokens of a validation window; None means `seq_len`.

    Raises:
        ValueError: if a number is out of range, a text's name cannot stand in the name of a
            metric, or "self" stands beside other sources.
    """

    @checked(
        train=NOT_EMPTY,
        validation=NOT_EMPTY,
        calibration=NOT_EMPTY,
        seq_len=at_least(2),
        batch_size=at_least(1),
        num_calibration=at_least(1),
        num_validation=at_least(1),
        text_field=NOT_EMPTY,
        seed=SEED,
        num_workers=at_least(0),
        calibration_seq_len=at_least(2),
        validation_seq_len=at_least(2),
    )
    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase,
        *,
        train: str | list[str] = "sample:train",
        validation: str | list[str] | dict[str, str | list[str]] = "sample:validation",
        calibration: str | list[str] = "sample:calibration",
        seq_len: int = 512,
        batch_size: int = 4,
        num_calibration: int = 32,
        num_validation: int | None = None,
        packing: Literal["stream", "documents"] = "stream",
        text_field: str = "text",
        bos: Bos = "auto",
        seed: int = 0,
        num_workers: int = 0,
        trust_remote_code: bool = False,
        calibration_seq_len: int | None = None,
        validation_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        self.tokenizer = tokenizer
        if isinstance(validation, dict):
            check_texts(validation)
        bos_token_id(tokenizer, bos)  # raises now rather than after minutes of other work
        check_calibration_sources(calibration)
        self._calibration = calibration
        self.sources: dict[str, Sources] = {
            "train": train,
            "validation": validation,
            "calibration": calibration,
        }
        self.seq_len, self.batch_size, self.num_workers = seq_len, batch_size, num_workers
        self.calibration_seq_len = calibration_seq_len
        self.validation_seq_len = validation_seq_len
        self.num_calibration, self.num_validation = num_calibration, num_validation
        self.text_field, self.bos, self.seed, self.packing = text_field, bos, seed, packing
        tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad_token_id = next(token for token in tokens if token is not None)
        self._collate = partial(pad_examples, pad_token_id=pad_token_id)
        self._examples: dict[str, list[Example]] = {}
        self._joined: dict[str, str] = {}  # role -> how its rows became a text

    def prepare_data(self) -> None:
        """Read and tokenise once for all processes of a node, into files that they map.

        Lightning calls this in one process of each node, while the others wait. A single process
        needs no file.
        """
        for role, file in self._token_files().items():
            if role in self._examples:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)  # of a run that was killed
            try:
                examples = self._build(role)
            except Exception:  # the others would wait for ever; each tells it in `setup`
                return
            write_examples(examples, self._joined[role], file)

    def _token_files(self) -> dict[str, Path]:
        """Return the file of each role that several processes of this run read; none for one."""
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return {}
        roles = self._roles_of_texts()
        if trainer.state.fn == "fit":
            roles += ["train", *(self._calibration_roles() if pruning_methods(trainer) else [])]
        names = ("sources", "num_validation", "text_field", "bos", "packing")
        facts = {name: getattr(self, name) for name in names}
        lengths = {role: self.seq_len_of(role) for role in roles}
        digest = fingerprint_of(facts | lengths)
        directory = Path(trainer.default_root_dir) / "tokens"
        return {
            role: directory / f"{role.replace('/', '-')}-{digest}.safetensors" for role in roles
        }

    def teardown(self, stage: str | None = None) -> None:
        """Remove the files of the tokens; what a process has mapped stays readable to it."""
        if self.trainer is not None and self.trainer.local_rank == 0:
            for file in self._token_files().values():
                file.unlink(missing_ok=True)
                with suppress(OSError):  # not there, or not empty
                    file.parent.rmdir()

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what the stage needs; what is there already is kept."""
        kinds = {"fit": ("train", ROLE), "predict": ()}
        several = {ROLE: self._roles_of_texts(), CALIBRATION: self._calibration_roles()}
        for kind in kinds.get(stage, (ROLE,)) if stage else self.sources:
            for role in several.get(kind, [kind]):
                self.examples(role)

    @property
    def validation_names(self) -> tuple[str, ...]:
        """Names of the validation texts; none where `validation` names none."""
        validation = self.sources[ROLE]
        return tuple(validation) if isinstance(validation, dict) else ()

    def _roles_of_texts(self) -> list[str]:
        """Return the role of each validation text: that of the first one is "validation"."""
        return [ROLE, *(role_of(name) for name in self.validation_names[1:])]

    def _calibration_roles(self) -> list[str]:
        """Return the role of each calibration source: "calibration" if there is one alone."""
        count = len(sources_read(self._calibration))
        return [CALIBRATION] if count == 1 else [f"{CALIBRATION}/{i}" for i in range(count)]

    @property
    def self_written(self) -> bool:
        """Whether the dense model writes the calibration windows."""
        return is_self_written(self._calibration)

    def examples(self, role: str) -> list[Example]:
        """All examples of "train", "validation" or "calibration", read at the first call.

        Of several validation texts, "validation" is the first and "validation/NAME" another one.
        Of several calibration sources each is "calibration/PLACE". Where the model writes the
        windows these are prefixes. Raises FileNotFoundError or ValueError if a source cannot be
        read or holds too few.
        """
        if role not in self._examples:
            file = self._token_files().get(role)
            if file is not None and file.is_file():
                self._examples[role], self._joined[role] = read_examples(file)
            else:
                self._examples[role] = self._build(role)
        return self._examples[role]

    def seq_len_of(self, role: str) -> int:
        """Return the tokens of a window of "train", "validation" or "calibration"."""
        own = {"calibration": self.calibration_seq_len, "validation": self.validation_seq_len}
        return own.get(_kind(role)) or self.seq_len

    def calibration_windows(self, model: PreTrainedModel | None = None) -> Windows:
        """The `num_calibration` windows for pruning, drawn by `seed` from the calibration examples.

        Args:
            model: the dense model, on the device where it writes; needed if it is to write them.

        Returns:
            LongTensor (N, T) for text, T tokens of a window; for instructions a dict of input_ids
            and attention_mask, (N, T).

        Raises:
            ValueError: if a source holds too few examples, or the model is missing.
        """
        if not self.self_written:
            return self._drawn_windows(self.num_calibration)
        if model is None:
            raise ValueError(
                f"calibration={self._calibration!r} needs the dense model, which writes "
                "the windows; call calibration_windows(model)"
            )
        prefixes = self._drawn_windows(prefixes_for(self.num_calibration))
        if not isinstance(prefixes, Tensor):
            raise ValueError(
                f"calibration={self._calibration!r} takes prefixes of text, and the source "
                "holds instructions; name a text"
            )
        seq_len = self.seq_len_of(CALIBRATION)
        of_the_model = [model_fingerprint(model), str(model.dtype), model.config.to_json_string()]
        facts = describe_windows(prefixes) | {"seq_len": seq_len, "seed": self.seed}
        place = fingerprint_of(FORMAT, of_the_model, facts)
        directory = Path(constants.HF_HOME) / "prunelight" / "self-written" / place
        return self_written_windows(
            model, prefixes, seq_len, self.num_calibration, directory, seed=self.seed
        )

    def _drawn_windows(self, count: int) -> Windows:
        """Return `count` calibration examples, as many of each source, as windows."""
        roles, drawn = self._calibration_roles(), list[Example]()
        if count < len(roles):
            raise ValueError(
                f"num_calibration={count} must be at least {len(roles)}: each source gives a window"
            )
        for place, role in enumerate(roles):
            examples = self.examples(role)
            share = count // len(roles) + (place < count % len(roles))
            if share > len(examples):
                kind, length, lower = "examples", f" at {self._told_seq_len(role)}", " or seq_len"
                if self.self_written:  # prefixes have one length
                    kind, length, lower = "prefixes", "", ""
                raise ValueError(
                    f"num_calibration={self.num_calibration} takes {share} {kind} of calibration="
                    f"{self._sources_of(role)!r}, which holds {len(examples)}{length}; give more "
                    f"text, or lower num_calibration{lower}"
                )
            drawn += [examples[i] for i in sample_indices(len(examples), share, seed=self.seed)]
        if len(roles) > 1:  # any part of them, such as those that healing holds out, is mixed
            drawn = [drawn[i] for i in sample_indices(count, count, seed=self.seed)]
        windows = self._windows(drawn)
        if isinstance(windows, dict):
            del windows["labels"]
        return windows

    def validation_windows(self) -> Windows:
        """All validation examples: LongTensor (N, T), or for instructions a padded batch."""
        return self._windows(self.examples("validation"))

    def further_validation_windows(self) -> dict[str, Windows]:
        """Name of each validation text behind the first -> its windows."""
        names = self.validation_names[1:]
        return {name: self._windows(self.examples(role_of(name))) for name in names}

    def validation_protocols(self) -> dict[str, str]:
        """Name of each validation text -> how its windows were made; "" names an unnamed text."""
        start = bos_token_id(self.tokenizer, self.bos) is not None
        told = {}
        for name, role in zip(self.validation_names or ("",), self._roles_of_texts(), strict=True):
            lengths = [len(example[0]) for example in self.examples(role)]
            told[name] = told_protocol(self._joined[role], lengths, self.seq_len_of(role), start)
        return told

    def batch(self, role: str, places: Sequence[int]) -> dict[str, Tensor]:
        """Some examples of a role as one batch, see `pad_examples`."""
        examples = self.examples(role)
        return self._collate([examples[place] for place in places])

    def train_dataloader(self) -> DataLoader:
        """Batches in an order that depends on seed and epoch, shared out over the processes."""
        examples = self.examples("train")
        share = self.trainer and self.trainer.distributed_sampler_kwargs
        share = share or {"num_replicas": 1, "rank": 0}
        # Lightning tells this sampler the epoch; a plain shuffle would start over on resume.
        sampler: Any = DistributedSampler(examples, **share, seed=self.seed)  # type: ignore[arg-type]
        return self._loader(examples, sampler, self._position)

    def _position(self) -> int:
        """Return how many batches of the epoch a running training has behind it."""
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return 0
        return trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def describe_training(self) -> dict[str, Any]:
        """Return what the training batches depend on: a resumed run must have the same."""
        names = ("seq_len", "batch_size", "packing", "seed")
        return {name: getattr(self, name) for name in names} | {"tokens": self._digest("train")}

    def describe_validation(self) -> str:
        """Return 16 hex digits of the validation examples, on which the best weights depend."""
        first, *others = self._roles_of_texts()
        digests = [self._digest(first), *(f"{role} {self._digest(role)}" for role in others)]
        return digests[0] if not others else fingerprint_of(digests)

    def _digest(self, role: str) -> str:
        """Return 16 hex digits of the examples of a role."""
        tokens = hashlib.sha256()
        for part in (part for example in self.examples(role) for part in example):
            # As LongTensors, which earlier versions held: digests in checkpoints stay.
            tokens.update(f"{part.shape}".encode() + part.long().numpy().tobytes())
        return tokens.hexdigest()[:16]

    def val_dataloader(self) -> DataLoader | dict[str, DataLoader]:
        """Batches of the validation examples, in order; over processes, none of them twice.

        Of several texts, a mapping of their names to such batches.
        """
        loaders = [self._validation_loader(role) for role in self._roles_of_texts()]
        names = self.validation_names
        return dict(zip(names, loaders, strict=True)) if names else loaders[0]

    test_dataloader = val_dataloader

    def _validation_loader(self, role: str) -> DataLoader:
        examples = self.examples(role)
        share = self.trainer and self.trainer.distributed_sampler_kwargs
        if not share:
            return self._loader(examples, None)
        # FSDP2 needs as many batches in each process: the last ones may hold examples that do not
        # count, where a plain DistributedSampler would repeat some.
        ids = examples[0][0]
        filler = (ids, torch.full_like(ids, IGNORED_LABEL))
        examples = [*examples, *[filler] * (-len(examples) % share["num_replicas"])]
        return self._loader(examples, DistributedSampler(examples, **share, shuffle=False))  # type: ignore[arg-type]

    def describe(self) -> dict[str, Any]:
        """Plain facts for reports; counts only of what has been read so far."""
        counts: dict[str, dict[str, int]] = {}
        for role, examples in self._examples.items():
            counts[role] = {"examples": len(examples), "tokens": sum(len(e[0]) for e in examples)}
        names = ["sources", "seq_len", "batch_size", "num_calibration", "num_validation"]
        names += ["bos", "packing", "seed"]
        own = ("calibration_seq_len", "validation_seq_len")
        names += [name for name in own if getattr(self, name) is not None]
        return {name: getattr(self, name) for name in names} | {"counts": counts}

    def _loader(
        self,
        examples: list[Example],
        sampler: DistributedSampler | None,
        position: Callable[[], int] = int,  # 0: from the start
    ) -> DataLoader:
        return ResumableLoader(
            examples,  # a list serves as a dataset
            position=position,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self._collate,
            # From pinned memory a GPU copies a batch while the host goes on.
            pin_memory=torch.cuda.is_available(),
        )

    def _windows(self, examples: list[Example]) -> Windows:
        batch = self._collate(examples)
        return batch["input_ids"] if all(e[0] is e[1] for e in examples) else batch

    def _build(self, role: str) -> list[Example]:
        sources = self._sources_of(role)
        split = ROLE if _kind(role) == ROLE else "train"
        rows: list[Row] = []
        for source in [sources] if isinstance(sources, str) else sources:
            rows += read_documents(
                source, split=split, text_field=self.text_field, enough=self._enough(role)
            )
        texts = [row[self.text_field] for row in rows if not is_instruction_row(row)]
        self._joined[role] = " + ".join(dict.fromkeys(row.joined for row in rows if row.joined))
        packed = role == "train" and self.packing == "documents"
        read = self._documents if packed else partial(self._text_examples, role)
        examples = read(texts) if texts else []
        if len(texts) < len(rows):
            examples += self._instruction_examples(role, filter(is_instruction_row, rows))
        if packed:
            examples = self._packed(examples)
        wanted = self.num_validation if _kind(role) == ROLE else None
        if len(examples) < (wanted or 1):
            of = role.replace("/", ".")
            held = f"{of}={sources!r} holds {len(examples)} examples of {self._told_seq_len(role)}"
            remedy = "give more data, or lower seq_len or num_validation"
            raise ValueError(f"{held} but {wanted or 1} must be there; {remedy}")
        return examples[:wanted]

    def _sources_of(self, role: str) -> str | list[str]:
        if _kind(role) == CALIBRATION:
            return sources_read(self._calibration)[int(role.partition("/")[2] or 0)]
        sources = self.sources[_kind(role)]
        if isinstance(sources, dict):
            return sources[role.removeprefix(f"{ROLE}/") if role != ROLE else next(iter(sources))]
        return sources

    def _enough(self, role: str) -> int | None:
        """Return the characters after which a streamed source may end; None if nobody knows."""
        windows = None
        if _kind(role) == CALIBRATION:
            windows = DRAWN_FROM * self.num_calibration
        elif _kind(role) == ROLE:
            windows = self.num_validation
        return None if windows is None else characters_of(windows * self.seq_len_of(role))

    def _told_seq_len(self, role: str) -> str:
        """Return the length of a role's windows under the name of the argument that gives it."""
        name = f"{_kind(role)}_seq_len"
        name = name if getattr(self, name, None) is not None else "seq_len"
        return f"{name}={self.seq_len_of(role)}"

    def _text_examples(self, role: str, texts: list[str]) -> list[Example]:
        stream = tokenize_documents(self.tokenizer, texts)
        bos = bos_token_id(self.tokenizer, self.bos)
        seq_len = self.seq_len_of(role)
        if role == CALIBRATION and self.self_written:
            seq_len = prefix_length(seq_len) + (bos is not None)
        windows = pack_windows(stream, seq_len, bos_token_id=bos)
        tail = len(stream) - len(windows) * (seq_len - (bos is not None))
        log_once(f"{role}: {len(stream)} tokens -> {len(windows)} windows, tail of {tail} dropped")
        return [(window, window) for window in windows]

    def _documents(self, texts: list[str]) -> list[Example]:
        eos = [t for t in [self.tokenizer.eos_token_id] if t is not None]
        end = torch.tensor(eos, dtype=torch.int32)
        bos = bos_token_id(self.tokenizer, self.bos)
        documents = (torch.cat([ids, end]) for ids in tokenized(self.tokenizer, texts))
        pieces = (cut_document(d, self.seq_len, bos_token_id=bos) for d in documents)
        return [(piece, piece) for document in pieces for piece in document]

    def _packed(self, documents: list[Example]) -> list[Example]:
        rows = pack_documents([(d[0], d[1]) for d in documents], self.seq_len)
        filled = sum(len(row[0]) for row in rows) / (max(len(rows), 1) * self.seq_len)
        log_once(f"train: {len(documents)} documents -> {len(rows)} rows, {filled:.1%} filled")
        return [*rows]

    def _instruction_examples(self, role: str, rows: Iterable[Row]) -> list[Example]:
        seq_len = self.seq_len_of(role)
        pairs = [self._instruction_example(row, seq_len) for row in rows]
        kept = [pair for pair in pairs if pair]
        rule = f"the others have no response within {seq_len} tokens"
        log_once(f"{role}: {len(pairs)} instruction rows -> {len(kept)} examples, {rule}")
        return [*kept]

    def _instruction_example(self, row: Row, seq_len: int) -> tuple[Tensor, Tensor] | None:
        try:
            pair = instruction_example(row, self.tokenizer, seq_len=seq_len, bos=self.bos)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        if not pair:
            return None
        ids, labels = (torch.tensor(part, dtype=torch.int32) for part in pair)
        return ids, labels


def _kind(role: str) -> str:
    """Return "validation" for each validation text, and any other role as it is."""
    return role.partition("/")[0]


def pad_examples(examples: Sequence[Example], *, pad_token_id: int) -> dict[str, Tensor]:
    """Batch examples of different lengths, padded on the right to the longest.

    Returns input_ids, attention_mask (0 on padding), labels (-100 on padding), LongTensors (N, T),
    and position_ids if the rows hold documents: 0 on padding, each of which is then alone.
    """
    tokens, labels = ([example[part].long() for example in examples] for part in (0, 1))
    positions = [example[2].long() for example in examples if len(example) == 3]
    packed = {"position_ids": pad_sequence(positions, batch_first=True)} if positions else {}
    return packed | {
        "input_ids": pad_sequence(tokens, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }
