"""Plain sentences on what a pruning gains here, and why."""

import pytest
import torch
from tiny import tiny_model

from prunelight.evaluation.serving.verdicts import hardware, verdicts, zeros_pattern
from prunelight.models.families.matrices import matrices


def cost(parameters=100, nonzeros=100, place="CPU, Some 3000", pattern=None, layers=30, **facts):
    return {
        "hardware": place,
        "packed": False,
        "num_layers": layers,
        "zeros_pattern": pattern,
        "shape": {"parameters": parameters, "nonzeros": nonzeros, "cache_bytes": 10 * layers},
        **facts,
    }


@pytest.mark.parametrize(
    ("place", "pattern", "expected"),
    [
        (
            "CPU, Some 3000",
            None,
            "50.0 % of the weights are zero. This machine (CPU, Some 3000) gains no speed and no "
            "memory: zeros without a pattern are stored and multiplied like other values.",
        ),
        (
            "CPU, Some 3000",
            "2:4",
            "a runtime that uses them. This machine (CPU, Some 3000) has none: it gains nothing.",
        ),
        ("Tesla T4, compute capability 7.5", "2:4", "is older: it gains nothing."),
        ("NVIDIA A100, compute capability 8.0", "2:4", "transformers does not: here it gains"),
    ],
)
def test_zeros_are_told_for_what_is_here(place, pattern, expected):
    (line,) = verdicts(cost(nonzeros=50, place=place, pattern=pattern), cost(place=place))
    assert expected in line


def test_a_smaller_shape_is_told_against_its_ideal():
    factors = {
        "prefill_tokens_per_second": {"measured": [1.21, 1.2, 1.3], "ideal": 1.249},
        "decode_tokens_per_second": {"measured": [1.22, 1.2, 1.3], "ideal": 1.19},
    }
    (line,) = verdicts(cost(80, 80, layers=24, ratios={"1": factors}), cost())
    assert line == (
        "24 of 30 layers: prefill 1.21x of an ideal 1.25x, decode 1.22x of an ideal 1.19x, "
        "cache 80.0 % as large."
    )
    (narrow,) = verdicts(cost(80, 80, ratios={"1": factors, "8": factors}), cost())
    assert narrow.startswith("80.0 % of the parameters: prefill 1.21x")
    assert narrow.endswith("decode 1.22x of an ideal 1.19x at batch 8.")


def test_zeros_and_layers_get_a_sentence_each_and_the_dense_model_none():
    assert len(verdicts(cost(80, 40, layers=24), cost())) == 2
    assert verdicts(cost(), cost()) == [
        "No weight was removed: this model costs what the dense one costs."
    ]
    assert verdicts(cost(), None) == []


def test_a_few_zeros_that_the_dense_model_has_too_are_no_news():
    assert "zero" not in verdicts(cost(nonzeros=95), cost(nonzeros=95))[0]


def test_a_pattern_is_found_where_all_sparse_matrices_have_it():
    model = tiny_model()
    assert zeros_pattern(model) is None
    for matrix in matrices(model).values():
        matrix.parameter.data[:, ::2] = 0
    assert zeros_pattern(model) == "2:4"
    first = next(iter(matrices(model).values())).parameter.data
    first[:] = torch.arange(first.shape[1]) % 8 < 4  # half of the values, four in a row
    assert zeros_pattern(model) is None


def test_a_model_whose_matrices_are_not_found_has_no_pattern():
    model = tiny_model()
    model.config.model_type = "unheard of"
    model.extra = torch.nn.ModuleList([torch.nn.Identity()] * model.config.num_hidden_layers)
    assert zeros_pattern(model) is None


def test_the_processor_has_a_name():
    assert hardware(torch.device("cpu")).startswith("CPU, ")
    assert len(hardware(torch.device("cpu"))) > len("CPU, ")
    assert hardware(torch.device("meta")) == "meta"
