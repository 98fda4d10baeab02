"""Equal parameters: what is counted before a pruning is what the pruned model has."""

import pytest
import torch
from tiny import tiny_model, token_windows

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.comparison.amounts.matching import ladder, nearest, own_ratio
from prunelight.comparison.methods import Entrant, entrants_of
from prunelight.models.sizes import parameter_count

ARGUMENTS = {
    "ShortGPT": {},
    "SLEB": {},
    "DepthPruning": {},
    "ShortenedLlama": {"score": "magnitude", "protected": []},
    "WidthPruning": {"multiple": 4},
    "SliceGPT": {"round_to": 2},
    "DynamicSlicing": {"round_to": 2, "base_ratio": 0.0},
}


def entrant(name, **arguments):
    (made,) = entrants_of([{"class_path": f"prunelight.callbacks.{name}", "init_args": arguments}])
    return made


@pytest.fixture(scope="module")
def windows():
    return token_windows(num_samples=32, seq_len=24)


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_share_that_is_counted_is_that_of_the_pruned_model(name, share, windows):
    one, model = entrant(name, **ARGUMENTS[name]), tiny_model(tie_word_embeddings=True)
    before = parameter_count(model)
    rung = nearest(one, model, share)
    assert parameter_count(model) == before
    method = one.make(rung.arguments)
    with torch.no_grad():
        plan = method.plan(model, windows)
        pruned = prunelight.apply(model, plan, windows)
    removed = 1 - parameter_count(pruned) / before
    # DynamicSlicing asks for a share, and takes the widths that remove at least so much.
    assert removed == pytest.approx(rung.share, abs=0.02 if name == "DynamicSlicing" else 1e-9)


def test_heads_that_the_config_prunes_count_too(windows):
    one = entrant("WidthPruning", multiple=4, head_ratio=0.5)
    model = tiny_model()
    before = parameter_count(model)
    rung = nearest(one, model, 0.3)
    method = one.make(rung.arguments)
    pruned = prunelight.apply(model, method.plan(model, windows), windows)
    assert 1 - parameter_count(pruned) / before == pytest.approx(rung.share, abs=1e-9)


@pytest.mark.parametrize("granularity", ["attention", "mlp"])
def test_sublayers_are_counted(granularity, windows):
    one, model = entrant("ShortGPT", granularity=granularity), tiny_model()
    before = parameter_count(model)
    rung = ladder(one, model)[1]
    plan = one.make(rung.arguments).plan(model, windows)
    pruned = prunelight.apply(model, plan, windows)
    # The norm before a sublayer goes with it, and is not counted.
    assert 1 - parameter_count(pruned) / before == pytest.approx(rung.share, abs=2e-3)


@pytest.mark.parametrize("name", [*ARGUMENTS, "WeightPruning", "DLP"])
def test_a_ladder_climbs(name):
    rungs = ladder(entrant(name, **ARGUMENTS.get(name, {})), tiny_model())
    shares = [rung.share for rung in rungs]
    assert shares == sorted(set(shares))
    assert 0 < shares[0] < shares[-1] < 1


@pytest.mark.parametrize("name", ["ShortGPT", "WidthPruning", "SliceGPT"])
def test_no_other_choice_is_nearer(name):
    one, model = entrant(name, **ARGUMENTS[name]), tiny_model()
    for target in (0.05, 0.2, 0.33):
        best = nearest(one, model, target)
        distances = [abs(rung.share - target) for rung in ladder(one, model)]
        assert abs(best.share - target) == min(distances)


def test_a_method_without_its_own_ratio_cannot_be_asked_by_it():
    class ByNumber(ShortGPT):
        def __init__(self, num_layers: int) -> None:
            super().__init__(num_layers=num_layers)

    made = Entrant("mine", ByNumber, {}, "depth")
    with pytest.raises(ValueError, match="mine has no argument ratio to be asked by; compare it"):
        own_ratio(made, 0.25)


def test_zeros_are_asked_for_as_zeros():
    assert nearest(entrant("DLP"), tiny_model(), 0.5).arguments == {"sparsity": 0.5}


def test_more_than_a_method_can_remove_is_refused():
    with pytest.raises(ValueError, match="WidthPruning can remove at most .* not 90.0%; lower"):
        nearest(entrant("WidthPruning", multiple=4), tiny_model(), 0.9)


def test_a_model_that_no_choice_makes_smaller_is_refused():
    with pytest.raises(ValueError, match="SliceGPT cannot make this model smaller"):
        ladder(entrant("SliceGPT", round_to=32), tiny_model())


def test_experts_have_no_neurons_to_prune():
    with pytest.raises(TypeError, match="has experts, whose neurons cannot be pruned"):
        ladder(entrant("WidthPruning"), tiny_model("mixtral"))


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_budget_leaves_no_more_than_was_asked_for(share, windows):
    one, model = entrant("BudgetPruning", multiple=1), tiny_model(tie_word_embeddings=True)
    before = parameter_count(model)
    rung = nearest(one, model, share)
    assert rung.share == share
    pruned = prunelight.apply(model, one.make(rung.arguments).plan(model, windows), windows)
    assert 1 - parameter_count(pruned) / before >= share
    assert [rung.share for rung in ladder(one, tiny_model())][:2] == [0.01, 0.02]
    with pytest.raises(ValueError, match="BudgetPruning has no argument ratio to be asked by"):
        own_ratio(one, share)
