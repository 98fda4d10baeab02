"""Export of a saved model to the format of another program: check, write, read back, rename.

Nothing stays under the name of an export that was not compared in logits, or the record beside it
says so. The record, `export.json` in a directory and `NAME.export.json` beside a file, marks what
a later export may replace.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from prunelight.export.proving import Proof, check_bound, compare, proof_windows, source_logits
from prunelight.export.targets import (
    ROUNDS,
    TORCH_DTYPES,
    ExportOptions,
    NotReadableError,
    Rounding,
    Source,
    Target,
    find_target,
)
from prunelight.models.card.model_card import add_export_to_card
from prunelight.models.loading import check_hub, find_source, load, load_config
from prunelight.models.saving import MARKER
from prunelight.models.written_files import check_place
from prunelight.planning.fingerprints import library_versions, model_fingerprint
from prunelight.runtime.arguments import check_choice
from prunelight.runtime.files.atomic_files import (
    atomic_directory,
    atomic_replacement,
    check_writable,
    explaining_write_errors,
)

log = logging.getLogger(__name__)

RECORD = "export.json"
_FORMAT = 1


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes:
        path: of the file or directory.
        size_bytes: of it.
        proof: how far it is from its source; None where no engine could read it here.
        warnings: a sentence each.
    """

    path: Path
    size_bytes: int
    proof: Proof | None
    warnings: list[str]


def export(
    directory: str | Path,
    to: str,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    out: str | Path | None = None,
    engine_python: str | None = None,
    unproven: bool = False,
    rounding: Rounding | None = None,
) -> Export:
    """Write a saved model in the format of another program, and prove the result.

    Args:
        directory: a transformers directory, as `prunelight.save` writes it.
        to: "gguf", "ctranslate2", "decilm" or "gptq".
        dtype: of the weights, one of the target's; "auto" keeps that of the model.
        quantize: a quantization of the engine, such as "q4_k_m"; None for none.
        out: file or directory to write; None takes a name beside `directory`.
        engine_python: Python of another environment, which has the engine.
        unproven: write also where no engine is here to read the export.
        rounding: how "gptq" rounds the weights; None takes its defaults.

    Raises:
        ValueError: if `directory` is no model, the target cannot hold it, or an option is wrong.
        FileExistsError: if `out` exists and no export wrote it.
        ImportError: if a package is missing that writes the format.
        NotReadableError: if no engine is here to read the export, and `unproven` is False.
        RuntimeError: if the engine refuses the export, or computes other logits; nothing is kept.
    """
    target = find_target(to)
    source = open_source(directory)
    options = _options(target, source.config, dtype, quantize, engine_python, rounding)
    path = _place(target, source, options, out)
    warnings = target.check(source, options)
    readable = _check_reader(target, source, options, unproven)
    for warning in warnings:
        log.warning("%s", warning)
    model, tokenizer = load(source.directory, dtype="float32")
    with _replacing(target, path) as temporary:
        rewritten = target.write(source, model, tokenizer, temporary, options)
        proof = None
        if readable:
            windows = proof_windows(model, tokenizer, longest=target.longest_text(source))
            reading = target.read_back(source, temporary, windows, options)
            proof = compare(reading, source_logits(model, windows))
            what = f"the export of {source.directory} to {to} as {options.dtype}"
            if rewritten is not None:
                of_written = compare(reading, source_logits(rewritten.model, windows))
                check_bound(of_written, target.dtypes[options.dtype], what)
            elif options.quantize is None:
                check_bound(proof, target.dtypes[options.dtype], what)
        size = _size(temporary)
        facts = {
            "format": _FORMAT,
            "to": to,
            "file": path.name,
            "dtype": options.dtype,
            "quantize": options.quantize,
            "size_bytes": size,
            "proof": None if proof is None else asdict(proof),
            **({} if rewritten is None else {"rounding": rewritten.facts}),
            "warnings": warnings,
            "source": {"name": source.directory.name, "fingerprint": model_fingerprint(model)},
            "date": date.today().isoformat(),
            "versions": library_versions(),
        }
        if not target.suffix:
            _write_json(temporary / RECORD, facts)
    if target.suffix:
        with atomic_replacement(record_of(path)) as temporary:
            _write_json(temporary, facts)
    if rewritten is not None:
        log.info("%s", rewritten.line)
    _tell(path, size, proof)
    _tell_card(source.directory, to, options, path, proof)
    return Export(path, size, proof, warnings)


def open_source(directory: str | Path) -> Source:
    """Return the saved model of a directory; reads its config alone.

    Raises:
        ValueError: if the directory is no model with weights in safetensors.
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"{str(directory)!r} must be the directory of a saved model; to export another model, "
            "load it and save it first (prunelight.load, prunelight.save)"
        )
    source = check_hub(find_source(str(folder)))
    config = load_config(source)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{str(directory)!r} has no weights in safetensors (*.safetensors); load the model and "
            "save it again (prunelight.load, prunelight.save)"
        )
    return Source(folder, config)


def record_of(path: Path) -> Path:
    """Return where the record of an export stands: in a directory, or beside a file."""
    return path / RECORD if path.is_dir() else path.with_name(f"{path.name}.{RECORD}")


def _options(
    target: Target,
    config: PretrainedConfig,
    dtype: str,
    quantize: str | None,
    engine_python: str | None,
    rounding: Rounding | None,
) -> ExportOptions:
    """Return the options, with the dtype of the model for "auto"."""
    check_choice("dtype", dtype, ("auto", *target.dtypes))
    if rounding is not None and target.name != ROUNDS:
        raise ValueError(
            f"{_first_change(rounding)} has no effect on an export to {target.name}; leave it out, "
            f"or take --to {ROUNDS}"
        )
    if quantize is not None:
        if not target.quantizations:
            raise ValueError(
                f"quantize={quantize!r}: {target.name} has no quantization of its own; choose a "
                f"dtype of {', '.join(target.dtypes)}"
            )
        check_choice("quantize", quantize, target.quantizations)
    if engine_python is not None and shutil.which(engine_python) is None:
        raise ValueError(
            f"engine_python={engine_python!r} must be the Python of an environment, such as "
            "envs/engine/bin/python; there is no such program"
        )
    if dtype == "auto":
        own = str(getattr(config, "dtype", None)).removeprefix("torch.")
        names = (name for name, of_torch in TORCH_DTYPES.items() if of_torch == own)
        dtype = next((name for name in names if name in target.dtypes), "f32")
    if target.name == ROUNDS:
        rounding = rounding or Rounding()
        quantize = f"w{rounding.bits}a16"  # weights of so many bits, activations of 16
    return ExportOptions(dtype, quantize, engine_python, rounding)


def _first_change(rounding: Rounding) -> str:
    """Return the first field that is not the default, as NAME=VALUE; else the bits."""
    usual = asdict(Rounding())
    changed = [
        f"{name}={value!r}" for name, value in asdict(rounding).items() if value != usual[name]
    ]
    return (changed or [f"rounding with bits={rounding.bits}"])[0]


def _place(target: Target, source: Source, options: ExportOptions, out: str | Path | None) -> Path:
    """Return the path of the export, which may be written.

    Raises:
        ValueError: if it is the model itself, lies in it, or is a directory that must stay.
        FileExistsError: if it exists and no export wrote it.
    """
    name = f"{source.directory.resolve().name}-{options.quantize or options.dtype}"
    kind = target.suffix or f"-{target.name}"
    path = source.directory.resolve().parent / f"{name}{kind}" if out is None else Path(out)
    path = path.expanduser()
    if path.is_dir() and target.suffix:
        path = path / f"{name}{kind}"  # a folder to put the file in
    if source.directory.resolve() in (path.resolve(), *path.resolve().parents):
        raise ValueError(
            f"out={str(path)!r} lies in the directory of the model, whose files must stay as they "
            "were saved; give another place"
        )
    if target.suffix and path.suffix != target.suffix:
        raise ValueError(f"out={str(path)!r} must be a file that ends in {target.suffix}")
    if not target.suffix:
        check_place(path)
    if path.exists() and not _is_ours(path, target.name):
        raise FileExistsError(
            f"{path} exists, and no export to {target.name} wrote it (there is no record "
            f"{record_of(path).name}); choose another place with --out, or remove it"
        )
    check_writable(path.parent)
    return path


def _is_ours(path: Path, to: str) -> bool:
    """Return whether an export wrote a path, or it is an empty directory."""
    if path.is_dir() and not any(path.iterdir()):
        return True
    try:
        facts = json.loads(record_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and facts.get("to") == to


def _check_reader(target: Target, source: Source, options: ExportOptions, unproven: bool) -> bool:
    """Return whether the export can be read back here.

    Raises:
        NotReadableError: if it cannot, and an unproven export was not allowed.
    """
    try:
        target.check_reader(source, options)
    except NotReadableError as error:
        if not unproven:
            raise NotReadableError(f"{error}. Or pass --unproven true to write without") from error
        log.warning("THE EXPORT WILL NOT BE PROVEN: %s", error)
        return False
    return True


@contextmanager
def _replacing(target: Target, path: Path) -> Iterator[Path]:
    """Yield a temporary file or directory, which takes the place of `path` on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with explaining_write_errors(path):
        if target.suffix:
            with atomic_replacement(path) as temporary:
                yield temporary
        else:
            with atomic_directory(path) as temporary:
                yield temporary


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _tell(path: Path, size: int, proof: Proof | None) -> None:
    log.info("exported %s (%.1f MB)", path, size / 1e6)
    if proof is None:
        log.warning("NOT PROVEN HERE: no program has read %s; its record says so", path)
        return
    log.info("%s", proof.line())
    if proof.note:
        log.warning("%s", proof.note)


def _tell_card(
    directory: Path, to: str, options: ExportOptions, path: Path, proof: Proof | None
) -> None:
    """Name the export in the model card of its source, where prunelight saved that."""
    if not (directory / MARKER).is_file():
        return
    told = "not proven: no program has read it" if proof is None else proof.line()
    name = f"{to}, {options.quantize or options.dtype}"
    try:
        add_export_to_card(directory, name, f"`{path.name}`, {told}")
    except (OSError, ValueError) as error:  # such as a directory that may only be read
        log.warning("the export is not named in the card of %s: %s", directory, error)
