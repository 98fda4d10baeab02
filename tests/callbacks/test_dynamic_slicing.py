"""DynamicSlicing and SliceGPT as callbacks: widths, targets, sweeps, and what they refuse."""

import copy
import json
import logging

import pytest
import torch
from runs import SEQ_LEN, make_data, make_module, make_trainer, write_model
from sliced_models import WINDOWS, dense_model, logits
from tiny import tiny_model, token_windows

import prunelight
from prunelight.callbacks import DLP, DynamicSlicing, ShortGPT, SliceGPT
from prunelight.models.families.matrices import matrices
from prunelight.models.sizes import parameter_count
from prunelight.planning.slice_widths import (
    redundancies,
)
from prunelight.scoring.block_influence import block_influences
from prunelight.training.text_datamodule import TextDataModule


def test_a_base_equal_to_the_ratio_is_slicegpt():
    even = DynamicSlicing(0.25, 0.25).plan(dense_model(), WINDOWS).steps
    assert even == SliceGPT(0.25).plan(dense_model(), WINDOWS).steps


def test_widths_follow_the_redundancy_and_each_layer_has_one():
    model = dense_model()
    plan = DynamicSlicing(0.3, 0.0, round_to=1).plan(model, WINDOWS)
    dims, redundancy = plan.steps[0].residual_dims, plan.scores["layer_redundancy"]
    assert (dims[0], dims[-1]) == (32, 32)
    widths = dims[1:-1:2]
    assert dims[2:-1:2] == widths[1:]
    order = sorted(range(6), key=lambda i: redundancy[i])
    assert [widths[i] for i in order] == sorted(widths, reverse=True)
    assert sum(widths) == round(0.7 * 32 * 6)
    assert redundancy == redundancies(block_influences(model, WINDOWS).mean)


def test_embeddings_of_untied_models_are_sliced_unless_told_otherwise():
    untied = dense_model(tied=False)
    assert SliceGPT(0.25).plan(untied, WINDOWS).steps[0].residual_dims[0] == 24
    assert SliceGPT(0.25, embedding="full").plan(untied, WINDOWS).steps[0].residual_dims[0] == 32
    plan = DynamicSlicing(0.25, 0.0, embedding="sliced").plan(dense_model(), WINDOWS)
    assert plan.steps[0].residual_dims[0] == plan.steps[0].residual_dims[1]


def test_a_sweep_takes_the_base_with_the_lowest_perplexity_on_windows_held_out():
    method = DynamicSlicing(0.3, [0.3, 0.15, 0.0], round_to=2)
    plan = method.plan(dense_model(), WINDOWS)
    tried = plan.found["perplexity_of_base_ratio"]
    assert list(tried) == ["0.3", "0.15", "0"]
    assert tried[f"{plan.found['base_ratio']:.4g}"] == min(tried.values())
    # By hand: sliced on the first six windows, judged on the last two.
    for base, told in tried.items():
        step = DynamicSlicing(0.3, float(base), round_to=2)
        by_hand = step.plan(dense_model(), WINDOWS)
        model = prunelight.apply(copy.deepcopy(dense_model()), by_hand, WINDOWS[:6])
        assert prunelight.perplexity(model, WINDOWS[6:]) == pytest.approx(told, rel=1e-4)


def test_a_sweep_leaves_the_model_alone_and_tries_five_bases_by_default():
    model = copy.deepcopy(dense_model())
    plan = DynamicSlicing(0.25, round_to=2).plan(model, WINDOWS)
    assert len(plan.found["perplexity_of_base_ratio"]) == 5
    assert torch.equal(logits(model), logits(dense_model()))


def test_a_sweep_needs_two_windows():
    with pytest.raises(ValueError, match="1 calibration window cannot choose among 5 bases"):
        DynamicSlicing(0.25, round_to=2).plan(dense_model(), WINDOWS.reshape(1, -1))


# --- shares by hand, a text of its own for the scores, single cuts -------------------------------


def test_equal_shares_by_hand_are_slicegpt_and_each_layer_may_have_its_own():
    model = dense_model()
    even = DynamicSlicing(slice_ratios=[0.25] * 6).plan(model, WINDOWS)
    assert even.steps == SliceGPT(0.25).plan(model, WINDOWS).steps
    shares = [0.0, 0.5, 0.25, 0.3, 0.0, 0.75]
    plan = DynamicSlicing(slice_ratios=shares).plan(model, WINDOWS)
    assert plan.steps[0].residual_dims[1::2] == (32, 16, 24, 16, 32, 8)  # down to multiples of 8
    assert plan.found["slice_ratio"] == pytest.approx(1 - 128 / 192)
    assert plan.arguments["slice_ratios"] == shares
    assert plan.scores == {}
    pruned = prunelight.apply(copy.deepcopy(model), plan, WINDOWS)
    assert parameter_count(pruned) == plan.found["parameters"]


def test_shares_by_hand_are_one_for_each_layer():
    method = DynamicSlicing(slice_ratios=[0.25] * 5)
    with pytest.raises(ValueError, match="slice_ratios holds 5 shares for 6 decoder layers; give"):
        method.plan(dense_model(), WINDOWS)
    with pytest.raises(ValueError, match="round_to=8 leaves nothing of hidden_size=32"):
        DynamicSlicing(slice_ratios=[0.25] * 5 + [0.9]).check(dense_model())


def test_layers_are_scored_on_a_text_of_their_own_and_rotated_on_the_other():
    model, other = copy.deepcopy(dense_model()), token_windows(8, 16, seed=9)
    method = DynamicSlicing(0.3, 0.0, round_to=1)
    plan = method.plan(model, WINDOWS, redundancy_windows=other)
    assert plan.scores["block_influence"] == block_influences(model, other).mean
    assert plan.scores["block_influence"] != block_influences(model, WINDOWS).mean
    assert plan.calibration == method.plan(model, WINDOWS).calibration
    assert plan.found["redundancy_windows"]["fingerprint"] != plan.calibration["fingerprint"]
    same = method.plan(model, WINDOWS, redundancy_windows=WINDOWS)
    assert same.steps == method.plan(model, WINDOWS).steps


def test_a_fit_scores_on_the_text_that_the_method_names(name, tmp_path):
    text = tmp_path / "other.txt"
    bases = []
    for words in ("a b c d e f g h ", "zebra quick brown fox "):
        text.write_text(words * 400)
        root = tmp_path / words[0]
        root.mkdir()
        method = DynamicSlicing(0.3, 0.0, redundancy_text=str(text))
        make_trainer(root, method).fit(make_module(name), make_data(name, tmp_path))
        bases += [path.name for path in root.glob("pruned-*")]
        (plan,) = json.loads((root / "report.json").read_text())["plans"]
        assert plan["arguments"]["redundancy_text"] == str(text)
        assert plan["found"]["redundancy_windows"]["num_samples"] == 4
        model, tokenizer = prunelight.load(name)
        drawn = TextDataModule(tokenizer, calibration=str(text), seq_len=SEQ_LEN, num_calibration=4)
        expected = block_influences(model, drawn.calibration_windows()).mean
        assert plan["scores"]["block_influence"] == pytest.approx(expected)
    assert len({*bases}) == 2, "another content of the file is another base"


def test_a_text_of_its_own_that_cannot_be_read_is_named_before_anything_is_computed(name, tmp_path):
    method = DynamicSlicing(0.3, 0.0, redundancy_text="nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"redundancy_text='nowhere.txt': .*does not exist"):
        make_trainer(tmp_path, method).fit(make_module(name), make_data(name, tmp_path))
    assert not list(tmp_path.glob("pruned-*"))
    nameless = tiny_model()
    nameless.config._name_or_path = ""
    method = DynamicSlicing(0.3, 0.0, round_to=2, redundancy_text="sample:validation")
    with pytest.raises(ValueError, match="this model has no name to find it by; load it with"):
        method.plan(nameless, WINDOWS)


def test_the_layer_whose_cut_alone_costs_least_is_the_most_redundant():
    model = dense_model()
    plan = DynamicSlicing(0.5, 0.0, score="single_cut").plan(model, WINDOWS)
    told, redundancy = plan.scores["single_cut"], plan.scores["layer_redundancy"]
    assert redundancy[told.index(min(told))] == 1
    assert redundancy[told.index(max(told))] == 0
    for layer in (0, 3):  # by hand: sliced on the first six windows, judged on the last two
        shares = [0.5 if i == layer else 0.0 for i in range(6)]
        alone = DynamicSlicing(slice_ratios=shares).plan(model, WINDOWS)
        cut = prunelight.apply(copy.deepcopy(model), alone, WINDOWS[:6])
        assert prunelight.perplexity(cut, WINDOWS[6:]) == pytest.approx(told[layer], rel=1e-4)
    with pytest.raises(ValueError, match="1 calibration window cannot score layers by score='sin"):
        DynamicSlicing(0.5, 0.0, score="single_cut").plan(model, WINDOWS.reshape(1, -1))


NO_EFFECT = {
    "slice_ratio": {"slice_ratio": 0.2},
    "parameter_ratio": {"parameter_ratio": 0.2},
    "base_ratio": {"base_ratio": 0.1},
    "redundancy_text": {"redundancy_text": "alpaca"},
    "score": {"score": "single_cut"},
}


@pytest.mark.parametrize("argument", NO_EFFECT)
def test_arguments_without_effect_beside_shares_by_hand_are_refused(argument):
    with pytest.raises(ValueError, match=f"{argument}=.* has no effect with slice_ratios"):
        DynamicSlicing(slice_ratios=[0.2] * 6, **NO_EFFECT[argument])


def test_windows_to_score_on_that_have_no_effect_are_refused():
    for method, told in (
        (DynamicSlicing(slice_ratios=[0.2] * 6), "slice_ratios="),
        (DynamicSlicing(0.2, redundancy_text="alpaca"), "redundancy_text='alpaca'"),
        (DynamicSlicing(0.2, score="single_cut"), "score='single_cut'"),
    ):
        with pytest.raises(ValueError, match=f"redundancy_windows has no effect with {told}"):
            method.plan(dense_model(), WINDOWS, redundancy_windows=WINDOWS)


PARAMETER_TARGETS = {
    "SliceGPT": lambda r: SliceGPT(parameter_ratio=r, round_to=1),
    "SliceGPT, shared": lambda r: SliceGPT(parameter_ratio=r, round_to=1, rotation="shared"),
    "DynamicSlicing": lambda r: DynamicSlicing(parameter_ratio=r, base_ratio=0.05, round_to=1),
    "DynamicSlicing, sweep": lambda r: DynamicSlicing(parameter_ratio=r, round_to=1),
}


@pytest.mark.parametrize("method", PARAMETER_TARGETS)
@pytest.mark.parametrize("ratio", [0.05, 0.3])
@pytest.mark.parametrize("tied", [True, False])
def test_a_parameter_target_is_met_by_the_widest_model_that_does(method, ratio, tied):
    model = copy.deepcopy(dense_model(tied=tied))
    dense = parameter_count(model)
    plan = PARAMETER_TARGETS[method](ratio).plan(model, WINDOWS)
    model = prunelight.apply(model, plan, WINDOWS)
    removed = 1 - parameter_count(model) / dense
    assert ratio <= removed < ratio + (0.12 if "shared" in method else 0.06)
    assert plan.found["parameters"] == parameter_count(model)
    assert plan.found["parameters_before"] == dense


def test_a_small_slice_that_adds_parameters_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        SliceGPT(0.05, round_to=1).plan(dense_model(), WINDOWS)
        assert "makes the model larger" in caplog.text
        caplog.clear()
        SliceGPT(0.5).plan(dense_model(), WINDOWS)
    assert not caplog.text


@pytest.mark.parametrize("base", [0.25, 0.1, 0.0])
def test_all_bases_slice_the_same_mean_whatever_the_rounding(base):
    plan = DynamicSlicing(0.25, base, round_to=5).plan(dense_model(), WINDOWS)
    widths = plan.steps[0].residual_dims[1::2]
    assert sum(widths) == 5 * round(0.75 * 32 * 6 / 5)
    assert plan.found["slice_ratio"] == pytest.approx(1 - sum(widths) / (32 * 6))


def test_a_layer_that_would_lose_more_than_its_width_is_told(caplog):
    method = DynamicSlicing(0.4, 0.05, round_to=1)
    with caplog.at_level(logging.WARNING):
        method._warn_if_clipped([1.0] + [0.0] * 7, 0.4, 0.05)
        assert "base_ratio=0.05 lets a layer lose 2.85 of its width at a mean of 0.4" in caplog.text
        caplog.clear()
        method._warn_if_clipped([1.0, 0.9, 0.8], 0.4, 0.05)
    assert not caplog.text


def test_one_rotation_says_which_width_the_config_class_made_of_the_ratio(caplog):
    model = copy.deepcopy(dense_model())
    with caplog.at_level(logging.WARNING):
        SliceGPT(0.3, rotation="shared", round_to=1).plan(model, WINDOWS)
    assert "slice_ratio=0.3 became 0.375: LlamaConfig accepts hidden_size=20" in caplog.text


def test_a_base_above_the_mean_that_the_parameters_need_is_refused():
    method = DynamicSlicing(parameter_ratio=0.05, base_ratio=0.6, round_to=1)
    with pytest.raises(ValueError, match=r"base_ratio=0.6 must be at most 0\.\d+, the mean ratio"):
        method.plan(dense_model(), WINDOWS)


def test_few_different_tokens_are_refused_before_anything_is_computed():
    same = torch.arange(5, 17).repeat(8, 4)
    message = (
        "12 different calibration tokens are too few for embeddings of width 24; .* at least 24"
    )
    for method in (SliceGPT(0.25), DynamicSlicing(0.25, 0.25)):
        with pytest.raises(ValueError, match=message):
            method.plan(dense_model(tied=False), same)
    SliceGPT(0.25).check_calibration(dense_model(), same)  # embeddings left whole


def test_a_sweep_without_tokens_to_judge_by_is_refused():
    mask = torch.ones_like(WINDOWS)
    mask[6:] = 0
    method = DynamicSlicing(0.3, [0.3, 0.0], round_to=2)
    with pytest.raises(ValueError, match="the 2 windows held out cannot judge a slicing: 0 tokens"):
        method.plan(dense_model(), {"input_ids": WINDOWS, "attention_mask": mask})


WRONG = {
    "share by hand": (
        lambda: DynamicSlicing(slice_ratios=[0.2, 1.0]),
        r"slice_ratios\[1\]=1.0 must lie in \[0, 1\)",
    ),
    "no share by hand": (lambda: DynamicSlicing(slice_ratios=[]), "slice_ratios=.* not be empty"),
    "score": (lambda: DynamicSlicing(0.3, score="no"), "score='no' must be one of block_influence"),
    "no text": (lambda: DynamicSlicing(0.3, redundancy_text=""), "redundancy_text=.*not be empty"),
    "a text that nothing is scored on": (
        lambda: DynamicSlicing(0.3, redundancy_text="c4", score="single_cut"),
        "redundancy_text='c4' has no effect with score='single_cut'",
    ),
    "no ratio": (lambda: SliceGPT(), "give exactly one"),
    "both ratios": (lambda: SliceGPT(0.2, parameter_ratio=0.2), "give exactly one"),
    "ratio of 1": (lambda: DynamicSlicing(1.0), r"slice_ratio=1.0 must lie in \[0, 1\)"),
    "parameters": (lambda: SliceGPT(parameter_ratio=-0.1), r"parameter_ratio=-0.1 must lie in"),
    "base above": (
        lambda: DynamicSlicing(0.3, 0.4),
        r"base_ratio=0.4 must lie in \[0, slice_ratio=0.3\]: no layer loses less",
    ),
    "base of no ratio": (
        lambda: DynamicSlicing(parameter_ratio=0.2, base_ratio=1.5),
        r"base_ratio=1.5 must lie in \[0, 1\]",
    ),
    "one base below": (lambda: DynamicSlicing(0.3, [0.1, -0.1]), "base_ratio=-0.1 must lie in"),
    "no base": (lambda: DynamicSlicing(0.3, []), r"base_ratio=\[\] names no ratio"),
    "rounding": (lambda: SliceGPT(0.3, round_to=0), "round_to=0 must be at least 1"),
    "embedding": (lambda: SliceGPT(0.3, embedding="no"), "embedding='no' must be one of auto"),
    "signal": (lambda: SliceGPT(0.3, signal="no"), "signal='no' must be one of"),
    "orientation": (lambda: DynamicSlicing(0.3, orientation="no"), "orientation='no' must be"),
    "rotation": (lambda: SliceGPT(0.3, rotation="no"), "rotation='no' must be one of per_layer"),
    "full and shared": (
        lambda: SliceGPT(0.3, rotation="shared", embedding="full"),
        "embedding='full' has no effect with rotation='shared'",
    ),
    "code of a stock class": (
        lambda: SliceGPT(0.3, rotation="shared", export_remote_code=True),
        "export_remote_code=True has no effect with rotation='shared'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_out_of_range_are_named_with_the_rule(case):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()


IMPOSSIBLE = {
    "SliceGPT": (lambda: SliceGPT(0.9, round_to=8), "round_to=8 leaves nothing of hidden_size=32"),
    "DynamicSlicing": (lambda: DynamicSlicing(0.9, 0.1), "round_to=8 leaves nothing"),
    "parameters": (
        lambda: SliceGPT(parameter_ratio=0.99),
        "parameter_ratio=0.99 cannot be met by slicing: .* lower it",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_targets_that_the_model_cannot_meet_are_refused_before_any_forward(case):
    make, message = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match=message):
        make().check(tiny_model())


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny", tie_word_embeddings=True)


def test_slicing_after_zeros_is_refused_in_one_run_and_over_two(name, tmp_path):
    trainer = make_trainer(tmp_path, DLP(0.5), SliceGPT(0.25))
    with pytest.raises(ValueError, match="DLP comes before SliceGPT, whose rotations fill"):
        trainer.fit(make_module(name), make_data(name, tmp_path))
    assert not list(tmp_path.glob("pruned-*"))
    data = make_data(name, tmp_path)
    make_trainer(tmp_path, DLP(0.5)).fit(make_module(name, recovery="none"), data)
    again = make_trainer(tmp_path / "next", DynamicSlicing(0.25, 0.0))
    with pytest.raises(ValueError, match="put zeros into .*slice the dense model first"):
        again.fit(make_module(str(tmp_path / "final")), data)


WRONG_ORDER = {
    "layers after": (SliceGPT(0.25), ShortGPT(num_layers=2), "ShortGPT comes after SliceGPT, and"),
    "slicing twice": (
        DynamicSlicing(0.25, 0.0),
        SliceGPT(0.25),
        "SliceGPT comes after DynamicSlicing, and cannot prune a sliced model; put it before",
    ),
    "sublayers before": (
        ShortGPT(num_layers=2, granularity="mlp"),
        SliceGPT(0.25),
        "ShortGPT drops sublayers, or .*, before SliceGPT, which cannot slice what is left",
    ),
}


@pytest.mark.parametrize("case", WRONG_ORDER)
def test_an_order_that_cannot_work_is_refused_before_anything_is_computed(case, name, tmp_path):
    *methods, message = WRONG_ORDER[case]
    data = make_data(name, tmp_path)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, *methods).fit(make_module(name), data)
    assert not list(tmp_path.glob("pruned-*"))


def test_zeros_may_follow_in_the_same_run_and_layers_where_the_class_is_stock(name, tmp_path):
    for root, after in (("a", DLP(0.5)), ("b", ShortGPT(num_layers=2))):
        first = SliceGPT(0.25, rotation="shared") if root == "b" else SliceGPT(0.25)
        trainer = make_trainer(tmp_path / root, first, after)
        (tmp_path / root).mkdir()
        trainer.fit(make_module(name, recovery="none"), make_data(name, tmp_path / root))
        assert (tmp_path / root / "final").is_dir()


def test_too_few_tokens_are_told_before_the_dense_model_is_evaluated(name, tmp_path):
    data = make_data(name, tmp_path, seq_len=8, num_calibration=3)
    trainer = make_trainer(tmp_path, SliceGPT(0.25))
    with pytest.raises(ValueError, match="24 calibration tokens are too few for the 32 principal"):
        trainer.fit(make_module(name), data)
    data = make_data(name, tmp_path, seq_len=8, num_calibration=4)
    trainer = make_trainer(tmp_path, DynamicSlicing(0.25))
    with pytest.raises(ValueError, match="24 calibration tokens .*; 1 of 4 windows choose"):
        trainer.fit(make_module(name), data)


def test_layers_may_be_removed_before_slicing(name, tmp_path):
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2), SliceGPT(0.25))
    trainer.fit(make_module(name), make_data(name, tmp_path))
    model, _ = prunelight.load(tmp_path / "final")
    assert model.config.residual_dims == [32, *[24] * 7, 32]


def test_a_fit_with_exported_code_leaves_it_beside_base_and_result(name, tmp_path):
    trainer = make_trainer(tmp_path, SliceGPT(0.25, export_remote_code=True))
    trainer.fit(make_module(name), make_data(name, tmp_path))
    (base,) = tmp_path.glob("pruned-*")
    assert all((directory / "sliced.py").is_file() for directory in (base, tmp_path / "final"))


def test_zeros_that_nothing_describes_are_told_before_rotations_fill_them(caplog):
    model = copy.deepcopy(dense_model())
    with torch.no_grad():
        for matrix in matrices(model).values():
            matrix.parameter[:, ::2] = 0
    SliceGPT(0.25).plan(model, WINDOWS)
    assert "SliceGPT fills the zeros of the model's matrices; slice the dense" in caplog.text
