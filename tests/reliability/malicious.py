"""Files that run code when they are unpickled, imported or rendered, opened every way there is.

    python tests/reliability/malicious.py      # from disk and from URLs; 2 minutes

Each file carries a payload that makes a marker file. An attempt is right if there is no marker, and
if the file was either refused in one line of ours or read without what it carries.
"""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS.parent), str(_TESTS / "support")]  # this tree, not an installed one

import lightning.pytorch as pl
import pyarrow
import pyarrow.parquet
import torch
import yaml
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from rows import Row, run
from runs import TEXT, make_data, make_module, make_trainer, write_model

from prunelight import Plan, load
from prunelight.callbacks import ShortGPT
from prunelight.cli import main
from prunelight.data.sources import read_documents
from prunelight.one_line_errors import our_error
from prunelight.recovery.distillation.objective import Distillation
from prunelight.run.strategies import FSDP2Strategy
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule


class Payload:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@dataclass
class Scene:
    """A folder with a good model, and with what the attempts write; served as `url`."""

    folder: Path
    url: str

    @property
    def marker(self) -> Path:
        return self.folder / "marker"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def copy_of_model(self, name: str) -> Path:
        """Return a directory with the good model, to be spoiled."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return Path(shutil.copytree(self.model, self.folder / name))

    def url_of(self, path: Path) -> str:
        return f"{self.url}/{path.relative_to(self.folder)}"

    def code(self) -> str:
        return f"import os\nos.mkdir({str(self.marker)!r})\n"


@contextlib.contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """Serve a folder that holds a good model."""
    write_model(folder / "model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Scene(folder, f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        server.server_close()


# --- checkpoints -----------------------------------------------------------------------------


def _saved(at: Scene, name: str, content: Any, **how: Any) -> Path:
    if isinstance(content, dict):
        content["pytorch-lightning_version"] = "2.6.0"
    torch.save(content, at.folder / name, **how)
    return at.folder / name


def beside_weights(at: Scene) -> Path:
    return _saved(at, "beside.ckpt", {"state_dict": {}, "extra": Payload(at.marker)})


def in_optimizer(at: Scene) -> Path:
    content = {"state_dict": {}, "optimizer_states": [{"state": Payload(at.marker)}]}
    return _saved(at, "optimizer.ckpt", content)


def as_hyper_parameters(at: Scene) -> Path:
    content = {"state_dict": {}, "hyper_parameters": Payload(at.marker)}
    return _saved(at, "hyper.ckpt", content)


def legacy_format(at: Scene) -> Path:
    content = {"state_dict": {}, "extra": Payload(at.marker)}
    return _saved(at, "legacy.ckpt", content, _use_new_zipfile_serialization=False)


def bare_pickle(at: Scene) -> Path:
    path = at.folder / "bare.ckpt"
    path.write_bytes(pickle.dumps(Payload(at.marker)))
    return path


def whole_module(at: Scene) -> Path:
    module = torch.nn.Linear(1, 1)
    module.extra = Payload(at.marker)
    return _saved(at, "module.pt", module)


CHECKPOINTS = (
    beside_weights,
    in_optimizer,
    as_hyper_parameters,
    legacy_format,
    bare_pickle,
    whole_module,
)


def _unpickle(path: Path) -> None:
    torch.load(path, weights_only=False)


def naming_code(at: Scene) -> Path:
    """Plain data alone: arguments that name a model with code, and say that it is trusted."""
    spoiled = with_own_class(at)
    arguments = {
        "name": str(spoiled),
        "trust_remote_code": True,
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
    metadata = {"base": str(spoiled), "fingerprint": "x", "recovery": "lora", "zeros": "not_kept"}
    metadata |= {"quantization": {"kind": "none"}, "format": 2, "tokens_seen": 0, "masks": None}
    content = {"state_dict": {}, "hyper_parameters": arguments, "prunelight": metadata}
    return _saved(at, "naming.ckpt", content)


def sharded_directory(at: Scene) -> Path:
    path = at.folder / "sharded.ckpt"
    path.mkdir(exist_ok=True)
    for name in (".metadata", "meta.pt"):
        (path / name).write_bytes(pickle.dumps(Payload(at.marker)))
    return path


# --- how checkpoints are opened --------------------------------------------------------------


class OwnModule(pl.LightningModule):
    """A module of the user's own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model, self.tokenizer = load(name)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer_verb(verb: str, at: Scene, path: str, *, own: bool = False, **how: Any) -> None:
    run_folder = at.folder / "run"
    shutil.rmtree(run_folder, ignore_errors=True)
    name = str(at.model)
    data = make_data(name, at.folder)
    trainer = make_trainer(run_folder, ShortGPT(num_layers=2), **how)
    module = OwnModule(name) if own else make_module(name)
    if verb == "predict":
        trainer.predict(module, data.val_dataloader(), ckpt_path=path)
    else:
        getattr(trainer, verb)(module, data, ckpt_path=path)


def _command(verb: str, at: Scene, path: str) -> None:
    sources = [f"--data.{role}={at.folder}/text.txt" for role in ("train", "validation")]
    trainer = {"accelerator": "cpu", "default_root_dir": f"{at.folder}/run", "logger": "false"}
    options = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    _prunelight(
        verb, f"--model.name={at.model}", "--data.seq_len=32", *sources, *options, path=path
    )


def _prunelight(*arguments: str, path: str = "") -> None:
    """Run the command in this process; its line of error becomes a ValueError."""
    given, errors = sys.argv, io.StringIO()
    try:
        sys.argv = ["prunelight"]
        with contextlib.redirect_stderr(errors):
            main([*arguments, *([f"--ckpt_path={path}"] if path else [])])
    except SystemExit as stop:
        told = stop.code if isinstance(stop.code, str) else errors.getvalue().strip()
        raise Refused(told) from None
    finally:
        sys.argv = given


class Refused(Exception):
    """The command line ended in these lines."""


READERS: dict[str, Callable[[Scene, str], Any]] = {
    "load_from_checkpoint": lambda at, path: RecoveryModule.load_from_checkpoint(
        path, name=str(at.model)
    ),
    "an open file": lambda at, path: RecoveryModule.load_from_checkpoint(
        Path(path).open("rb"),  # noqa: SIM115
        name=str(at.model),
    ),
    "fsdp2": lambda at, path: FSDP2Strategy().load_checkpoint(path),
}
VERBS: dict[str, Callable[[Scene, str], Any]] = {
    **{f"Trainer.{verb}": partial(_trainer_verb, verb) for verb in ("fit", "validate")},
    **{f"Trainer.{verb}": partial(_trainer_verb, verb) for verb in ("test", "predict")},
    "own module, fit": partial(_trainer_verb, "fit", own=True),
    "own module, validate": partial(_trainer_verb, "validate", own=True),
    "asynchronous files": lambda at, path: _trainer_verb(
        "validate", at, path, plugins=[AsyncCheckpointIO()]
    ),
    **{f"prunelight {verb}": partial(_command, verb) for verb in ("fit", "validate", "test")},
}


# --- models, tokenizers, teachers ------------------------------------------------------------


def _without_weights(at: Scene, name: str) -> Path:
    spoiled = at.copy_of_model(name)
    (spoiled / "model.safetensors").unlink()
    return spoiled


def pickled_weights(at: Scene) -> Path:
    spoiled = _without_weights(at, "pickled-weights")
    weights = {"lm_head.weight": Payload(at.marker)}
    torch.save(weights, spoiled / "pytorch_model.bin")
    return spoiled


def legacy_weights(at: Scene) -> Path:
    spoiled = _without_weights(at, "legacy-weights")
    weights = {"lm_head.weight": Payload(at.marker)}
    torch.save(weights, spoiled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return spoiled


def sharded_weights(at: Scene) -> Path:
    spoiled = _without_weights(at, "sharded-weights")
    torch.save({"lm_head.weight": Payload(at.marker)}, spoiled / "part.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "part.bin"}}
    (spoiled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return spoiled


def pickle_called_safetensors(at: Scene) -> Path:
    spoiled = at.copy_of_model("called-safetensors")
    (spoiled / "model.safetensors").write_bytes(pickle.dumps(Payload(at.marker)))
    return spoiled


def pickle_called_gguf(at: Scene) -> Path:
    path = at.folder / "called.gguf"
    path.write_bytes(pickle.dumps(Payload(at.marker)))
    return path


def with_own_class(at: Scene) -> Path:
    spoiled = at.copy_of_model("own-class")
    config = json.loads((spoiled / "config.json").read_text())
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    config |= {"auto_map": classes, "model_type": "evil", "architectures": ["EvilForCausalLM"]}
    (spoiled / "config.json").write_text(json.dumps(config))
    (spoiled / "evil.py").write_text(at.code())
    return spoiled


def with_own_tokenizer(at: Scene) -> Path:
    spoiled = at.copy_of_model("own-tokenizer")
    path = spoiled / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    config["tokenizer_class"] = "EvilTokenizer"
    path.write_text(json.dumps(config))
    (spoiled / "evil.py").write_text(at.code())
    return spoiled


def with_own_generate(at: Scene) -> Path:
    spoiled = at.copy_of_model("own-generate")
    (spoiled / "custom_generate").mkdir()
    (spoiled / "custom_generate" / "generate.py").write_text(
        f"{at.code()}\ndef generate(model, **given): return None\n"
    )
    return spoiled


def with_adapter(at: Scene) -> Path:
    spoiled = at.copy_of_model("adapter")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (spoiled / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"lora": Payload(at.marker)}, spoiled / "adapter_model.bin")
    return spoiled


def with_kernel_of_hub(at: Scene) -> Path:
    spoiled = at.copy_of_model("kernel")
    config = json.loads((spoiled / "config.json").read_text())
    (spoiled / "config.json").write_text(json.dumps({**config, "attn_implementation": "evil/it"}))
    return spoiled


def with_template(at: Scene) -> Path:
    spoiled = at.copy_of_model("template")
    escape = "{{ cycler.__init__.__globals__.os.mkdir('" + str(at.marker) + "') }}"
    path = spoiled / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": escape}))
    return spoiled


MODELS = (
    pickled_weights,
    legacy_weights,
    sharded_weights,
    pickle_called_safetensors,
    pickle_called_gguf,
    with_own_class,
    with_own_tokenizer,
    with_own_generate,
    with_adapter,
    with_kernel_of_hub,
    with_template,
)


def _as_model(at: Scene, name: str) -> None:
    load(name)


def _as_teacher(at: Scene, name: str) -> None:
    shutil.rmtree(at.folder / "run", ignore_errors=True)
    module = make_module(str(at.model), loss="kd", distillation=Distillation(name=name))
    make_trainer(at.folder / "run").fit(module, make_data(str(at.model), at.folder))


def _as_tokenizer(at: Scene, name: str) -> None:
    rows = [{"prompt": "Hello?", "response": "Hello."}] * 4
    (at.folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    TextDataModule(name, train=str(at.folder / "chat.jsonl"), seq_len=16).examples("train")


def _as_model_of_a_run(at: Scene, name: str) -> None:
    shutil.rmtree(at.folder / "run", ignore_errors=True)
    data = make_data(str(at.model), at.folder)
    make_trainer(at.folder / "run", ShortGPT(num_layers=2)).fit(make_module(name), data)


USES_OF_MODELS: dict[str, Callable[[Scene, str], Any]] = {
    "model": _as_model,
    "tokenizer": _as_tokenizer,
    "teacher": _as_teacher,
    "model of a run": _as_model_of_a_run,
}


# --- datasets, plans, configs ----------------------------------------------------------------


def script(at: Scene) -> Path:
    folder = at.folder / "evil"
    folder.mkdir(exist_ok=True)
    (folder / "evil.py").write_text(at.code())
    return folder


def pickled_rows(at: Scene) -> Path:
    path = at.folder / "train.pkl"
    path.write_bytes(pickle.dumps(Payload(at.marker)))
    return path


def pickle_called_jsonl(at: Scene) -> Path:
    path = at.folder / "rows.jsonl"
    path.write_bytes(pickle.dumps(Payload(at.marker)))
    return path


def pickled_column(at: Scene) -> Path:
    """A table whose column has a type that older versions of pyarrow unpickle."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(at.marker)),
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=metadata)
    table = pyarrow.table([pyarrow.array([TEXT])], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, at.folder / "rows.parquet")
    return at.folder / "rows.parquet"


DATASETS = (script, pickled_rows, pickle_called_jsonl, pickled_column)


def _as_dataset(at: Scene, source: str) -> None:
    read_documents(source)


def _as_named_dataset(at: Scene, source: str) -> None:
    """Name the folder or kind of file as if it were a dataset of the hub."""
    before = Path.cwd()
    os.chdir(at.folder)
    try:
        read_documents("pandas" if source.endswith(".pkl") else f"{Path(source).name}:default")
    finally:
        os.chdir(before)


def tagged_config(at: Scene) -> Path:
    path = at.folder / "evil.yaml"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{at.marker}']\n")
    return path


def pickled_plan(at: Scene) -> Path:
    path = at.folder / "plan.json"
    path.write_bytes(pickle.dumps(Payload(at.marker)))
    return path


# --- attempts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One file, opened one way, from one place."""

    kind: str
    name: str
    make: Callable[[Scene], Path]
    use: Callable[[Scene, str], Any]
    place: str = "disk"  # or http, file, chain

    def target(self, at: Scene) -> str:
        path = self.make(at)
        return {
            "disk": str(path),
            "http": at.url_of(path),
            "file": path.as_uri(),
            "chain": f"simplecache::{at.url_of(path)}",
        }[self.place]


def _of(kind: str, makers: Any, uses: Any, places: Any) -> Iterator[Attempt]:
    for make in makers:
        for name, use in uses.items():
            for place in places:
                label = f"{make.__name__}, {name}, {place}"
                yield Attempt(kind, label, make, use, place)


def attempts() -> list[Attempt]:
    """All of them; the first checkpoint goes through every verb, the others through the readers."""
    disk = {name: READERS[name] for name in ("an open file",)}
    urls = {name: use for name, use in READERS.items() if name not in disk}
    whole = {"load_from_checkpoint": READERS["load_from_checkpoint"]}
    # A module of the user's own loads what fits it; it has no arguments that name code.
    verbs = {name: use for name, use in VERBS.items() if "own module" not in name}
    both = ("disk", "http")
    made = [
        *_of("checkpoints", CHECKPOINTS, urls, ("disk", "http", "file", "chain")),
        *_of("checkpoints", CHECKPOINTS, disk, ("disk",)),
        *_of("checkpoints", (beside_weights,), VERBS, both),
        *_of("checkpoints", (naming_code,), {**whole, **verbs}, both),
        *_of("checkpoints", (sharded_directory,), {**urls, **VERBS}, ("disk",)),
        *_of("models, tokenizers, teachers", MODELS, USES_OF_MODELS, both),
        *_of("datasets", DATASETS, {"source": _as_dataset}, ("disk", "http", "file", "chain")),
        *_of("datasets", DATASETS[:2], {"named": _as_named_dataset}, ("disk",)),
    ]
    config = {"--config": lambda at, path: _prunelight("fit", "--config", path)}
    made += _of("configs and plans", (tagged_config,), config, both)
    made += _of("configs and plans", (pickled_plan,), {"Plan.load": _load_plan}, ("disk",))
    return made


def _load_plan(at: Scene, path: str) -> None:
    Plan.load(path)


def outcome(attempt: Attempt, at: Scene) -> str:
    """Return what is wrong with the outcome of an attempt, "" if nothing is."""
    if at.marker.exists():
        at.marker.rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = _told(attempt, at)
    if at.marker.exists():
        at.marker.rmdir()
        return "the payload ran"
    return told


def _told(attempt: Attempt, at: Scene) -> str:
    target = attempt.target(at)
    try:
        attempt.use(at, target)
    except Refused as refusal:
        text = str(refusal)
    except Exception as error:
        ours = our_error(error)
        if ours is None:
            return f"an error of others: {type(error).__name__}: {error}"
        text = str(ours)
    else:
        return ""
    if "weights_only" in text:
        return f"advises to unpickle: {text}"
    return f"more than a line: {text}" if "\n" in text else ""


# --- the payloads are live -------------------------------------------------------------------


def detonators() -> list[tuple[str, Callable[[Scene], Any]]]:
    """Ways to open files that do run the payload: without them the attempts prove nothing."""

    def trusting(make: Callable[[Scene], Path]) -> Callable[[Scene], Any]:
        return lambda at: load(str(make(at)), trust_remote_code=True)

    def unpickling(make: Callable[[Scene], Path], file: str) -> Callable[[Scene], Any]:
        return lambda at: _unpickle(make(at) / file)

    return [
        *((make.__name__, partial(_detonate_checkpoint, make)) for make in CHECKPOINTS),
        ("with_own_class", trusting(with_own_class)),
        ("with_own_tokenizer", trusting(with_own_tokenizer)),
        ("with_own_generate", trusting(with_own_generate)),
        ("pickled_weights", unpickling(pickled_weights, "pytorch_model.bin")),
        ("legacy_weights", unpickling(legacy_weights, "pytorch_model.bin")),
        ("sharded_weights", unpickling(sharded_weights, "part.bin")),
        ("with_adapter", unpickling(with_adapter, "adapter_model.bin")),
        ("pickled_rows", lambda at: pickle.loads(pickled_rows(at).read_bytes())),
        ("tagged_config", lambda at: yaml.unsafe_load(tagged_config(at).read_text())),
        ("script", lambda at: exec((script(at) / "evil.py").read_text(), {})),
    ]


def _detonate_checkpoint(make: Callable[[Scene], Path], at: Scene) -> None:
    path = make(at)
    if make is bare_pickle:
        pickle.loads(path.read_bytes())
    else:
        _unpickle(path)


def measure(options: Namespace) -> list[Row]:
    """Try all."""
    rows: dict[tuple[str, str], list[str]] = {}
    with tempfile.TemporaryDirectory() as folder, scene(Path(folder)) as at:
        for attempt in attempts():
            place = "disk" if attempt.place == "disk" else "URL"
            fault = outcome(attempt, at)
            rows.setdefault((attempt.kind, place), []).append(fault)
            if fault:
                print(attempt.name, fault)
    return [
        Row(f"malicious {kind} from {place}, not executed", len(faults), faults.count(""))
        for (kind, place), faults in rows.items()
    ]


if __name__ == "__main__":
    run("malicious", measure)
