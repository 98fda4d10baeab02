"""WeightPruning and DLP: which shares of zeros a plan holds, and what is refused beforehand."""

import json
import logging
import warnings
from collections import Counter

import pytest
import reference_sparsity as reference
import torch
from runs import make_data, make_module, make_trainer, write_model
from tiny import NUM_LAYERS, tiny_model, token_windows
from torch import nn
from uneven_models import uneven_model

import prunelight
from prunelight.callbacks import DLP, WeightPruning
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import layer_matrices, matrices
from prunelight.planning.fingerprints import describe_model, describe_windows
from prunelight.planning.sparsity_shares import weighted_mean
from prunelight.planning.steps import Sparsify
from prunelight.pruning.sparsity.alps import ALPS
from prunelight.pruning.sparsity.sparsegpt import SparseGPT
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.run.checkpoints import given_arguments, state_arguments

WINDOWS = token_windows()
PER_TOKEN = WINDOWS.numel() ** -0.5  # ours are of the mean square over tokens, not of the sum
PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


@pytest.fixture(scope="module")
def model():
    """Read-only: planning changes nothing."""
    return uneven_model()


def step_of(plan):
    (step,) = plan.steps
    assert isinstance(step, Sparsify)
    return step


def by_layer(model, step):
    """Return the share of each layer; all its matrices must have the same."""
    shares = []
    for index in range(NUM_LAYERS):
        (share,) = {step.sparsity[m.name] for m in layer_matrices(model, index)}
        shares.append(share)
    return shares


# --- shares


@pytest.mark.parametrize("per_linear", [False, True], ids=["by layer", "by linear"])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
@pytest.mark.parametrize("allocation", ["dlp", "dlp_mean", "owl", "uniform"])
def test_shares_are_those_of_a_plain_computation(model, allocation, sparsity, per_linear):
    granularity = "linear" if per_linear else "layer"
    callback = WeightPruning(sparsity, allocation=allocation, granularity=granularity)
    step = step_of(callback.plan(model, WINDOWS))
    expected = reference.allocate(model, WINDOWS, allocation, sparsity, per_linear=per_linear)
    assert (step.solver, step.pattern, step.options) == ("wanda", None, {})
    assert step.sparsity == pytest.approx(expected, abs=1e-6)
    if allocation != "uniform":
        assert max(step.sparsity.values()) > min(step.sparsity.values()) + 0.05


STATISTICS = ["median", "mean", "sum", "max", "std", "var"]
every_statistic = pytest.mark.parametrize("statistic", STATISTICS)


@every_statistic
def test_shares_by_each_statistic_are_those_of_a_plain_computation(model, statistic):
    plan = DLP(0.6, statistic=statistic).plan(model, WINDOWS)
    expected = reference.allocate(model, WINDOWS, statistic, 0.6, alpha=0.15)
    assert step_of(plan).sparsity == pytest.approx(expected, abs=1e-6)
    assert set(plan.scores) == {"sparsity", statistic}
    assert max(plan.scores["sparsity"]) > min(plan.scores["sparsity"]) + 0.2


def test_the_mean_as_a_statistic_is_the_released_code(model):
    plan, other = (
        DLP(0.6, **chosen).plan(model, WINDOWS)
        for chosen in ({"statistic": "mean"}, {"allocation": "dlp_mean"})
    )
    assert (plan.steps, plan.scores) == (other.steps, other.scores)


@every_statistic
def test_one_layer_gets_the_target_by_each_statistic(statistic):
    alone = tiny_model(num_hidden_layers=1)
    shares = step_of(DLP(0.6, statistic=statistic).plan(alone, WINDOWS)).sparsity
    assert set(shares.values()) == {0.6}


def test_outliers_are_counted_by_their_factor(model):
    method = WeightPruning(0.5, allocation="owl", outlier_factor=2.0, alpha=0.2)
    plan = method.plan(model, WINDOWS)
    ratios = reference.layer_scores(model, WINDOWS, outlier_factor=2.0)["outlier_ratio"]
    assert plan.scores["outlier_ratio"] == pytest.approx(ratios, abs=1e-6)
    expected = reference.owl(ratios, [1] * NUM_LAYERS, 0.5, alpha=0.2)
    assert by_layer(model, step_of(plan)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("target", [{"sparsity": 0.6}, {"pattern": "2:4"}])
@pytest.mark.parametrize("allocation", ["dlp", "owl"])
def test_alpha_zero_is_uniform(model, allocation, target):
    plan = WeightPruning(**target, allocation=allocation, alpha=0.0).plan(model, WINDOWS)
    uniform = WeightPruning(**target).plan(model, WINDOWS)
    assert plan.steps == uniform.steps
    assert plan.scores == uniform.scores
    assert set(step_of(plan).sparsity.values()) == {target.get("sparsity", 0.5)}


@pytest.mark.parametrize("granularity", ["layer", "linear"])
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.9, 0.995])
def test_the_target_is_met_exactly_by_layers_of_unequal_size(granularity, sparsity):
    model = uneven_model("qwen3_moe")  # every second layer has experts
    plan = DLP(sparsity, granularity=granularity).plan(model, WINDOWS)
    sizes = {name: matrix.parameter.numel() for name, matrix in matrices(model).items()}
    shares = step_of(plan).sparsity
    mean = weighted_mean([shares[name] for name in sizes], list(sizes.values()))
    assert mean == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= share < 1 for share in shares.values())
    layers = [layer_matrices(model, index) for index in range(NUM_LAYERS)]
    of_layers = [sum(sizes[m.name] for m in layer) for layer in layers]
    assert len(set(of_layers)) == 2
    assert weighted_mean(plan.scores["sparsity"], of_layers) == pytest.approx(sparsity, abs=1e-12)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "3:4"])
def test_mixed_patterns_keep_n_of_m_on_average(model, pattern):
    kept, of = map(int, pattern.split(":"))
    plan = DLP(pattern=pattern, alpha=0.2).plan(model, WINDOWS)
    step = step_of(plan)
    numbers = [of * (1 - share) for share in by_layer(model, step)]
    assert numbers == pytest.approx([round(number) for number in numbers], abs=1e-12)
    assert sum(numbers) == pytest.approx(kept * NUM_LAYERS)
    assert len(Counter(map(round, numbers))) > 1
    shares = reference.allocate(model, WINDOWS, "dlp", 1 - kept / of, alpha=0.2)
    shares = [shares[f"model.layers.{i}.mlp.up_proj"] for i in range(NUM_LAYERS)]
    assert [round(number) for number in numbers] == reference.round_to_patterns(shares, kept, of)
    pruned = prunelight.apply(uneven_model(), plan, WINDOWS)
    for name, matrix in matrices(pruned).items():
        zeros = (matrix.parameter == 0).view(-1, of).sum(1)
        assert (zeros == round(of * step.sparsity[name])).all()


def test_an_alpha_that_is_too_large_is_clipped_with_a_warning(model, caplog):
    step = step_of(DLP(0.9, alpha=0.3).plan(model, WINDOWS))
    shares = by_layer(model, step)
    scores = reference.layer_scores(model, WINDOWS)["median"]
    free = reference.dlp(scores, [1] * NUM_LAYERS, 0.9, alpha=0.3)
    assert f"to [{min(free):.3f}, {max(free):.3f}], {max(free) - 0.99:.3f} out of" in caplog.text
    assert max(shares) == 0.99
    assert sum(shares) / NUM_LAYERS == pytest.approx(0.9, abs=1e-12)


def test_strict_refuses_what_would_be_clipped_and_changes_nothing_else(model):
    with pytest.raises(ValueError, match=r"alpha=0.3 pushes .* out of \[0, 1\); take a smaller"):
        DLP(0.9, alpha=0.3, strict=True).plan(model, WINDOWS)
    strict, plain = (DLP(0.5, strict=value).plan(model, WINDOWS) for value in (True, False))
    assert strict.steps == plain.steps


@pytest.mark.parametrize("granularity", ["layer", "linear"])
def test_lamp_shares_are_those_of_all_weights_ranked_together(model, granularity):
    plan = WeightPruning(0.7, allocation="lamp", granularity=granularity).plan(model, WINDOWS)
    shares = step_of(plan).sparsity
    expected = reference.lamp(model, 0.7)
    if granularity == "layer":
        for index in range(NUM_LAYERS):
            names = [matrix.name for matrix in layer_matrices(model, index)]
            sizes = [matrices(model)[name].parameter.numel() for name in names]
            share = reference.weighted_mean([expected[name] for name in names], sizes)
            expected |= dict.fromkeys(names, share)
    assert shares == pytest.approx(expected, abs=1e-3)  # two weights of a matrix
    sizes = [matrices(model)[name].parameter.numel() for name in shares]
    assert weighted_mean(list(shares.values()), sizes) == pytest.approx(0.7, abs=1e-12)


def test_lamp_with_an_alpha_is_refused_and_what_it_clips_is_said(caplog):
    with pytest.raises(ValueError, match="alpha=0.1 has no effect with allocation='lamp'"):
        WeightPruning(0.5, allocation="lamp", alpha=0.1)
    model = uneven_model()
    with torch.no_grad():
        for matrix in layer_matrices(model, 0):
            matrix.parameter.zero_()
    plan = WeightPruning(0.5, allocation="lamp").plan(model, WINDOWS)
    assert "allocation='lamp' pushes shares of zeros to [" in caplog.text
    assert plan.scores["lamp_share"][0] == 1
    assert plan.scores["sparsity"][0] == 0.99
    with pytest.raises(ValueError, match=r"'lamp' pushes .* \(LAMP: fewer zeros\), or strict"):
        WeightPruning(0.5, allocation="lamp", strict=True).plan(model, WINDOWS)


# --- alpha by held-out windows

EIGHT = token_windows(8, 16)


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("allocation", ["dlp", "owl"])
def test_a_chosen_alpha_is_the_best_of_those_tried_and_plans_what_it_plans_alone(
    model, allocation, solver
):
    tried = [0.0, 0.1, 0.3]
    method = {"sparsity": 0.5, "allocation": allocation, "solver": solver}
    plan = WeightPruning(**method, alpha=tried).plan(model, EIGHT)
    perplexities = plan.found["perplexity_of_alpha"]
    assert [float(alpha) for alpha in perplexities] == tried
    assert len(set(perplexities.values())) == len(tried)
    best = plan.found["alpha"]
    assert perplexities[f"{best:.4g}"] == min(perplexities.values())
    assert plan.steps == WeightPruning(**method, alpha=best).plan(model, EIGHT).steps


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt", "magnitude"])
def test_each_perplexity_is_that_of_a_model_pruned_and_scored_without_the_windows_that_judge(
    model, solver
):
    plan = DLP(0.5, solver=solver, alpha=[0.0, 0.2]).plan(model, EIGHT)
    for alpha in (0.0, 0.2):
        seen = DLP(0.5, solver=solver, alpha=alpha).plan(model, EIGHT[:6])
        pruned = prunelight.apply(uneven_model(), seen, EIGHT[:6])
        expected = pruned(input_ids=EIGHT[6:], labels=EIGHT[6:]).loss.exp().item()
        assert plan.found["perplexity_of_alpha"][f"{alpha:.4g}"] == pytest.approx(
            expected, rel=1e-4
        )


def test_auto_tries_uniform_shares_and_is_never_worse_than_they_are(model):
    plan = DLP(0.5, alpha="auto").plan(model, EIGHT)
    perplexities = plan.found["perplexity_of_alpha"]
    assert [*perplexities] == ["0", "0.05", "0.1", "0.15", "0.2"]
    assert min(perplexities.values()) <= perplexities["0"]
    assert plan.arguments["alpha"] == "auto"


def test_alphas_that_round_to_the_same_patterns_are_tried_once(model):
    plan = DLP(pattern="2:4", alpha=[0.0, 1e-6]).plan(model, EIGHT)
    assert plan.found == {"alpha": 0.0, "perplexity_of_alpha": {}}


def test_one_alpha_in_a_list_holds_nothing_out(model):
    listed, plain = (DLP(0.5, alpha=alpha).plan(model, EIGHT[:1]) for alpha in ([0.1], 0.1))
    assert (listed.steps, listed.scores, listed.found) == (plain.steps, plain.scores, {})


def test_strict_leaves_clipped_alphas_out_of_auto_and_refuses_them_in_a_list(model, caplog):
    plan = DLP(0.9, alpha="auto", strict=True).plan(model, EIGHT)
    assert set(plan.found["perplexity_of_alpha"]) == {"0", "0.05"}
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not any("out of" in text for text in warned)  # what is left out is told, no warning
    with pytest.raises(ValueError, match="alpha=0.3 pushes .*; take a smaller alpha"):
        DLP(0.9, alpha=[0.0, 0.3], strict=True).plan(model, EIGHT)
    clipped = DLP(0.9, alpha=[0.2, 0.3]).plan(model, EIGHT)
    assert len(clipped.found["perplexity_of_alpha"]) == 2
    assert caplog.text.count("clipped, and the others adjusted") == 1


def test_a_trial_with_padding_judges_real_tokens_alone(model):
    padded = torch.cat([EIGHT, torch.full((8, 5), 9)], dim=1)
    mask = (torch.arange(21).expand(8, 21) < 16).long()
    plain = DLP(0.6, alpha=[0.0, 0.1]).plan(model, EIGHT)
    masked = DLP(0.6, alpha=[0.0, 0.1]).plan(model, {"input_ids": padded, "attention_mask": mask})
    found, expected = (plan.found["perplexity_of_alpha"] for plan in (masked, plain))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_single_window_cannot_choose_an_alpha(model):
    message = r"alpha='auto' holds windows out; 1 calibration window cannot be split .*, or one"
    with pytest.raises(ValueError, match=message):
        DLP(0.5, alpha="auto").plan(model, WINDOWS[:1])
    with pytest.raises(ValueError, match=message):
        DLP(0.5, alpha="auto").check_calibration(model, WINDOWS[:1])


@pytest.mark.parametrize("solver", ["wanda", "magnitude"])
def test_windows_without_a_token_to_predict_judge_no_alpha(solver):
    model = uneven_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="the windows held out cannot judge zeros: 0 tokens"):
        DLP(0.5, solver=solver, alpha=[0.0, 0.1]).plan(model, EIGHT[:, :1])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- the plan


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"allocation": "dlp"}, "median"),
        ({"allocation": "dlp_mean"}, "mean"),
        ({"allocation": "owl"}, "outlier_ratio"),
        ({"allocation": "lamp"}, "lamp_share"),
        ({}, None),
        ({"allocation": "dlp", "solver": "sparsegpt"}, "median"),
    ],
)
def test_scores_are_one_number_a_decoder_layer(model, arguments, name):
    plan = WeightPruning(0.5, **arguments).plan(model, WINDOWS)
    assert set(plan.scores) == {"sparsity"} | ({name} if name else set())
    assert plan.scores["sparsity"] == by_layer(model, step_of(plan))
    if name and name != "lamp_share":
        expected = reference.layer_scores(model, WINDOWS)[name]
        scale = 1 if name == "outlier_ratio" else PER_TOKEN
        assert plan.scores[name] == pytest.approx([scale * x for x in expected], rel=1e-5)


def test_scores_by_linear_are_lists_of_each_projection(model):
    plan = DLP(0.5, granularity="linear").plan(model, WINDOWS)
    assert set(plan.scores) == {"sparsity", *(f"median_{name}" for name in PROJECTIONS)}
    medians = reference.layer_scores(model, WINDOWS, per_linear=True)["median"]
    told = [plan.scores[f"median_{name}"][i] for i in range(NUM_LAYERS) for name in PROJECTIONS]
    assert told == pytest.approx([PER_TOKEN * x for x in medians], rel=1e-5)


EVERY_KIND = [
    {"sparsity": 0.6, "allocation": "dlp"},
    {"sparsity": 0.6, "allocation": "owl", "outlier_factor": 3.0, "solver": "magnitude"},
    {"pattern": "2:4", "granularity": "linear", "allocation": "dlp_mean"},
    {"sparsity": 0.5, "solver": "wanda_variant", "strict": True},
    {"sparsity": 0.5, "allocation": "owl", "alpha": [0.0, 0.1]},
    {"pattern": "2:4", "allocation": "lamp", "solver": "magnitude"},
]


@pytest.mark.parametrize("arguments", EVERY_KIND)
def test_the_same_call_gives_the_same_plan_and_leaves_the_model_alone(arguments, tmp_path):
    model = uneven_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (WeightPruning(**arguments).plan(model, WINDOWS) for _ in range(2))
    assert first == second
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(child._forward_pre_hooks for child in model.modules())
    assert first.model == describe_model(model)
    assert first.calibration == describe_windows(WINDOWS)
    first.save(tmp_path / "plan.json")
    assert prunelight.Plan.load(tmp_path / "plan.json") == first


@pytest.mark.parametrize("arguments", EVERY_KIND)
def test_the_arguments_in_a_plan_make_it_again(model, arguments):
    plan = WeightPruning(**arguments).plan(model, WINDOWS)
    told = json.loads(json.dumps(plan.arguments))
    assert told == plan.arguments
    nested = {"sparsegpt": SparseGPT(**told["sparsegpt"]), "alps": ALPS(**told["alps"])}
    assert WeightPruning(**{**told, **nested}).plan(model, WINDOWS) == plan


def test_settings_of_solver_and_schedule_are_recorded_as_json(model):
    plan = DLP(0.5, solver="sparsegpt", sparsegpt=SparseGPT(bits=4)).plan(model, WINDOWS)
    expected = {
        "dampening": 0.01,
        "block_size": 128,
        "act_order": False,
        "bits": 4,
        "group_size": 128,
    }
    assert plan.arguments["sparsegpt"] == step_of(plan).options == expected
    assert plan.arguments["schedule"] is None
    told = DLP(0.5, schedule=Schedule(1, 9)).plan(model, WINDOWS).arguments["schedule"]
    assert told == {"start_step": 1, "end_step": 9, "every": 10, "curve": "cubic"}


def test_a_schedule_changes_no_share_and_from_python_prunes_at_once(model):
    gradual, at_once = (
        DLP(0.5, schedule=schedule).plan(model, WINDOWS) for schedule in (Schedule(1, 9), None)
    )
    assert gradual.steps == at_once.steps
    pruned = prunelight.apply(uneven_model(), gradual, WINDOWS)
    assert all((matrix.parameter == 0).any() for matrix in matrices(pruned).values())


def test_padding_changes_no_decision(model):
    padded = torch.cat([WINDOWS, torch.full((4, 5), 9)], dim=1)
    mask = (torch.arange(21).expand(4, 21) < 16).long()
    plain = DLP(0.6).plan(model, WINDOWS)
    masked = DLP(0.6).plan(model, {"input_ids": padded, "attention_mask": mask})
    counted = DLP(0.6).plan(model, padded)
    assert step_of(masked).sparsity == pytest.approx(step_of(plain).sparsity, abs=1e-5)
    assert step_of(counted).sparsity != pytest.approx(step_of(plain).sparsity, abs=1e-5)


def test_embeddings_and_a_tied_head_are_untouched():
    model = uneven_model(tie_word_embeddings=True)
    others = {n: p.clone() for n, p in model.named_parameters() if ".layers." not in n}
    pruned = prunelight.apply(model, DLP(0.7).plan(model, WINDOWS), WINDOWS)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    left = {n: p for n, p in pruned.named_parameters() if ".layers." not in n}
    assert left.keys() == others.keys()
    assert all(torch.equal(left[name], others[name]) for name in others)
    norms = (m.weight for m in pruned.modules() if "Norm" in type(m).__name__)
    assert not any((weight == 0).any() for weight in norms)


# --- the ramp


@pytest.mark.parametrize("granularity", ["layer", "linear"])
def test_a_ramp_rises_by_equal_steps_and_keeps_the_mean(model, granularity):
    method = WeightPruning(0.6, allocation="ramp", alpha=0.2, granularity=granularity)
    plan = method.plan(model, WINDOWS)
    shares = plan.scores["sparsity"]
    expected = [0.4 + 0.4 * i / (len(shares) - 1) for i in range(len(shares))]
    assert shares == pytest.approx(expected, abs=1e-9)
    assert prunelight.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_ramp_that_leaves_the_range_is_clipped_and_keeps_the_mean(model):
    shares = WeightPruning(0.9, allocation="ramp", alpha=0.3).plan(model, WINDOWS)
    shares = shares.scores["sparsity"]
    assert all(0 <= share < 1 for share in shares)
    assert sum(shares) / len(shares) == pytest.approx(0.9)
    assert shares == sorted(shares)


def test_the_slope_of_a_ramp_is_chosen_on_held_out_windows_by_default(model):
    plan = WeightPruning(0.5, allocation="ramp").plan(model, WINDOWS)
    tried = plan.found["perplexity_of_alpha"]
    assert [*tried] == ["0", "0.05", "0.1", "0.15", "0.2"]
    assert f"{plan.found['alpha']:.4g}" == min(tried, key=tried.get)


# --- DLP is WeightPruning with its paper's allocation


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 0.6},
        {"sparsity": 0.6, "allocation": "dlp_mean", "solver": "sparsegpt"},
        {"pattern": "2:4", "alpha": 0.3, "granularity": "linear"},
    ],
)
def test_dlp_plans_what_weight_pruning_plans_with_its_allocation_and_alpha(model, arguments):
    plan = DLP(**arguments).plan(model, WINDOWS)
    other = WeightPruning(**{"allocation": "dlp", "alpha": 0.15, **arguments}).plan(model, WINDOWS)
    assert (plan.method, other.method) == ("DLP", "WeightPruning")
    assert (plan.steps, plan.scores, plan.arguments) == (other.steps, other.scores, other.arguments)


def test_what_identifies_a_base_and_a_state_of_dlp_is_as_in_older_versions():
    """Names, order and JSON values of the arguments: they are in fingerprints and checkpoints.

    Later arguments are not, as long as they have their defaults.
    """
    method = DLP(0.5, None, "dlp", None, 5.0, "layer", "wanda", schedule=Schedule(1, 9))
    settings = {"dampening": 0.01, "block_size": 128, "act_order": False, "bits": None}
    expected = {
        "sparsity": 0.5,
        "pattern": None,
        "allocation": "dlp",
        "alpha": 0.15,
        "outlier_factor": 5.0,
        "granularity": "layer",
        "solver": "wanda",
        "sparsegpt": {**settings, "group_size": 128},
        "schedule": {"start_step": 1, "end_step": 9, "every": 10, "curve": "cubic"},
        "strict": False,
    }
    assert json.dumps(state_arguments(method)) == json.dumps(expected)
    assert list(method.arguments()) == [*expected, "statistic", "heal", "alps", "swaps"]
    assert list(given_arguments(method)) == ["sparsity", "alpha", "schedule"]
    assert method.state_key == f"DLP{expected!r}"
    assert (type(method).__name__, method.version) == ("DLP", 1)


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ({"sparsity": 0.6, "allocation": "uniform"}, "WeightPruning(sparsity=0.6)"),
        (
            {"pattern": "2:4", "allocation": "uniform", "solver": "sparsegpt"},
            "WeightPruning(pattern='2:4', solver='sparsegpt')",
        ),
        (
            {"sparsity": 0.6, "allocation": "owl", "alpha": 0.1, "outlier_factor": 3.0},
            "WeightPruning(sparsity=0.6, allocation='owl', alpha=0.1, outlier_factor=3.0)",
        ),
    ],
)
def test_other_allocations_of_dlp_warn_and_plan_what_the_warning_says(model, arguments, written):
    with pytest.warns(DeprecationWarning, match="is deprecated") as warned:
        plan = DLP(**arguments).plan(model, WINDOWS)
    assert f"write prunelight.callbacks.{written}, which puts the same zeros" in str(
        warned[0].message
    )
    assert warned[0].filename == __file__
    other = eval(written).plan(model, WINDOWS)
    assert (plan.steps, plan.scores) == (other.steps, other.scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DLP(0.6, allocation="dlp_mean")
        WeightPruning(0.6, allocation="owl")


# --- where it computes


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_offloading_gives_the_same_plan_and_model(model, solver):
    weights = []
    for offload in (False, True):
        callback = DLP(0.6, solver=solver, offload_activations=offload)
        callback.device = torch.device("cpu")
        plan, outcomes = callback.plan(model, WINDOWS), []
        pruned = callback.apply(uneven_model(), plan, WINDOWS, outcomes)
        assert len(outcomes) == 1
        weights.append((plan, outcomes, pruned.state_dict()))
    (plan, outcomes, first), (other, others, second) = weights
    assert (plan, outcomes) == (other, others)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_offloading_is_no_reason_to_prune_again(tmp_path):
    name = write_model(tmp_path / "tiny")
    data = make_data(name, tmp_path)
    for offload in (False, True):
        callback = DLP(0.5, offload_activations=offload)
        module = make_module(name, recovery="none")
        make_trainer(tmp_path, callback).fit(module, data)
        (base,) = tmp_path.glob("pruned-*")
        assert prunelight.Plan.load(base / "plan.json").method == "DLP"
    (outcome,) = module.record.outcomes
    assert len(outcome["reconstruction_error"]) == NUM_LAYERS
    assert all(cost.reused for cost in module.record.costs if "DLP" in cost.name)


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "sparsity=None and pattern=None: give exactly one of the two"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "sparsity=0.5 and pattern=2:4: give exactly one"),
        ({"sparsity": -0.1}, r"sparsity=-0.1 must lie in \[0, 1\)"),
        ({"sparsity": 1.0}, r"sparsity=1.0 must lie in \[0, 1\)"),
        ({"sparsity": 70}, r"sparsity=70 must lie in \[0, 1\); 0.7 is 70 %"),
        ({"sparsity": float("nan")}, "sparsity=nan must be a finite number"),
        ({"pattern": "2-4"}, "pattern='2-4' must be N:M"),
        ({"pattern": 124}, "pattern=124 is what YAML makes of N:M; quote it"),
        ({"pattern": "0:4"}, "pattern=0:4 must keep at least 1 and at most 4 weights"),
        ({"pattern": "5:4"}, "pattern=5:4 must keep at least 1 and at most 4 weights"),
        (
            {"sparsity": 0.5, "allocation": "magic"},
            r"allocation='magic' must be one of (?=.*\bdlp\b)(?=.*dlp_mean)(?=.*owl)(?=.*uniform)",
        ),
        (
            {"sparsity": 0.5, "solver": "magic"},
            r"solver='magic' must be one of (?=.*\bwanda\b)(?=.*sparsegpt)(?=.*wanda_variant).*; "
            "did you mean magnitude",
        ),
        ({"sparsity": 0.5, "granularity": "row"}, "granularity='row' must be one of layer, linear"),
        ({"sparsity": 0.5, "alpha": -0.1}, "alpha=-0.1 must be at least 0"),
        ({"sparsity": 0.5, "alpha": float("nan")}, "alpha=nan must be a finite number"),
        ({"sparsity": 0.5, "alpha": [0.1, -0.1]}, "alpha=-0.1 must be at least 0"),
        ({"sparsity": 0.5, "alpha": []}, r"alpha=\[\] names no value to try; give some, or leave"),
        ({"sparsity": 0.5, "alpha": "best"}, "alpha='best' must be one of auto"),
        (
            {"sparsity": 0.5, "alpha": "auto", "allocation": "uniform"},
            "alpha='auto' has no effect with allocation='uniform'",
        ),
        (
            {"sparsity": 0.5, "alpha": 0.1, "allocation": "uniform"},
            "alpha=0.1 has no effect with allocation='uniform'",
        ),
        (
            {"sparsity": 0.5, "allocation": "owl", "outlier_factor": 0.0},
            "outlier_factor=0.0 must be above 0",
        ),
        ({"sparsity": 0.5, "outlier_factor": 3.0}, "=3.0 has no effect with allocation='uniform'"),
        (
            {"sparsity": 0.5, "sparsegpt": SparseGPT(dampening=0.1)},
            r"SparseGPT\(dampening=0.1, .*\) has no effect with solver='wanda'",
        ),
        (
            {"sparsity": 0.5, "alps": ALPS(iterations=9)},
            r"ALPS\(dampening=0.01, iterations=9\) has no effect with solver='wanda'",
        ),
        (
            {"sparsity": 0.5, "swaps": 3, "solver": "sparsegpt"},
            "swaps=3 has no effect with solver='sparsegpt'; take one of wanda, wanda_variant, alps",
        ),
        ({"sparsity": 0.5, "swaps": -1}, "swaps=-1 must be at least 0"),
        (
            {"sparsity": 0.5, "swaps": 3, "schedule": Schedule(0, 9)},
            "swaps=3 has no effect with a schedule; leave one of them out",
        ),
        (
            {"sparsity": 0.5, "allocation": "dlp_mean", "statistic": "max"},
            "statistic='max' has no effect with allocation='dlp_mean'; set allocation='dlp'",
        ),
        (
            {"sparsity": 0.5, "statistic": "mode"},
            "statistic='mode' must be one of median, mean, sum, max, std, var; did you mean mean",
        ),
        (
            {"pattern": "2:4", "solver": "wanda_variant"},
            "solver='wanda_variant' chooses by rows and knows no pattern",
        ),
        (
            {"sparsity": 0.5, "solver": "sparsegpt", "schedule": Schedule(0, 9)},
            "solver='sparsegpt' has no gradual form; with a schedule take one of wanda, magnitude",
        ),
    ],
)
def test_arguments_out_of_range_or_without_effect_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightPruning(**arguments)
    own = {"allocation": "dlp"} if "allocation" not in arguments else {}
    with pytest.raises(ValueError, match=message.replace("'uniform'", "'dlp'") if own else message):
        DLP(**arguments)


def refused_before_any_data(model, callback, error, message):
    with pytest.raises(error, match=message):
        callback.check(model)
    with pytest.raises(error, match=message):
        callback.plan(model, torch.zeros(0))  # the model is checked first


def test_a_pattern_that_divides_a_width_not_names_the_module(model):
    message = r"pattern=2:5 needs .* multiple of 5, model.layers.0.self_attn.q_proj has 32"
    refused_before_any_data(model, DLP(pattern="2:5"), ValueError, message)
    odd = tiny_model(intermediate_size=66)
    message = r"pattern=2:4 needs .* multiple of 4, model.layers.0.mlp.down_proj has 66"
    refused_before_any_data(odd, DLP(pattern="2:4"), ValueError, message)


def test_quantized_weights_are_refused():
    model = tiny_model()
    codes = torch.zeros(64, 32, dtype=torch.int8)
    decoder_layers(model)[2].mlp.up_proj.weight = nn.Parameter(codes, requires_grad=False)
    message = r"model.layers.2.mlp.up_proj is a quantized Linear \(torch.int8\): prune first"
    refused_before_any_data(model, DLP(0.5), TypeError, message)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (WINDOWS[0], r"must be token ids of shape \(num_samples, seq_len\)"),
        (WINDOWS.float(), r"must be token ids of shape \(num_samples, seq_len\)"),
        (WINDOWS + 1000, r"token id \d+ must lie in \[0, 127\]"),
        (token_windows(1, 129), "seq_len=129 must be at most 128, which the model allows"),
        ({"input_ids": WINDOWS, "attention_mask": torch.ones(4, 8)}, "attention_mask of shape"),
    ],
)
def test_windows_that_do_not_fit_are_refused(model, windows, message):
    with pytest.raises(ValueError, match=message):
        DLP(0.5).plan(model, windows)


def test_weights_that_are_nan_are_refused_by_name():
    model = tiny_model()
    with torch.no_grad():
        decoder_layers(model)[3].mlp.gate_proj.weight[5, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.3.mlp.gate_proj.*NaN"):
        DLP(0.5).plan(model, WINDOWS)
