"""The settings of a comparison, as a config gives them, checked before anything is read.

Names are those of a fit where they mean the same. `check` asks what can be asked without a model:
ranges, names of methods, sources of texts, packages.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from prunelight.calibration.self_written import check_calibration_sources, sources_read
from prunelight.comparison.papers.published import published_tables
from prunelight.data.corpora import corpus_part, is_corpus
from prunelight.data.sources import HUB_PREFIX, SAMPLES, SUFFIXES
from prunelight.data.token_windows import Bos
from prunelight.runtime.arguments import (
    NOT_EMPTY,
    SEED,
    above,
    at_least,
    check_choice,
    check_fields,
    checked_value,
    did_you_mean,
)

QUANTIZATIONS = ("nf4", "fp4", "int8", "gptq")
KINDS = ("sequential", "joblib", "submitit")


@dataclass(frozen=True)
class ModelSettings:
    """The dense model.

    Attributes:
        name: what `prunelight.load` takes: hub id, directory, .gguf file or bundled alias.
        dtype: of the weights: auto, float32, bfloat16 or float16.
        trust_remote_code: run Python code that comes with the model.
    """

    name: str
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "model.", name=NOT_EMPTY)


@dataclass(frozen=True)
class DataSettings:
    """What methods look at, and the held-out texts that quality is measured on.

    Attributes:
        calibration: source or sources of the windows that pruning looks at, or self, as of
            `prunelight.training.text_datamodule.TextDataModule`.
        seq_len: tokens of a calibration window.
        num_calibration: windows drawn for calibration, by the seed.
        texts: name of a held-out text -> its source. Rows of instructions become plain text.
        num_windows: held-out windows of each text: the first ones; null takes all.
        text_field: the field of a row that holds its text.
        bos: auto, always or never: whether each window starts with the BOS token.
        text_seq_len: tokens of a held-out window; null takes `seq_len`.
    """

    calibration: str | list[str] = "sample:calibration"
    seq_len: int = 256
    num_calibration: int = 8
    texts: dict[str, str] = field(
        default_factory=lambda: {
            "wikitext2": "sample:validation",
            "instructions": "sample:instructions",
        }
    )
    num_windows: int | None = 32
    text_field: str = "text"
    bos: Bos = "auto"
    text_seq_len: int | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            "data.",
            calibration=NOT_EMPTY,
            seq_len=at_least(2),
            num_calibration=at_least(1),
            texts=NOT_EMPTY,
            num_windows=at_least(2),
            text_seq_len=at_least(2),
            text_field=NOT_EMPTY,
        )
        for name, source in self.texts.items():
            checked_value(f"data.texts.{name}", source, str, NOT_EMPTY)
        check_sources(self.calibration)
        for source in self.texts.values():
            check_source(source, split="test")

    @property
    def held_out_seq_len(self) -> int:
        """Tokens of a held-out window."""
        return self.seq_len if self.text_seq_len is None else self.text_seq_len

    @property
    def held_out(self) -> str:
        """How much of each text is measured, in words."""
        number = "all" if self.num_windows is None else str(self.num_windows)
        return f"{number} windows of {self.held_out_seq_len} tokens"


@dataclass(frozen=True)
class LauncherSettings:
    """How cells are run.

    Attributes:
        kind: "sequential" in this process, "joblib" in several processes of this machine,
            "submitit" as jobs of a cluster.
        n_jobs: processes of joblib; with devices, one a device.
        devices: where models compute, such as [cuda:0, cuda:1]; empty takes the first GPU, or the
            CPU.
        parameters: of submitit's executor, such as slurm_partition and timeout_min.
        cluster: of submitit: slurm, or local for processes of this machine; null finds out.
    """

    kind: Literal["sequential", "joblib", "submitit"] = "sequential"
    n_jobs: int = 1
    devices: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    cluster: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "launcher.", n_jobs=at_least(1))
        if self.kind == "sequential" and (self.n_jobs > 1 or len(self.devices) > 1):
            raise ValueError(
                f"launcher.kind='sequential' runs in one process: n_jobs={self.n_jobs} and devices="
                f"{self.devices} need launcher.kind=joblib"
            )
        for name, value in (("parameters", self.parameters), ("cluster", self.cluster)):
            if value and self.kind != "submitit":
                raise ValueError(
                    f"launcher.{name}={value!r} has no effect with launcher.kind={self.kind!r}; "
                    "leave it out"
                )


@dataclass(frozen=True)
class Claim:
    """What a contest must confirm: a method is never much worse than another one.

    Attributes:
        method: label of the method.
        against: label of the other one.
        loss: how much higher its perplexity may be, as a share: 0.02 is 2 %. Of each seed and
            amount, as the mean of ln perplexity over the texts.
        forwards: most forwards of the calibration windows that it may take; null sets no limit.
    """

    method: str
    against: str
    loss: float = 0.02
    forwards: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, "claim.", loss=at_least(0), forwards=above(0))
        if self.method == self.against:
            raise ValueError(
                f"claim.method={self.method!r} and claim.against are the same; name two labels"
            )


@dataclass(frozen=True)
class ComparisonSettings:
    """A contest of methods: a grid of methods x amounts x recovery x seeds.

    Attributes:
        model: the dense model.
        methods: each a mapping of class_path, init_args without an amount, and label if one class
            stands there twice. Several callbacks that prune one after another are a mapping of
            callbacks, share and label.
        amounts: shares of all parameters to remove, in (0, 1); null where the init_args of each
            method say how much, such as a threshold.
        zeros: shares of zeros in the weights of decoder linears, for methods that put zeros; null
            takes `amounts`.
        data: calibration and held-out texts.
        tasks: names of lm-eval.
        tasks_dir: directory with the data of the tasks; null asks the hub.
        limit: first questions of each task that are asked; null asks all.
        recovery: null, or a mapping of model, data and trainer as in a fit: then each pruned model
            is also recovered.
        seeds: each draws other calibration windows and another order of training.
        equal: what methods are compared at: "parameters", of which `amounts` are removed,
            "latency", where `amounts` of the time of a generation are saved, as measured here, or
            "ratio", as papers do: `amounts` of the layers, of the hidden width or of the neurons.
        serving: measure also what serving costs on this machine.
        max_kld: instead of `amounts`: prune each method as far as KL(dense || pruned) stays below.
        min_top1: instead of `amounts`: as far as so large a share of tokens keeps its most likely
            next token.
        keep_models: keep the saved models of cells with recovery.
        launcher: how cells are run.
        out: directory of the comparison.
        published: table of a paper, "PAPER.TABLE", whose published figures stand on the page.
        quantizations: measure each model in fewer bits too, after its pruning: nf4, fp4, int8 or
            gptq (4 bits).
        quantize_first: also prune models that are quantized already, where that is defined.
        claim: what the contest must confirm; the command ends with status 1 if it does not.
    """

    model: ModelSettings
    methods: list[dict[str, Any]]
    amounts: list[float] | None = field(default_factory=lambda: [0.25])
    zeros: list[float] | None = None
    data: DataSettings = field(default_factory=DataSettings)
    tasks: list[str] = field(default_factory=list)
    tasks_dir: str | None = None
    limit: int | None = None
    recovery: dict[str, Any] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    equal: Literal["parameters", "latency", "ratio"] = "parameters"
    serving: bool = False
    max_kld: float | None = None
    min_top1: float | None = None
    keep_models: bool = False
    launcher: LauncherSettings = field(default_factory=LauncherSettings)
    out: str = "runs/comparison"
    published: str | None = None
    quantizations: list[str] = field(default_factory=list)
    quantize_first: bool = False
    claim: Claim | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            limit=at_least(1),
            max_kld=above(0),
            seeds=NOT_EMPTY,
            tasks_dir=NOT_EMPTY,
            out=NOT_EMPTY,
        )
        object.__setattr__(self, "methods", _plain(self.methods))
        if not self.methods:
            raise ValueError(
                "methods=[] names no method to compare; give some, such as "
                "methods: [{class_path: prunelight.callbacks.ShortGPT}]"
            )
        for name, shares in (("amounts", self.amounts or []), ("zeros", self.zeros or [])):
            for share in shares:
                if not 0 < share < 1:
                    percent = f"; {share / 100:g} is {share:g} %" if 1 < share < 100 else ""
                    raise ValueError(
                        f"{name}={shares} holds {share}, and each must lie in (0, 1){percent}"
                    )
        self._check_own_amounts()
        if self.amounts == [] and not self.zeros and not self.quality_target:
            raise ValueError("amounts=[] asks for nothing; give shares such as [0.1, 0.25]")
        for seed in self.seeds:
            checked_value("seeds", seed, int, SEED)
        if self.min_top1 is not None and not 0 < self.min_top1 <= 1:
            raise ValueError(
                f"min_top1={self.min_top1} must lie in (0, 1]; 0.95 keeps the most likely token "
                "at 95 % of the tokens"
            )
        if self.max_kld is not None and self.min_top1 is not None:
            raise ValueError(
                f"max_kld={self.max_kld} and min_top1={self.min_top1}: give one of the two"
            )
        if self.published is not None:
            published_tables(self.published)
        self._check_time()
        for kind in self.quantizations:
            check_choice("quantizations", kind, QUANTIZATIONS)
        _check_different("quantizations", self.quantizations)
        if self.quantize_first and not self.quantizations:
            raise ValueError(
                "quantize_first=True has no effect without quantizations; leave it out, or give "
                "some such as [nf4, gptq]"
            )
        if self.limit is not None and not self.tasks:
            raise ValueError(f"limit={self.limit} has no effect without tasks; leave it out")
        _check_different("amounts", self.amounts or [])
        _check_different("zeros", self.zeros or [])
        _check_different("seeds", self.seeds)
        _check_different("tasks", self.tasks)
        if self.tasks_dir is not None and not Path(self.tasks_dir).expanduser().is_dir():
            raise FileNotFoundError(
                f"tasks_dir={self.tasks_dir!r} is no directory; give that of the tasks' files"
            )

    def _check_own_amounts(self) -> None:
        """Check that where each method says how much it removes, nothing else does."""
        target = self.quality_target
        others = {
            "zeros": self.zeros,
            "equal": None if self.equal == "parameters" else self.equal,
            "claim": self.claim,
            **({} if target is None else {target[0]: target[1]}),
        }
        for name, value in others.items():
            if self.amounts is None and value is not None:
                raise ValueError(
                    f"{name}={value!r} has no effect with amounts=null, where each method's own "
                    "arguments say how much it removes; leave one of them out"
                )

    def _check_time(self) -> None:
        """Check that where time is measured, nothing disturbs it."""
        if self.equal != "parameters" and self.quality_target is not None:
            name, value = self.quality_target
            raise ValueError(
                f"equal={self.equal!r} has no effect with {name}={value:g}; leave one of them out"
            )
        launcher = self.launcher
        alone = launcher.kind != "joblib" or launcher.n_jobs == 1 or len(launcher.devices) > 1
        if (self.equal == "latency" or self.serving) and not alone:
            option = "equal='latency'" if self.equal == "latency" else "serving=True"
            raise ValueError(
                f"{option} measures time, which {launcher.n_jobs} processes on one device disturb; "
                "set launcher.n_jobs=1, or give a device to each"
            )

    @property
    def quality_target(self) -> tuple[str, float] | None:
        """What a search keeps: ("max_kld" | "min_top1", value); None where amounts are given."""
        for name in ("max_kld", "min_top1"):
            value = getattr(self, name)
            if value is not None:
                return name, value
        return None

    @property
    def zeros_shares(self) -> list[float] | None:
        """Shares of zeros of the methods that put zeros; None where their arguments say them."""
        return self.amounts if self.zeros is None else self.zeros

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)


def check_sources(calibration: str | list[str]) -> None:
    """Check that calibration sources go together, and each as `check_source` does."""
    check_calibration_sources(calibration)
    for source in sources_read(calibration):
        check_source(source)


def check_source(source: str, *, split: str = "train") -> None:
    """Check that a source that is a sample or a file is there; the hub is not asked.

    Raises:
        ValueError: if a bundled sample is misspelt, or a corpus has no such split.
        FileNotFoundError: if the file does not exist.
    """
    if source.startswith("sample:") and source not in SAMPLES:
        near = get_close_matches(source, SAMPLES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"source {source!r} is no bundled sample: {', '.join(SAMPLES)}{hint}")
    if is_corpus(source):
        corpus_part(source, split=split)
    if is_corpus(source) or source.startswith(HUB_PREFIX):
        return
    path = Path(source).expanduser()
    is_path = path.suffix.lower() in SUFFIXES or source.startswith(("/", ".", "~"))
    if is_path and not path.is_file():
        raise FileNotFoundError(f"source {source!r} does not exist; check the path of the text")


def _plain(value: Any) -> Any:
    """Return JSON values: jsonargparse makes a Namespace of each inner mapping with class_path."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _check_different(name: str, values: list[Any]) -> None:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"{name}={values} holds {twice[0]!r} twice; name it once")


def check_keys(owner: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    """Check that a mapping of a config has known keys only.

    Raises:
        ValueError: naming the first unknown key, and the nearest known one.
    """
    for name in given:
        if name not in known:
            raise ValueError(
                f"{owner} has no key {name!r}{did_you_mean(name, known)}; its keys are "
                f"{', '.join(known)}"
            )
