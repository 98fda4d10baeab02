"""One cell of the sweep: prune a tiny model of a family in one way, and classify what happens.

A cell is "works"; "refused" by one line of ours before any forward; "late" if an error comes after
the first forward; "silent" if the numbers are wrong without an error; "ugly" if the error is not
ours or says too little; "untestable" if transformers itself fails on the dense model.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from reference import (
    cache_agrees,
    decoder_list,
    difference,
    gates,
    generate,
    logits,
    matrices_of_layers,
    skip_by_hand,
    watch,
)
from tiny_families import FIRST_SPECIAL_TOKEN, VOCABULARY, tiny_family
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import prunelight
import prunelight.callbacks
from prunelight.callbacks import DLP, ShortGPT, SliceGPT, WeightPruning, WidthPruning
from prunelight.recovery.lora import LoRA, attach_lora, merge_lora

PACKAGE = tuple(str(Path(m.__file__).parent) for m in (prunelight, prunelight.callbacks))
NUM_REMOVED = 2
SPARSITY = 0.5
# Sums in another order, and products of merged weights, are rounded differently.
CLOSE = 1e-3
# A row of 8 or 32 weights gets a whole number of zeros.
ROUNDED = 0.04


def text(seed: int = 0, num_samples: int = 4, seq_len: int = 16) -> Tensor:
    """Random ids without those of images, sounds and padding, (samples, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, FIRST_SPECIAL_TOKEN - 16, (num_samples, seq_len), generator=generator)


WINDOWS = text(num_samples=8)
HELD_OUT = text(1)


@dataclass(frozen=True)
class Cell:
    """What a kind of pruning does to a family."""

    family: str
    kind: str
    outcome: str
    reason: str = ""


class Wrong(Exception):
    """The numbers are wrong although nothing was raised."""


class Untestable(Exception):
    """The dense model of transformers cannot give the reference."""


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids fit the vocabulary of the tiny models."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))]
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@lru_cache(maxsize=1)
def dense_model(family: str) -> Any:
    """The dense model of a family; those who change it take a copy."""
    return tiny_family(family)


@lru_cache(maxsize=1)
def dense_cache_agrees(family: str) -> bool:
    """Whether the dense model generates with its cache what it generates without.

    Where attention picks positions by a score, rounding decides between equal ones: not compared.
    """
    if watch(dense_model(family), HELD_OUT).picks_positions:
        return False
    try:
        return cache_agrees(copy.deepcopy(dense_model(family)), HELD_OUT[:2])
    except Exception:
        return False


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).strip().split("\n")[0][:300]


class Forwards:
    """Counts the forwards of modules with weights in memory while it is entered."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Forwards:
        def hook(module: nn.Module, args: Any) -> None:
            parameter = next(module.parameters(), None)
            if parameter is not None and parameter.device.type != "meta":
                self.count += 1

        self._handle = nn.modules.module.register_module_forward_pre_hook(hook)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


def is_ours(error: BaseException) -> bool:
    """Whether an error is one line of the package, of a kind that callers expect."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    words = first_line(error)
    return (
        type(error) in (TypeError, ValueError)
        and last.filename.startswith(PACKAGE)
        and "\n" not in str(error).strip()
        and len(words.split()) >= 5
    )


def blames_nothing_set(words: str) -> bool:
    """Whether an error blames what cannot be at fault.

    The sweep sets no LoRA targets, and the dense models read its windows.
    """
    return "lora.targets" in words or "seq_len=" in words


def run_cell(family: str, kind: str) -> Cell:
    """Prune the tiny model of a family in one way and classify the outcome."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory, quiet():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        dense_model(family)
        with Forwards() as forwards:
            try:
                check = KINDS[kind](family, Path(directory))
            except Exception as error:
                cell = classify(family, kind, error, forwards.count)
                return replace(cell, reason=cell.reason.replace(directory, "DIRECTORY"))
        try:
            check()
        except Wrong as error:
            return Cell(family, kind, "silent", str(error))
        except Untestable as error:
            return Cell(family, kind, "untestable", str(error))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            words = f"{type(error).__name__}: {first_line(error)} ({where.filename}:{where.lineno})"
            return Cell(family, kind, "late", f"what was saved fails: {words}")
    return Cell(family, kind, "works")


def classify(family: str, kind: str, error: Exception, forwards: int) -> Cell:
    """Say what an error is worth that pruning or saving raised."""
    words = first_line(error)
    if is_ours(error) and not forwards and not blames_nothing_set(words):
        return Cell(family, kind, "refused", words)
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}"
    words = f"{type(error).__name__}: {words} ({place})"
    return Cell(family, kind, "late" if forwards else "ugly", words)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what transformers prints on generation out of the output."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield


def expect(condition: bool, words: str) -> None:
    """Raise Wrong with these words unless the condition holds."""
    if not condition:
        raise Wrong(words)


def same_logits(found: Tensor, expected: Tensor, words: str, close: float = CLOSE) -> None:
    """Expect equal logits."""
    gap = difference(found, expected)
    expect(gap <= close, f"{words}: logits differ by {gap:.2g} of the largest")


def saved_and_reloaded(model: Any, plan: Any, directory: Path) -> Any:
    """Save a model by the package and load it by transformers alone."""
    prunelight.save(model, tokenizer(), directory / "out", plan=plan)
    return AutoModelForCausalLM.from_pretrained(directory / "out", dtype=torch.float32)


def check_reloaded(family: str, model: Any, reloaded: Any) -> None:
    """Expect the same numbers from a model and from what was loaded, cached or not."""
    expect(type(reloaded) is type(model), f"reloaded as {type(reloaded).__name__}")
    same_logits(logits(reloaded, HELD_OUT), logits(model, HELD_OUT), "reloaded", 1e-6)
    if dense_cache_agrees(family):
        expect(cache_agrees(reloaded, HELD_OUT[:2]), "cached and uncached generation differ")
        _, found = generate(reloaded, HELD_OUT[:2], use_cache=True)
        _, expected = generate(model, HELD_OUT[:2], use_cache=True)
        same_logits(found, expected, "reloaded and generating")


def pruned(family: str, method: Any, directory: Path, **options: Any) -> tuple[Any, Any, Any]:
    """Plan, apply, save and reload; the plan, the model and the reloaded one."""
    model = copy.deepcopy(dense_model(family))
    plan = method.plan(model, WINDOWS)
    model = prunelight.apply(model, plan, WINDOWS)
    return plan, model, saved_and_reloaded(model, plan, directory)


Check = Callable[[], None]


def depth(family: str, directory: Path) -> Check:
    """Two layers removed: what is left is the dense model that skips them."""
    plan, model, reloaded = pruned(family, ShortGPT(num_layers=NUM_REMOVED), directory)

    def check() -> None:
        removed = plan.steps[0].layers
        expect(len(removed) == NUM_REMOVED, f"removed {len(removed)} layers, not {NUM_REMOVED}")
        try:
            expected = logits(skip_by_hand(dense_model(family), HELD_OUT, removed), HELD_OUT)
        except Exception as error:
            raise Untestable(
                f"its layers cannot be skipped by hand: {first_line(error)}"
            ) from error
        if difference(logits(dense_model(family), HELD_OUT), expected) < 1e-3:
            raise Untestable(f"layers {list(removed)} of the tiny model do not matter")
        same_logits(logits(model, HELD_OUT), expected, f"without layers {list(removed)}")
        check_reloaded(family, model, reloaded)

    return check


def transformers_loads(family: str, directory: Path) -> bool:
    """Whether transformers reads back what it wrote itself."""
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    except Exception:
        return False
    return difference(logits(model, HELD_OUT), logits(dense_model(family), HELD_OUT)) < CLOSE


def loading(family: str, directory: Path) -> Check:
    """A directory of transformers, read by the package."""
    dense = copy.deepcopy(dense_model(family))
    dense.save_pretrained(directory / "dense")
    tokenizer().save_pretrained(directory / "dense")
    try:
        model, _ = prunelight.load(directory / "dense")
    except (TypeError, ValueError) as error:
        if not dense.config.sub_configs and transformers_loads(family, directory / "dense"):
            raise RuntimeError(f"refused although transformers loads it: {error}") from error
        raise

    def check() -> None:
        same_logits(logits(model, HELD_OUT), logits(dense_model(family), HELD_OUT), "loaded", 1e-6)

    return check


def slicing(family: str, directory: Path) -> Check:
    """A quarter of the hidden width sliced off; all of it kept changes nothing."""
    _, model, reloaded = pruned(family, SliceGPT(0.25), directory)

    def check() -> None:
        whole = copy.deepcopy(dense_model(family))
        plan = SliceGPT(0.0).plan(whole, WINDOWS)
        whole = prunelight.apply(whole, plan, WINDOWS)
        same_logits(
            logits(whole, HELD_OUT), logits(dense_model(family), HELD_OUT), "rotated, not sliced"
        )
        check_reloaded(family, model, reloaded)

    return check


def width(family: str, directory: Path) -> Check:
    """A quarter of the neurons and half of the key-value groups removed."""
    method = WidthPruning(neuron_ratio=0.25, head_ratio=0.5, multiple=8, correction=False)
    plan, model, reloaded = pruned(family, method, directory)

    def check() -> None:
        expected = logits(without_inputs(dense_model(family), model, plan.steps[0]), HELD_OUT)
        same_logits(logits(model, HELD_OUT), expected, "without the heads and neurons")
        check_reloaded(family, model, reloaded)

    return check


@torch.no_grad()
def without_inputs(dense: Any, narrow: Any, step: Any) -> Any:
    """A dense copy whose output projections read zeros where the narrow model has no input."""
    dense = copy.deepcopy(dense)
    path, _ = decoder_list(dense, HELD_OUT)
    before = matrices_of_layers(dense, HELD_OUT)
    after = dict(narrow.named_parameters())
    changed = 0
    for name, matrix in before.items():
        module = dense.get_submodule(name.rpartition(".")[0])
        if name not in after or matrix.ndim != 2 or name.rpartition(".")[2] != "weight":
            continue
        axis = 1 if isinstance(module, nn.Linear) else 0  # a Conv1D holds (inputs, outputs)
        wide, left = matrix.shape[axis], after[name].shape[axis]
        if wide == left or matrix.shape[1 - axis] != after[name].shape[1 - axis]:
            continue
        layer = name[len(path) + 1 :].split(".")[0]
        kept = step.neurons if 4 * left == 3 * wide else step.heads
        groups = len(kept[layer]) * wide // left
        block = wide // groups
        mask = torch.zeros(groups, block)
        mask[list(kept[layer])] = 1
        matrix.mul_(mask.flatten() if axis == 1 else mask.flatten()[:, None])
        changed += 1
    if not changed:
        raise Untestable("no output projection became narrower")
    return dense


def sparsity(method: Any, family: str, directory: Path) -> Check:
    """Zeros in half of what multiplies hidden states, and none in what picks experts.

    The plan may name weights that stay dense, up to half of them, and what is left of the whole.
    """
    plan, model, reloaded = pruned(family, method, directory)

    def check() -> None:
        dense = dense_model(family)
        path, _ = decoder_list(dense, HELD_OUT)
        before, after = (matrices_of_layers(x, HELD_OUT) for x in (dense, model))
        gate_names = gates(dense, WINDOWS)
        factors = {n for n in watch(dense, WINDOWS).factors if n in before}
        named = {x for names in plan.found.get("stays_dense", {}).values() for x in names}
        new = {n: int(((x == 0) & (before[n] != 0)).sum()) for n, x in after.items()}
        stay = {n for n in before if n[len(path) + 1 :].partition(".")[2] in named and not new[n]}
        filled = sorted({nameless(n) for n in gate_names if new[n]})
        expect(not filled, f"zeros in {filled}, which picks experts")
        chosen = factors - gate_names - stay
        missed = sorted({nameless(n) for n in chosen if not new[n]})
        expect(not missed, f"no zeros in {missed}, which the plan does not name")
        share = zero_share(after, chosen)
        expect(abs(share - SPARSITY) < ROUNDED, f"{share:.1%} zeros in what was chosen")
        possible = number(before, chosen) / number(before, factors - gate_names)
        left_out = sorted({nameless(n) for n in factors - gate_names - chosen})
        expect(possible > 0.5, f"only {possible:.0%} of the matrices can get zeros: not {left_out}")
        promised = SPARSITY * plan.found.get("share_of_decoder_weights", 1.0)
        true = zero_share(after, set(after))
        expect(
            abs(true - promised) < ROUNDED,
            f"{true:.1%} of all weights, the plan says {promised:.1%}",
        )
        check_reloaded(family, model, reloaded)

    return check


def zeros(weight: Tensor) -> int:
    """The number of zeros of a weight."""
    return weight.numel() - int(weight.count_nonzero())


def number(weights: dict[str, Tensor], names: set[str]) -> int:
    """How many weights have these names."""
    return sum(weights[name].numel() for name in names)


def zero_share(weights: dict[str, Tensor], names: set[str]) -> float:
    """The share of zeros in the weights of these names."""
    return sum(zeros(weights[name]) for name in names) / number(weights, names)


def nameless(name: str) -> str:
    """A parameter's name with a star for each number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def next_token_loss(model: Any) -> Tensor:
    """The mean loss of the next tokens of the calibration windows."""
    output = model(input_ids=WINDOWS, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(output.flatten(0, 1), WINDOWS[:, 1:].flatten())


def has_gradient(parameter: Tensor) -> bool:
    """Whether a backward reached a parameter."""
    return parameter.grad is not None and bool(parameter.grad.any())


def idle_adapters(family: str, adapters: dict[str, Tensor]) -> set[str]:
    """The adapters without gradient whose matrix, alone or shared, gets one in the dense model."""
    model = copy.deepcopy(dense_model(family)).train()
    next_token_loss(model).backward()
    matrices = dict(model.named_parameters(remove_duplicate=False))
    owners = {name: matrices.get(adapted_matrix(name)) for name in adapters}
    learning = {id(owners[name]) for name, b in adapters.items() if has_gradient(b)}
    return {
        nameless(name)
        for name, matrix in owners.items()
        if matrix is not None and has_gradient(matrix) and id(matrix) not in learning
    }


def adapted_matrix(adapter: str) -> str:
    """The dense parameter of an adapter: ...q_proj.lora_B.default.weight -> ...q_proj.weight."""
    name = adapter.removeprefix("base_model.model.").replace(".base_layer", "")
    return name.split(".lora_B")[0] + ".weight"


def lora(family: str, directory: Path) -> Check:
    """The default adapters after a step of training and noise, merged, saved and reloaded."""
    torch.manual_seed(0)
    wrapped = attach_lora(copy.deepcopy(dense_model(family)), LoRA())
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    wrapped.train()
    next_token_loss(wrapped).backward()
    idle = idle_adapters(family, {n: p for n, p in trained.items() if "lora_B" in n})
    torch.optim.SGD(trained.values(), lr=0.5).step()
    with torch.no_grad():  # many steps more: one alone would drown in rounding
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    adapted = logits(wrapped, HELD_OUT)
    model = merge_lora(wrapped)
    reloaded = saved_and_reloaded(model, None, directory)

    def check() -> None:
        dense = dense_model(family)
        path, layers = decoder_list(dense, HELD_OUT)
        with_adapter = {n.split(f"{path}.", 1)[1].split(".")[0] for n in trained if f"{path}." in n}
        bare = [i for i in range(len(layers)) if str(i) not in with_adapter]
        expect(not bare, f"layers {bare} got no adapter")
        expect(not idle, f"the dense matrices get a gradient, their adapters none: {sorted(idle)}")
        same_logits(logits(model, HELD_OUT), adapted, "merged")
        expect(difference(adapted, logits(dense, HELD_OUT)) > 0.01, "the adapters change nothing")
        check_reloaded(family, model, reloaded)

    return check


KINDS: dict[str, Callable[[str, Path], Check]] = {
    "loading": loading,
    "depth": depth,
    "slicing": slicing,
    "width": width,
    "magnitude": lambda f, d: sparsity(WeightPruning(SPARSITY, solver="magnitude"), f, d),
    "wanda": lambda f, d: sparsity(WeightPruning(SPARSITY, solver="wanda"), f, d),
    "dlp": lambda f, d: sparsity(DLP(SPARSITY), f, d),
    "lora": lora,
}
