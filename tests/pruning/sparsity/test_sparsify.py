"""The engine: what a sparsify step leaves in a model, against independent pipelines."""

import copy
import math
import re

import pytest
import reference_sparsity as reference
import torch
from lively_models import hooks, lively_model, padded
from tiny import NUM_LAYERS, tiny_model, token_windows
from torch import nn

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.shared_windows import MICRO_BATCH_TOKENS
from prunelight.callbacks import DLP
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import layer_matrices, matrices
from prunelight.planning.steps import Sparsify
from prunelight.pruning.apply import apply
from prunelight.pruning.sparsity.masks import Pattern, magnitude_mask, wanda_mask
from prunelight.pruning.sparsity.sparsify import (
    SOLVERS,
    SparsifyOutcome,
    sparsify,
    sparsify_layer,
)

WINDOWS = token_windows(4, 32)
HELD_OUT = token_windows(16, 32, seed=9)
UP = "model.layers.0.mlp.up_proj"
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def step_for(model, share=0.5, solver="wanda", pattern=None, **options):
    return Sparsify(dict.fromkeys(matrices(model), share), solver, pattern, options)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    after = model.state_dict()
    return {name for name in before if not torch.equal(after[name], before[name])}


def zero_counts(model):
    return {name: [int((v == 0).sum()) for v in m.views()] for name, m in matrices(model).items()}


def agreement(model, other):
    """The share of weights on whose being zero two models agree."""
    pairs = zip(matrices(model).values(), matrices(other).values(), strict=True)
    same = [((a.parameter == 0) == (b.parameter == 0)).flatten() for a, b in pairs]
    return torch.cat(same).double().mean().item()


@torch.no_grad()
def perplexity(model):
    return model(HELD_OUT, labels=HELD_OUT, use_cache=False).loss.exp().item()


# --- against independent pipelines ------------------------------------------------------------

# Solver, allocation and amount are independent: every two of them meet.
PIPELINES = [
    (allocation, ("magnitude", "wanda", "sparsegpt")[(i + j) % 3], *amount)
    for i, allocation in enumerate(("uniform", "owl", "dlp", "dlp_mean"))
    for j, amount in enumerate(((0.5, None), (0.7, None), (None, "2:4")))
]


@pytest.fixture(scope="module")
def learned():
    """A llama that has learned the held-out windows a little: perplexities then mean something."""
    model = lively_model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(30):
        loss = model(HELD_OUT, labels=HELD_OUT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


@pytest.mark.parametrize(("allocation", "solver", "share", "pattern"), PIPELINES)
def test_the_pipeline_is_the_straightforward_one(learned, allocation, solver, share, pattern):
    ours, theirs = copy.deepcopy(learned), copy.deepcopy(learned)
    plan = DLP(share, pattern, allocation, solver=solver).plan(ours, WINDOWS)
    apply(ours, plan, WINDOWS, outcomes=(outcomes := []))
    pair = pattern and tuple(map(int, pattern.split(":")))
    shares = reference.prune(theirs, WINDOWS, allocation, solver, share, pair)
    (step,) = plan.steps
    # Scores are float32 here and float64 there.
    assert step.sparsity == pytest.approx(shares, abs=1e-5)
    assert outcomes[0]["sparsity"] == pytest.approx(shares, abs=1 / 32)  # whole weights a row
    assert agreement(ours, theirs) > 0.999
    assert perplexity(ours) <= perplexity(theirs) * (1 + 1e-3)


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_several_micro_batches_are_one_calibration_set(learned, solver):
    ours, theirs, windows = copy.deepcopy(learned), copy.deepcopy(learned), token_windows(22, 100)
    assert windows.numel() > MICRO_BATCH_TOKENS
    sparsify(ours, step_for(ours, 0.6, solver), windows)
    reference.prune(theirs, windows, "uniform", solver, 0.6)
    assert agreement(ours, theirs) > 0.999


@pytest.mark.parametrize("share", [0.5, 0.7])
@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt"])
def test_a_conv1d_is_pruned_as_the_linear_it_stands_for(solver, share):
    ours, theirs = lively_model("gpt2"), lively_model("gpt2")
    sparsify(ours, step_for(ours, share, solver), WINDOWS)
    for index, layer in enumerate(theirs.transformer.h):
        prefix = f"transformer.h.{index}."
        modules = {
            prefix + name: module
            for name, module in layer.named_modules()
            if type(module).__name__ == "Conv1D"
        }
        assert len(modules) == 4
        grams = reference.grams(theirs, WINDOWS, modules)
        for name, module in modules.items():
            weight, gram = module.weight.data.T.clone(), grams[name]  # (O, I)
            if solver == "sparsegpt":
                pruned = reference.sparsegpt(weight, gram, share)
            elif solver == "wanda":
                mask = reference.wanda(weight, gram.diagonal().sqrt(), share)
                pruned = weight.masked_fill(mask, 0)
            else:
                pruned = weight.masked_fill(reference.magnitude(weight, share), 0)
            module.weight.data.copy_(pruned.T)
    assert agreement(ours, theirs) > 0.999
    with torch.no_grad():
        found, expected = ours(WINDOWS).logits, theirs(WINDOWS).logits
    # One weight of thousands may fall on the other side of a threshold.
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_layers_see_what_the_sparse_layers_before_them_put_out(solver):
    at_once, one_by_one, alone = (lively_model() for _ in range(3))
    sparsify(at_once, step_for(at_once, 0.6, solver), WINDOWS)
    for index in range(NUM_LAYERS):
        names = [matrix.name for matrix in layer_matrices(one_by_one, index)]
        sparsify(one_by_one, Sparsify(dict.fromkeys(names, 0.6), solver), WINDOWS)
    assert changed(at_once, one_by_one.state_dict()) == set()
    names = [matrix.name for matrix in layer_matrices(alone, NUM_LAYERS - 1)]
    sparsify(alone, Sparsify(dict.fromkeys(names, 0.6), solver), WINDOWS)  # dense prefix
    last, other = decoder_layers(alone)[-1], decoder_layers(at_once)[-1]
    assert not torch.equal(last.mlp.up_proj.weight, other.mlp.up_proj.weight)


# --- what is left in the model ----------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_counts_are_exact_and_told(solver, family):
    model = lively_model(family)
    shares = {name: 0.1 + 0.8 * i / 80 for i, name in enumerate(matrices(model))}
    outcome = sparsify(model, Sparsify(shares, solver), WINDOWS)
    counts = zero_counts(model)
    for name, matrix in matrices(model).items():
        for view, zeros in zip(matrix.views(), counts[name], strict=True):
            rows, width = view.shape
            by_row = rows * math.floor(width * shares[name] + 1e-6)
            total = math.floor(rows * width * shares[name] + 1e-6)
            assert zeros == (by_row if solver == "wanda" else total), name
        stored = sum(counts[name]) / matrix.parameter.numel()
        assert outcome.sparsity[name] == pytest.approx(stored, abs=1e-12)
    assert list(outcome.sparsity) == list(matrices(model))


@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt"])
def test_each_matrix_may_have_its_own_pattern(solver):
    model = lively_model()
    shares = {name: i % 4 / 4 for i, name in enumerate(matrices(model))}  # 4:4, 3:4, 2:4, 1:4
    sparsify(model, Sparsify(shares, solver, "2:4"), WINDOWS)
    for name, matrix in matrices(model).items():
        groups = matrix.views()[0].reshape(-1, 4)
        assert set((groups == 0).sum(1).tolist()) == {4 * shares[name]}


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"tie_word_embeddings": True}), ("llama", {}), ("opt", {}), ("phi", {})],
)
@every_solver
def test_only_the_matrices_of_the_decoder_layers_change(family, changes, solver):
    model = lively_model(family, **changes)
    before = snapshot(model)
    sparsify(model, step_for(model, 0.5, solver), WINDOWS)
    assert changed(model, before) == {f"{name}.weight" for name in matrices(model)}
    tied = changes.get("tie_word_embeddings", model.config.tie_word_embeddings)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embeddings.weight is head.weight) == tied


@every_solver
def test_a_share_of_zero_changes_nothing(solver):
    model = lively_model()
    before = snapshot(model)
    outcome = sparsify(model, step_for(model, 0.0, solver), WINDOWS)
    assert changed(model, before) == set()
    assert set(outcome.sparsity.values()) == {0}
    assert outcome.reconstruction_error == ([] if solver == "magnitude" else [0] * NUM_LAYERS)


def test_the_reconstruction_error_is_that_of_its_definition():
    model, dense = lively_model(), lively_model()
    names = [matrix.name for matrix in layer_matrices(model, 2)]
    errors = sparsify(
        model, Sparsify(dict.fromkeys(names, 0.5), "wanda"), WINDOWS
    ).reconstruction_error
    assert [index for index, error in enumerate(errors) if error] == [2]
    states = []
    for one in (dense, model):
        decoder_layers(one)[2].register_forward_hook(lambda _, a, o: states.append((a[0], o)))
        with torch.no_grad():
            one(WINDOWS)
    (x, y), (same, sparse) = states
    assert torch.equal(x, same)
    # Float32 sums.
    expected = (sparse - y).square().sum() / (y - x).square().sum()
    assert errors[2] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_the_outliers_that_are_kept_are_those_of_their_definition(solver):
    model, dense = lively_model(), lively_model()
    with torch.no_grad():
        for each in (model, dense):
            each.model.layers[0].mlp.down_proj.weight[:, :3] *= 30
    outcome = sparsify(model, step_for(model, 0.97, solver), WINDOWS)
    modules = reference.linears(dense, 0)  # the first layer sees what it sees in the dense model
    squares = reference.grams(dense, WINDOWS, modules, diagonal=True)
    scores = {name: m.weight.double().abs() * squares[name].sqrt() for name, m in modules.items()}
    mean = torch.cat([score.flatten() for score in scores.values()]).mean()
    outliers = {name: score > 5 * mean for name, score in scores.items()}
    kept = sum(
        int((model.get_submodule(name).weight[mask] != 0).sum()) for name, mask in outliers.items()
    )
    total = sum(int(mask.sum()) for mask in outliers.values())
    assert 0 < kept < total
    assert outcome.outliers_kept[0] == pytest.approx(kept / total, abs=2 / total)
    assert len(outcome.outliers_kept) == NUM_LAYERS


def test_a_trial_counts_no_outliers_and_prunes_the_same():
    models, outcomes = [lively_model(), lively_model()], [SparsifyOutcome(), SparsifyOutcome()]
    for model, outcome, count in zip(models, outcomes, (True, False), strict=True):
        step = step_for(model, 0.5, "wanda")
        with torch.no_grad(), LayerWalk(model, WINDOWS) as walk:
            for index, _ in walk.layers():
                sparsify_layer(model, step, walk, index, outcome, count_outliers=count)
    assert [len(outcome.outliers_kept) for outcome in outcomes] == [NUM_LAYERS, 0]
    assert outcomes[0].reconstruction_error == outcomes[1].reconstruction_error
    counted, tried = (model.state_dict() for model in models)
    assert all(torch.equal(counted[name], tried[name]) for name in counted)


def test_all_outliers_are_kept_without_zeros_and_magnitude_counts_none():
    model = lively_model()
    assert sparsify(model, step_for(model, 0.0), WINDOWS).outliers_kept == [1.0] * NUM_LAYERS
    assert sparsify(model, step_for(model, 0.5, "magnitude")).outliers_kept == []


def test_the_reconstruction_error_falls_from_wanda_to_alps_and_with_fewer_zeros():
    errors = {}
    for solver, share in (("wanda", 0.7), ("sparsegpt", 0.7), ("alps", 0.7), ("alps", 0.5)):
        model = lively_model()
        outcome = sparsify(model, step_for(model, share, solver), WINDOWS)
        errors[solver, share] = outcome.reconstruction_error[0]  # all start from the same input
        assert len(outcome.reconstruction_error) == NUM_LAYERS
    assert [*errors.values()] == sorted(errors.values(), reverse=True)
    assert errors["alps", 0.5] > 0


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("solver", ["wanda", "wanda_variant", "alps"])
def test_swaps_lower_the_reconstruction_error_and_keep_the_counts(solver, pattern):
    if pattern and solver == "wanda_variant":
        return
    errors, counts, models = [], [], []
    for options in ({}, {"swaps": 3}):
        model = lively_model()
        step = step_for(model, 0.5, solver, pattern, **options)
        errors.append(sparsify(model, step, WINDOWS).reconstruction_error[0])
        counts.append(zero_counts(model))
        models.append(model)
    assert errors[1] < errors[0]
    assert counts[0] == counts[1]
    for name, matrix in matrices(models[1]).items() if solver == "wanda" else ():
        dense = matrices(lively_model())[name].parameter
        assert torch.equal(matrix.parameter, dense.masked_fill(matrix.parameter == 0, 0))


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize(
    "options",
    [
        {"device": torch.device("cpu")},
        {"device": torch.device("cpu:0")},  # the layers move
        {"offload": True},
        {"offload": True, "device": torch.device("cpu:0")},
    ],
    ids=["device", "moving", "offload", "both"],
)
def test_device_and_offload_change_nothing(solver, options):
    model, other = lively_model(), lively_model()
    outcome = sparsify(model, step_for(model, 0.6, solver), WINDOWS)
    assert sparsify(other, step_for(other, 0.6, solver), WINDOWS, **options) == outcome
    assert changed(other, model.state_dict()) == set()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_padding_changes_no_choice(family, left):
    model, other = lively_model(family), lively_model(family)
    sparsify(model, step_for(model, 0.6), WINDOWS)
    sparsify(other, step_for(other, 0.6), padded(WINDOWS, left=left))
    # A mask changes the kernel, so rounding.
    assert agreement(model, other) > 0.999


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_what_stands_in_the_padding_does_not_matter(solver, left):
    model, other = lively_model(), lively_model()
    windows = padded(WINDOWS, left=left)
    ids = torch.where(windows["attention_mask"].bool(), windows["input_ids"], 77)
    outcome = sparsify(model, step_for(model, 0.6, solver), windows)
    assert sparsify(other, step_for(other, 0.6, solver), {**windows, "input_ids": ids}) == outcome
    assert changed(other, model.state_dict()) == set()


@every_solver
def test_a_bfloat16_model_gets_exact_counts_too(solver):
    model = lively_model(dtype=torch.bfloat16)
    outcome = sparsify(model, step_for(model, 0.75, solver), WINDOWS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, matrix in matrices(model).items():
        assert zero_counts(model)[name] == [0.75 * matrix.parameter.numel()]
    assert set(outcome.sparsity.values()) == {0.75}


# --- experts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt", "alps"])
def test_an_expert_that_sees_no_token_is_pruned_by_magnitude_and_noted(solver):
    model = lively_model("mixtral")
    dense = {name: [v.clone() for v in m.views()] for name, m in matrices(model).items()}
    # One token is routed to 2 of 4 experts.
    outcome = sparsify(model, step_for(model, 0.5, solver), WINDOWS[:1, :1])
    for name, matrix in matrices(model).items():
        if not matrix.fused:
            continue
        assert f"2 experts of {name} saw no token: pruned by magnitude" in outcome.notes
        by_magnitude = 0
        for view, before in zip(matrix.views(), dense[name], strict=True):
            rows = wanda_mask(before, torch.ones(before.shape[1]), 0.5)
            whole = magnitude_mask(before, 0.5)  # SparseGPT's blocks are wider than these
            expected = before.masked_fill(rows if solver == "wanda" else whole, 0)
            # An identity Hessian spreads no error, but is divided by its factor and back.
            by_magnitude += torch.allclose(view, expected, 1e-5, 0)
        assert by_magnitude == 2


# --- magnitude, faults and notes --------------------------------------------------------------


def test_magnitude_needs_no_windows_and_no_forward():
    model, other = lively_model().train(), lively_model()
    sparsify(other, step_for(other, 0.5, "magnitude"), WINDOWS)
    model.model.forward = None
    outcome = sparsify(model, step_for(model, 0.5, "magnitude"))
    assert changed(model, other.state_dict()) == set()
    assert outcome.reconstruction_error == []
    assert model.training


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "magnitude"])
def test_the_other_solvers_need_windows(solver):
    model = lively_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"solver='{solver}' needs calibration windows"):
        sparsify(model, step_for(model, 0.5, solver))
    assert changed(model, before) == set()


FAULTS = {
    "unknown matrix": (
        {UP: 0.5, "model.layers.9.mlp.up_proj": 0.5},
        {},
        "model.layers.9.mlp.up_proj is no matrix of the decoder layers of llama; the first one is "
        "model.layers.0.self_attn.q_proj",
    ),
    "head": ({"lm_head": 0.5}, {}, "lm_head is no matrix of the decoder layers"),
    "solver": ({UP: 0.5}, {"solver": "melt"}, "solver='melt' must be one of magnitude, wanda"),
    "no effect": (
        {UP: 0.5},
        {"options": {"block_size": 64}},
        "options={'block_size': 64} have no effect on solver='wanda'",
    ),
    "options": (
        {UP: 0.5},
        {"solver": "sparsegpt", "options": {"blocks": 64}},
        "options={'blocks': 64} are not those of SparseGPT",
    ),
    "option type": (
        {UP: 0.5},
        {"solver": "sparsegpt", "options": {"dampening": "much"}},
        "options={'dampening': 'much'} are not those of SparseGPT",
    ),
    "no swaps": (
        {UP: 0.5},
        {"solver": "sparsegpt", "options": {"swaps": 2}},
        "swaps=2 has no effect with solver='sparsegpt'; take one of wanda, wanda_variant, alps",
    ),
    "half a swap": ({UP: 0.5}, {"options": {"swaps": 0.5}}, "swaps=0.5 must be a whole number"),
    "ALPS's options": (
        {UP: 0.5},
        {"solver": "alps", "options": {"block_size": 64}},
        "options={'block_size': 64} are not those of ALPS",
    ),
    "ALPS's value": (
        {UP: 0.5},
        {"solver": "alps", "options": {"iterations": 0}},
        "iterations=0 must be at least 1",
    ),
    "option value": ({UP: 0.5}, {"solver": "sparsegpt", "options": {"bits": 3}}, "bits=3 must be"),
    "width": (
        {"model.layers.0.mlp.down_proj": 0.5, UP: 0.5},
        {"pattern": "32:64"},
        f"pattern=32:64 needs in_features to be a multiple of 64, {UP} has 32",
    ),
    "share": ({UP: 0.3}, {"pattern": "2:4"}, f"sparsity=0.3 of {UP} is no whole number of 4ths"),
    "variant": (
        {UP: 0.5},
        {"solver": "wanda_variant", "pattern": "2:4"},
        "solver='wanda_variant' chooses by rows and knows no pattern=2:4",
    ),
    "no pattern": ({UP: 0.5}, {"pattern": "half"}, "pattern='half' must be N:M"),
    "number": ({UP: 0.5}, {"pattern": 124}, "pattern='124' must be N:M"),  # YAML's 2:4
    "too much": ({UP: 1.0}, {}, f"sparsity=1.0 of {UP} must lie in [0, 1)"),
    "negative": (
        {"model.layers.0.mlp.gate_proj": 0.5, UP: -0.1},
        {"solver": "magnitude"},
        f"sparsity=-0.1 of {UP} must lie in [0, 1)",
    ),
    "nan": ({UP: math.nan}, {}, f"sparsity=nan of {UP} must lie in [0, 1)"),
}


@pytest.mark.parametrize(("sparsity", "rest", "message"), FAULTS.values(), ids=list(FAULTS))
def test_a_step_that_does_not_fit_is_refused_before_anything_changes(sparsity, rest, message):
    model = lively_model()
    before = snapshot(model)
    step = Sparsify(sparsity, **{"solver": "wanda"} | rest)
    with pytest.raises(ValueError, match=re.escape(message)):
        sparsify(model, step, WINDOWS)
    assert changed(model, before) == set()


@every_solver
def test_quantized_weights_are_refused(solver):
    model = tiny_model()
    step = step_for(model, 0.5, solver)
    mlp = decoder_layers(model)[3].mlp
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.to(torch.int8), requires_grad=False)
    before = snapshot(model)
    message = r"model\.layers\.3\.mlp\.down_proj is a quantized Linear \(torch\.int8\): prune first"
    with pytest.raises(TypeError, match=message):
        sparsify(model, step, WINDOWS)
    assert changed(model, before) == set()


@pytest.mark.parametrize("solver", ["wanda", "wanda_variant", "sparsegpt"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_matrix_that_sees_nan_or_inf_is_named_and_the_model_restored(solver, value):
    model = lively_model().train()
    model.config.use_cache = True
    with torch.no_grad():
        decoder_layers(model)[2].post_attention_layernorm.weight[0] = value
    message = r"layers\.2\.mlp\.gate_proj, model\.layers\.2\.mlp\.up_proj: inputs are NaN or Inf"
    with pytest.raises(ValueError, match=message):
        sparsify(model, step_for(model, 0.5, solver), WINDOWS)
    assert model.training
    assert model.config.use_cache is True
    assert hooks(model) == [0] * len(hooks(model))


@every_solver
def test_a_weight_that_is_nan_is_named(solver):
    model = lively_model()
    with torch.no_grad():
        decoder_layers(model)[2].self_attn.k_proj.weight[0, 0] = math.nan
    message = r"layers\.2\.self_attn\.k_proj.*: the weight of shape \(16, 32\) holds NaN or Inf"
    with pytest.raises(ValueError, match=message):
        sparsify(model, step_for(model, 0.5, solver), WINDOWS)


def test_fewer_tokens_than_a_hessian_is_wide_are_noted_with_the_layer(caplog):
    few = padded(WINDOWS[:1])  # 32 tokens, as the narrow matrices have inputs
    model = lively_model()
    (note,) = sparsify(model, step_for(model, 0.5, "sparsegpt"), few).notes
    assert note.startswith(
        "calibration holds 32 tokens, fewer than the 64 inputs of model.layers.0.mlp.down_proj "
        f"({NUM_LAYERS} such matrices)"
    )
    assert note in caplog.messages
    (same,) = sparsify(lively_model(), step_for(model, 0.5, "alps"), few).notes
    assert same == note.replace("SparseGPT", "ALPS")
    assert sparsify(lively_model(), step_for(model, 0.5), few).notes == []
    assert sparsify(lively_model(), step_for(model, 0.5, "sparsegpt"), WINDOWS).notes == []


def test_the_planned_patterns_of_a_step_are_those_in_the_weights():
    model = lively_model()
    outcome = sparsify(model, step_for(model, 0.75, "sparsegpt", "1:4", act_order=False), WINDOWS)
    assert set(outcome.sparsity.values()) == {Pattern(1, 4).sparsity}
