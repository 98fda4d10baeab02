"""SlidingLayerMerging: the same decisions as whole forwards, at a fraction of the cost."""

import copy
import math

import pytest
import reference_sliding as reference
import torch
from lively_models import lively
from tiny import FAMILIES, NUM_LAYERS, tiny_model, token_windows

import prunelight
from prunelight.callbacks import SLEB, ShortenedLlama, SlidingLayerMerging
from prunelight.models.families.layers import decoder_layers
from prunelight.models.saving import verify
from prunelight.planning.fingerprints import describe_model, describe_windows
from prunelight.planning.steps import MERGES, MergeLayers
from prunelight.scoring.model_variants import VariantReplay
from prunelight.scoring.similarity import CRITERIA

WINDOWS = token_windows(4, 16)


@pytest.fixture(scope="module")
def model():
    """Read-only: planning changes nothing."""
    return lively(tiny_model(num_hidden_layers=8))


def groups_of(plan):
    (step,) = plan.steps
    assert isinstance(step, MergeLayers)
    return [(group[0], group[-1]) for group in step.groups]


# Both limits for each criterion, and for each way to merge.
LIMITS = [
    (criterion, merge, ("model", "merge")[(i + j) % 2])
    for i, criterion in enumerate(CRITERIA)
    for j, merge in enumerate(MERGES)
]


@pytest.mark.parametrize(("criterion", "merge", "limit"), LIMITS)
def test_decisions_and_scores_are_those_of_whole_forwards(model, criterion, merge, limit):
    callback = SlidingLayerMerging(
        num_layers=3, merge=merge, criterion=criterion, limit=limit, search="sliding"
    )
    threshold = callback.plan(model, WINDOWS).found["threshold"] + 1e-6
    for at in (threshold, (1 + threshold) / 2):
        groups, similarity, _ = reference.slide(
            model, WINDOWS, at, merge, criterion, by_merge=limit == "merge", protected=[7]
        )
        callback = SlidingLayerMerging(threshold=at, merge=merge, criterion=criterion, limit=limit)
        plan = callback.plan(model, WINDOWS)
        assert groups_of(plan) == sorted(groups)
        # float32 sums in another order; the reference is in float64 after the last layer.
        assert plan.found["similarity"] == pytest.approx(similarity, abs=2e-6)


@pytest.mark.parametrize("merge", MERGES)
def test_the_merged_model_is_that_of_the_rule_written_plainly(model, merge):
    plan = SlidingLayerMerging(num_layers=4, merge=merge).plan(model, WINDOWS)
    expected = reference.merged_model(model, groups_of(plan), merge)
    merged = prunelight.apply(copy.deepcopy(model), plan)
    assert merged.config.num_hidden_layers == 4
    for (name, found), (other, wanted) in zip(
        merged.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.allclose(found, wanted, atol=1e-6)
    measured = reference.similarity(model, merged, WINDOWS, "nll")
    assert plan.found["similarity"] == pytest.approx(measured, abs=2e-6)


def test_a_plan_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    for merge in MERGES:
        SlidingLayerMerging(num_layers=2, merge=merge).plan(model, WINDOWS)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.config.to_dict() == config
    assert not any("forward" in vars(module) for module in model.modules())


class LayerCount:
    """Counts layers and heads that run on whole calibration sets, independent of our own counts."""

    def __init__(self, model, windows):
        self.layers = self.heads = 0.0
        self.total = windows.numel()
        # At their MLPs: what stands in for a layer has none.
        mlps = [layer.mlp for layer in decoder_layers(model)]
        self.handles = [mlp.register_forward_hook(self.layer) for mlp in mlps]
        self.handles.append(model.lm_head.register_forward_hook(self.head))

    def layer(self, module, args, output):
        if output.shape[:2].numel() > 16:  # not the probe of a few tokens
            self.layers += output.shape[:2].numel() / self.total

    def head(self, module, args, output):
        self.heads += output.shape[:-1].numel() / self.total

    def close(self):
        for handle in self.handles:
            handle.remove()


def test_one_threshold_costs_half_and_a_search_no_more_than_the_naive_loop_with_one():
    model = lively(tiny_model(num_hidden_layers=8))
    for _ in range(2):  # 24 layers: the loop's cost grows with the square of the depth
        decoder_layers(model).extend(copy.deepcopy(decoder_layers(model)[:8]))
    model.config.num_hidden_layers = 24
    windows = token_windows(4, 64)
    count = LayerCount(model, windows)
    method = SlidingLayerMerging(num_layers=6, criterion="cosine", search="sliding")
    plan = method.plan(model, windows)
    search = count.layers
    count.layers = count.heads = 0
    threshold = plan.found["threshold"]
    callback = SlidingLayerMerging(threshold=threshold, limit="merge", criterion="cosine")
    one = callback.plan(model, windows)
    assert count.heads < 1, "the head has run on more than a probe"
    assert one.found["layer_forwards"] == pytest.approx(count.layers, abs=1)
    assert plan.found["layer_forwards"] == pytest.approx(search, abs=1)
    count.close()
    _, _, naive = reference.slide(
        model, windows, threshold, "top", "cosine", by_merge=True, protected=[23]
    )
    assert 2 * count.layers <= naive
    assert search <= 1.05 * naive  # CPUs round differently, and merges follow
    # Nor more than that loop if its threshold ended in just these windows.
    gone = {layer for low, high in groups_of(plan) for layer in range(low, high)}
    same = 24 + sum(23 - sum(layer > low for layer in gone) for low in range(22))
    assert search <= 1.05 * same


@pytest.mark.parametrize("merge", MERGES)
def test_layers_are_exchanged_where_the_loop_took_the_wrong_ones(merge):
    model = lively(tiny_model(num_hidden_layers=8))
    with torch.no_grad():
        for index in (2, 3):  # layers that do nothing; 2 alone can go without a trace
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.get_submodule(f"model.layers.{index}.{name}").weight.zero_()
    sliding = SlidingLayerMerging(num_layers=2, search="sliding")
    assert "restored" in sliding.plan(model, WINDOWS).found
    method = SlidingLayerMerging(num_layers=2, merge=merge, protected=[], search="sliding")
    plan = method.plan(model, WINDOWS)
    merged = prunelight.apply(copy.deepcopy(model), plan)
    measured = reference.similarity(model, merged, WINDOWS, "nll")
    assert plan.found["similarity"] == pytest.approx(measured, abs=2e-6)
    assert len(plan.found.get("restored", [])) == len(plan.found.get("merged_instead", []))


@pytest.mark.parametrize("criterion", ["nll", "kl"])
def test_a_measurement_runs_the_head_once(model, criterion):
    with VariantReplay(model, WINDOWS, criterion) as replay:
        count = LayerCount(model, WINDOWS)
        replay.score(4, replay.layers[5:])
        count.close()
    assert count.heads == 1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_itself_has_similarity_one(model, criterion):
    with VariantReplay(model, WINDOWS, criterion) as replay:
        assert replay.score(8, []) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_padding_does_not_count(model, criterion):
    short = WINDOWS[:, :11]
    ids = torch.cat([short, torch.full((4, 5), 7)], dim=1)
    mask = torch.cat([torch.ones_like(short), torch.zeros(4, 5, dtype=torch.long)], dim=1)
    callback = SlidingLayerMerging(num_layers=3, criterion=criterion)
    plain = callback.plan(model, short)
    padded = callback.plan(model, {"input_ids": ids, "attention_mask": mask})
    assert padded.steps == plain.steps
    assert padded.found["similarity"] == pytest.approx(plain.found["similarity"], abs=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ignored_first_tokens_do_not_count(model, criterion):
    # The first two tokens change nothing but what later ones see of them, so compare by hand.
    with VariantReplay(model, WINDOWS, criterion, ignore_first_tokens=3) as replay:
        found = replay.score(5, replay.layers[6:])
    other = reference.merged_model(model, [(5, 6)], "top")
    if criterion in ("cosine", "cosine_flat", "cka"):
        x, y = (reference.final_states(m, WINDOWS)[:, 3:] for m in (model, other))
        if criterion == "cosine":
            expected = torch.cosine_similarity(x, y, dim=-1).mean().item()
        elif criterion == "cosine_flat":
            expected = torch.cosine_similarity(x.flatten(1), y.flatten(1), dim=-1).mean().item()
        else:
            expected = reference.debiased_cka(x.flatten(0, 1), y.flatten(0, 1))
    else:
        with torch.no_grad():
            p, q = (
                m(WINDOWS, use_cache=False).logits.double().log_softmax(-1)[:, 3:]
                for m in (model, other)
            )
        if criterion == "kl":
            expected = math.exp(-(p.exp() * (p - q)).sum(-1).mean())
        else:
            at = WINDOWS[:, 4:, None]
            expected = math.exp((q[:, :-1].gather(2, at) - p[:, :-1].gather(2, at)).mean())
    assert found == pytest.approx(expected, abs=1e-6)


def test_kl_is_exact_where_logits_are_capped_scaled_or_have_a_bias():
    for family in ("gemma2", "granite", "phi", "cohere"):
        changes = {"logits_scaling": 3.0} if family == "granite" else {}
        model = tiny_model(family, **changes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6)  # logits that a cap of 30 bends
        with VariantReplay(model, WINDOWS, "kl") as replay:
            found = replay.score(2, replay.layers[4:])
        layers = decoder_layers(model)
        for index in (2, 3):
            layers[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
        with torch.no_grad():
            q = model(WINDOWS, use_cache=False).logits.double().log_softmax(-1)
            for index in (2, 3):
                del layers[index].forward
            p = model(WINDOWS, use_cache=False).logits.double().log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1).mean().item()
        assert found == pytest.approx(math.exp(-divergence), rel=1e-4), family
        assert divergence > 0.01, family


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_merged_and_reloads(family, tmp_path):
    model = tiny_model(family)
    dense = prunelight.perplexity(model, WINDOWS)
    # Nothing is protected: an RWKV's first block then hands its norm on.
    plan = SlidingLayerMerging(num_layers=2, protected=[]).plan(model, WINDOWS)
    merged = prunelight.apply(model, plan)
    measured = dense / prunelight.perplexity(merged, WINDOWS)
    assert plan.found["similarity"] == pytest.approx(measured, rel=1e-4)
    assert len(decoder_layers(merged)) == NUM_LAYERS - 2
    merged.save_pretrained(tmp_path)
    checked = verify(merged, tmp_path)
    assert ("cached generation" in checked) == (family != "rwkv"), checked  # see forward.py


def test_a_plan_says_what_it_was_made_from_and_what_was_found(model):
    callback = SlidingLayerMerging(ratio=0.25, criterion="cka", ignore_first_tokens=1)
    plan = callback.plan(model, WINDOWS)
    assert plan.method == "SlidingLayerMerging"
    assert plan.arguments == {
        "num_layers": None,
        "ratio": 0.25,
        "threshold": None,
        "merge": "top",
        "criterion": "cka",
        "limit": "merge",
        "ignore_first_tokens": 1,
        "protected": [-1],
        "search": None,
        "heal": "none",
    }
    assert SlidingLayerMerging(**plan.arguments).plan(model, WINDOWS) == plan
    assert plan.model == describe_model(model)
    assert plan.calibration == describe_windows(WINDOWS)
    assert sum(high - low for low, high in groups_of(plan)) == 2
    assert len(plan.scores["block_influence"]) == 8
    assert plan.scores["block_influence"][7] is None  # protected: it cannot go
    sliding = SlidingLayerMerging(ratio=0.25, search="sliding").plan(model, WINDOWS)
    assert len(sliding.scores["similarity_when_reached"]) == 8
    assert sliding.scores["similarity_when_reached"][7] is None  # protected: never measured
    cka = torch.tensor(plan.found["cka"])
    assert cka.shape == (9, 9)
    assert torch.equal(cka, cka.T)
    assert torch.allclose(cka.diagonal(), torch.ones(9))


@pytest.mark.parametrize("limit", ["model", "merge"])
def test_a_threshold_that_is_found_leads_to_the_same_windows_first(model, limit):
    plan = SlidingLayerMerging(num_layers=3, limit=limit, search="sliding").plan(model, WINDOWS)
    assert plan.found["limit"] == limit
    threshold = {name: plan.found[name] for name in ("threshold", "limit")}
    again = SlidingLayerMerging(**threshold).plan(model, WINDOWS)
    # Without a target to stop at, the pass may go on downwards.
    found, more = groups_of(plan)[::-1], groups_of(again)[::-1]
    assert more[: len(found) - 1] == found[:-1]
    (low, high), last = more[len(found) - 1], found[-1]
    assert high == last[1]
    assert low <= last[0]


def test_removing_no_layers_is_a_plan(model):
    for method in (SlidingLayerMerging(num_layers=0), SLEB(ratio=0.0)):
        plan = method.plan(model, WINDOWS)
        merged = prunelight.apply(copy.deepcopy(model), plan)
        assert merged.config.num_hidden_layers == 8


def test_a_threshold_that_merges_nothing_warns(model, caplog):
    plan = SlidingLayerMerging(threshold=1.0, criterion="cosine").plan(model, WINDOWS)
    assert groups_of(plan) == []
    assert "threshold=1.0 merges no layer of 8" in caplog.text
    SlidingLayerMerging(ratio=0.05).plan(model, WINDOWS)
    assert "ratio=0.05 merges no layer of 8" in caplog.text


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (SlidingLayerMerging, {}, "threshold=None: give exactly one of the three"),
        (SlidingLayerMerging, {"num_layers": 2, "ratio": 0.5}, "num_layers=2, ratio=0.5, .*one of"),
        (SlidingLayerMerging, {"num_layers": 2, "threshold": 0.5}, "threshold=0.5: give exactly"),
        (SlidingLayerMerging, {"threshold": 1.5}, "threshold=1.5 must be at most 1"),
        (SlidingLayerMerging, {"threshold": math.nan}, "threshold=nan must be a finite number"),
        (SlidingLayerMerging, {"num_layers": -1}, "num_layers=-1 must be at least 0"),
        (SlidingLayerMerging, {"ratio": 1.0}, r"ratio=1.0 must lie in \[0, 1\)"),
        (SlidingLayerMerging, {"num_layers": 1, "merge": "sum"}, "merge='sum' must be one of top"),
        (SlidingLayerMerging, {"num_layers": 1, "criterion": "mse"}, "must be one of cosine, cka"),
        (SlidingLayerMerging, {"num_layers": 1, "limit": "layer"}, "limit='layer' must be one of"),
        (SlidingLayerMerging, {"num_layers": 1, "ignore_first_tokens": -1}, "must be at least 0"),
        (SlidingLayerMerging, {"threshold": 0.5, "search": "swaps"}, "has no effect with thresho"),
        (
            SlidingLayerMerging,
            {"num_layers": 1, "limit": "model", "search": "swaps"},
            "limit='model'; give num_layers or ratio",
        ),
        (SlidingLayerMerging, {"num_layers": 1, "search": "slide"}, "search='slide' must be one"),
        (SLEB, {}, "give exactly one of the two"),
        (SLEB, {"num_layers": 1, "criterion": "mse"}, "criterion='mse' must be one of cosine"),
        (ShortenedLlama, {"ratio": -0.1}, "must lie in"),
        (
            ShortenedLlama,
            {"num_layers": 1, "score": "hessian"},
            "must be one of perplexity, taylor",
        ),
    ],
)
def test_bad_arguments_are_refused(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SlidingLayerMerging(num_layers=8), "would remove 8 of 8 decoder layers"),
        (SlidingLayerMerging(num_layers=7), r"spare protected=\[7\] can remove at most 6"),
        (SlidingLayerMerging(num_layers=6, protected=[0, -1]), r"protected=\[0, 7\] .* most 5"),
        (SlidingLayerMerging(num_layers=1, protected=[9]), r"protected=\[9\] must lie in"),
        (SLEB(num_layers=7), "only 6 of 8 are not protected"),
        (ShortenedLlama(num_layers=3, score="magnitude"), "only 2 of 8 are not protected"),
    ],
)
def test_targets_out_of_reach_are_refused_before_any_forward(model, method, message, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=message):
        method.plan(model, WINDOWS)


@pytest.mark.parametrize("merge", ["difference_sum", "released", "mean"])
@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", "layers 0 and 1 of gemma2 cannot be mixed .*layer_type is 'sliding_attention'"),
        ("mixtral", "mlp.experts.*not aligned from layer to layer; take merge='top'"),
        ("qwen3_moe", "layers 0 and 1 of qwen3_moe cannot be mixed"),
        ("rwkv", "layers 0 and 1 of rwkv cannot be mixed .*pre_ln"),
    ],
)
def test_layers_of_different_kinds_are_not_mixed(family, message, merge):
    with pytest.raises(TypeError, match=message):
        SlidingLayerMerging(num_layers=1, merge=merge).plan(tiny_model(family), WINDOWS)


def test_a_plan_by_hand_may_mix_layers_of_one_kind_only():
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    plan = SlidingLayerMerging(num_layers=1, merge="top").plan(model, WINDOWS)
    mixing = {"method": "by hand", "arguments": {}, "model": plan.model, "format": 1}

    def planned(group):
        steps = [{"kind": "merge_layers", "groups": [group], "merge": "mean"}]
        return prunelight.Plan.from_dict({**mixing, "steps": steps})

    with pytest.raises(TypeError, match="decoder layers 2 and 3 .*layer_type"):
        prunelight.apply(model, planned([2, 3]))
    assert model.config.num_hidden_layers == 6
    assert prunelight.apply(model, planned([3, 4])).config.num_hidden_layers == 5


def test_windows_without_a_token_that_counts_are_refused(model):
    with pytest.raises(
        ValueError,
        match="ignore_first_tokens=16 must be below 16",
    ):
        SlidingLayerMerging(num_layers=1, ignore_first_tokens=16).plan(model, WINDOWS)


@pytest.mark.parametrize(
    ("windows", "arguments"),
    [
        (WINDOWS[:, :1], {}),
        (WINDOWS, {"ignore_first_tokens": 15}),
        ({"input_ids": WINDOWS, "attention_mask": torch.eye(4, 16, dtype=torch.long)}, {}),
    ],
)
def test_windows_that_predict_nothing_are_refused(model, windows, arguments):
    with pytest.raises(ValueError, match="predict 0 tokens"):
        SlidingLayerMerging(num_layers=1, **arguments).plan(model, windows)
    if not arguments:
        for method in (SLEB(1 / 8), ShortenedLlama(1 / 8), ShortenedLlama(1 / 8, None, "taylor")):
            with pytest.raises(ValueError, match="predict 0 tokens"):
                method.plan(model, windows)


BROKEN = [
    *(SlidingLayerMerging(num_layers=2, criterion=criterion) for criterion in CRITERIA),
    SlidingLayerMerging(threshold=0.5),
    SLEB(num_layers=1),
    ShortenedLlama(num_layers=1),
]


@pytest.mark.parametrize("method", BROKEN, ids=lambda m: f"{type(m).__name__}, {m.arguments()}")
def test_states_that_are_nan_are_named_by_their_layer(model, method):
    broken = copy.deepcopy(model)
    broken.model.layers[3].mlp.down_proj.weight.data.fill_(3e38)
    broken.model.layers[3].post_attention_layernorm.weight.data.fill_(1e30)  # overflows
    with pytest.raises(ValueError, match="NaN in the hidden states after decoder layer 3"):
        method.plan(broken, WINDOWS)


def test_a_variant_that_overflows_is_refused_and_the_search_goes_on():
    model = lively(tiny_model(num_hidden_layers=8))
    with torch.no_grad():
        for index, value in ((2, -40000), (3, 40000), (4, 40000)):  # a sum of 120000
            mlp = model.model.layers[index].mlp
            mlp.gate_proj.weight[0] = 0  # so that the dense model does not care
            mlp.down_proj.weight[0, 0] = value
    model.half()
    for criterion in CRITERIA:
        method = SlidingLayerMerging(num_layers=5, merge="difference_sum", criterion=criterion)
        # From a lower layer on, the sum of differences stays small enough.
        assert not any(
            low == 2 and high >= 4 for low, high in groups_of(method.plan(model, WINDOWS))
        )


def test_rows_without_a_token_that_counts_do_no_harm(model):
    mask = torch.ones(4, 1040, dtype=torch.long)
    mask[0, 1:] = 0  # a micro-batch of its own, whose only token is left out of the map
    windows = {"input_ids": token_windows(4, 1040) % 128, "attention_mask": mask}
    long = lively(tiny_model(num_hidden_layers=8, max_position_embeddings=2048))
    for criterion in ("nll", "cka"):
        plan = SlidingLayerMerging(num_layers=1, criterion=criterion).plan(long, windows)
        assert len(plan.found["cka"]) == 9


def test_the_map_of_a_padded_set_is_that_of_the_texts_alone(model):
    ids = torch.cat([torch.full((4, 5), 7), WINDOWS], dim=1)
    mask = torch.cat([torch.zeros(4, 5, dtype=torch.long), torch.ones_like(WINDOWS)], dim=1)
    padded = {"input_ids": ids, "attention_mask": mask}
    maps = [
        SlidingLayerMerging(num_layers=1).plan(model, windows).found["cka"]
        for windows in (WINDOWS, padded)
    ]
    assert torch.allclose(*map(torch.tensor, maps), atol=2e-4)


def test_without_enough_tokens_there_is_no_map_but_a_plan(model, caplog):
    plan = SlidingLayerMerging(num_layers=1).plan(model, WINDOWS[:1, :4])
    assert "cka" not in plan.found
    assert "no CKA map: CKA needs states" in caplog.text


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_router_losses_do_not_get_in_the_way(family):
    model = tiny_model(family, output_router_logits=True)
    plan = SlidingLayerMerging(num_layers=1).plan(model, WINDOWS)
    assert model.config.output_router_logits
    dense = prunelight.perplexity(model, WINDOWS)
    measured = dense / prunelight.perplexity(prunelight.apply(model, plan), WINDOWS)
    assert plan.found["similarity"] == pytest.approx(measured, rel=1e-4)


def test_layers_of_different_kinds_are_called_as_what_they_are():
    model = lively(tiny_model("gemma3_text", head_dim=8, sliding_window=4, num_hidden_layers=8))
    dense = prunelight.perplexity(model, WINDOWS)
    plan = SlidingLayerMerging(num_layers=4).plan(model, WINDOWS)
    measured = dense / prunelight.perplexity(prunelight.apply(model, plan), WINDOWS)
    assert plan.found["similarity"] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda **a: SlidingLayerMerging(num_layers=2, **a),
        lambda **a: SLEB(num_layers=2, **a),
        lambda **a: ShortenedLlama(num_layers=2, **a),
    ],
)
def test_where_states_wait_and_layers_compute_changes_nothing(model, make):
    plain, elsewhere = make(), make(offload_activations=True)
    elsewhere.device = torch.device("cpu:0")
    assert elsewhere.plan(model, WINDOWS) == plain.plan(model, WINDOWS)
    assert model.device == torch.device("cpu")


def test_the_paper_is_the_default_where_a_threshold_is_given():
    assert SlidingLayerMerging(threshold=0.5).limit == "model"
    assert SlidingLayerMerging(ratio=0.5).limit == "merge"


@pytest.mark.parametrize(
    "method",
    [SLEB(num_layers=1), ShortenedLlama(num_layers=1), SlidingLayerMerging(num_layers=1)],
)
def test_layers_that_depend_on_their_index_are_not_removed(method):
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        method.plan(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), WINDOWS)
