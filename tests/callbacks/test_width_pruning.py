"""WidthPruning by DLP's shares: widths of layers, and refusals; when outputs are corrected."""

import copy

import pytest
import reference_sparsity as reference
import torch
from own_models import lively
from tiny import NUM_LAYERS, tiny_model, token_windows
from uneven_models import uneven_model

import prunelight
from prunelight.callbacks import DLP, WidthPruning
from prunelight.models.families.own_classes.layer_widths import CLASSES
from prunelight.models.sizes import parameter_count

WINDOWS = token_windows()


@pytest.fixture(scope="module")
def model():
    """Read-only: planning changes nothing."""
    return uneven_model(intermediate_size=128)


def widths(plan):
    (step,) = plan.steps
    return [len(neurons) for neurons in step.neurons.values()]


@pytest.mark.parametrize("alpha", [None, 0.05, 0.3])
def test_widths_are_those_of_dlps_shares_rounded_to_a_block(model, alpha):
    method = WidthPruning(neuron_ratio=0.4, multiple=4, allocation="dlp", alpha=alpha)
    plan = method.plan(model, WINDOWS)
    scores = reference.layer_scores(model, WINDOWS)["median"]
    shares = reference.dlp(scores, [1] * NUM_LAYERS, 0.4, 0.15 if alpha is None else alpha)
    wanted = [128 * (1 - share) for share in reference.clipped(shares, [1] * NUM_LAYERS, 0.4)]
    assert all(abs(n - x) < 4 for n, x in zip(widths(plan), wanted, strict=True))
    assert all(n % 4 == 0 for n in widths(plan))
    assert sum(widths(plan)) == 4 * round(0.6 * 128 * NUM_LAYERS / 4)
    assert max(widths(plan)) - min(widths(plan)) > 8
    assert plan.found["layer_intermediate_sizes"] == widths(plan)


def test_layers_rank_as_they_do_by_dlps_shares_of_zeros(model):
    plan = WidthPruning(neuron_ratio=0.5, multiple=1, allocation="dlp").plan(model, WINDOWS)
    zeros = DLP(0.5).plan(model, WINDOWS)
    assert plan.scores["median"] == zeros.scores["median"]
    removed = [1 - width / 128 for width in widths(plan)]
    assert removed == pytest.approx(zeros.scores["sparsity"], abs=1 / 128)


def test_alpha_zero_leaves_the_stock_model_of_uniform_widths():
    models = []
    for arguments in ({"allocation": "dlp", "alpha": 0.0}, {}):
        method = WidthPruning(neuron_ratio=0.5, multiple=8, **arguments)
        plan = method.plan(uneven_model(intermediate_size=128), WINDOWS)
        models.append(prunelight.apply(uneven_model(intermediate_size=128), plan, WINDOWS))
    assert type(models[0]) is type(models[1]) is type(tiny_model())
    ours, uniform = (pruned.state_dict() for pruned in models)
    assert all(torch.equal(ours[name], uniform[name]) for name in uniform)


def test_layers_that_differ_get_a_class_of_ours_with_as_many_parameters_as_uniform_widths():
    counts = []
    for arguments in ({"allocation": "dlp"}, {}):
        method = WidthPruning(neuron_ratio=0.5, head_ratio=0.5, multiple=8, **arguments)
        plan = method.plan(uneven_model(intermediate_size=128), WINDOWS)
        pruned = prunelight.apply(uneven_model(intermediate_size=128), plan, WINDOWS)
        counts.append(parameter_count(pruned))
        assert (type(pruned) is CLASSES["llama"]) == bool(arguments)
    assert counts[0] == counts[1]


def test_every_layer_keeps_its_best_neurons(model):
    plan = WidthPruning(neuron_ratio=0.5, multiple=8, allocation="dlp").plan(model, WINDOWS)
    whole = WidthPruning(neuron_ratio=0.0, multiple=8).plan(model, WINDOWS)
    assert whole.scores["share_of_neurons_score_kept"] == pytest.approx([1.0] * NUM_LAYERS)
    shares = plan.scores["share_of_neurons_score_kept"]
    assert all(x > n / 128 for x, n in zip(shares, widths(plan), strict=True))


def test_an_alpha_that_is_too_large_is_clipped_and_said_in_one_line(model, caplog):
    method = WidthPruning(neuron_ratio=0.8, multiple=8, allocation="dlp", alpha=0.4)
    plan = method.plan(model, WINDOWS)
    assert caplog.text.count("alpha=0.4 pushes shares to remove to [") == 1
    assert "clipped, and the others adjusted to a ratio of 0.8" in caplog.text
    assert min(widths(plan)) == 8
    assert sum(widths(plan)) == 8 * round(0.2 * 128 * NUM_LAYERS / 8)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_other_families_get_widths_too(family):
    model = copy.deepcopy(lively(family))  # which other tests share
    method = WidthPruning(neuron_ratio=0.5, multiple=8, allocation="dlp", alpha=0.3)
    pruned = prunelight.apply(copy.deepcopy(model), method.plan(model, WINDOWS), WINDOWS)
    assert type(pruned) is CLASSES[family]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.1}, "alpha=0.1 has no effect with allocation='uniform'; set allocation='dlp'"),
        ({"alpha": 0.1, "allocation": "global"}, "alpha=0.1 has no effect with allocation='global"),
        ({"alpha": -0.1, "allocation": "dlp"}, "alpha=-0.1 must be at least 0"),
    ],
)
def test_an_alpha_out_of_range_or_without_effect_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WidthPruning(neuron_ratio=0.5, **arguments)


@pytest.mark.parametrize(
    ("family", "arguments", "corrected"),
    [
        ("llama", {}, True),
        ("llama", {"heal": "linear"}, False),
        ("llama", {"heal": "layer"}, False),
        ("llama", {"heal": "linear", "correction": True}, True),
        ("llama", {"heal": "linear", "head_ratio": 0.5}, True),  # attention is not healed
        ("gemma2", {"heal": "layer"}, True),  # a norm stands behind down_proj: no closed form
        ("qwen3", {"correction": False}, False),
    ],
)
def test_outputs_are_corrected_unless_healing_fits_the_same_matrices(family, arguments, corrected):
    model = copy.deepcopy(lively(family))
    plan = WidthPruning(neuron_ratio=0.5, multiple=8, **arguments).plan(model, WINDOWS)
    assert plan.steps[0].correction is corrected


def test_what_is_healed_alone_is_nearer_to_the_dense_model_than_what_was_corrected_before():
    dense, windows, errors = tiny_model(), token_windows(64, 16), []
    for correction in (None, True):
        method = WidthPruning(0.5, multiple=8, heal="linear", correction=correction)
        model = prunelight.apply(tiny_model(), method.plan(tiny_model(), windows), windows)
        with torch.no_grad():
            difference = model(windows).logits - dense(windows).logits
        errors.append(difference.square().mean().item())
    assert errors[0] < errors[1]
