"""Time to the first token, tokens per second and memory, of models in turn."""

import statistics
import time
from dataclasses import asdict, replace

import pytest
import torch
from tiny import tiny_model

from prunelight.evaluation.report.record import Stage
from prunelight.evaluation.serving import cost as serving
from prunelight.evaluation.serving.cost import ServingExaminer, serving_cost, stage_speeds
from prunelight.evaluation.serving.measured import ServingProtocol, compare_batches, measure_cost
from prunelight.evaluation.serving.shape import shape_cost
from prunelight.evaluation.serving.timing import Spread, in_turn, time_generation
from prunelight.evaluation.speed import Architecture
from prunelight.runtime.measuring import memory_growth
from prunelight.runtime.processes import ProcessGroup

BRIEF = ServingProtocol(
    prompt_tokens=6, new_tokens=3, batch_size=4, num_rounds=3, num_batch_rounds=1
)


def slowed(seconds, **changes):
    """Return a tiny model each of whose forwards takes so many seconds longer."""
    model = tiny_model(**changes)
    model.register_forward_pre_hook(lambda module, args: time.sleep(seconds))
    return model


def slowing(seconds, growth):
    """Return a tiny model each of whose forwards takes longer than the one before it."""
    model, waits = tiny_model(), [seconds]

    def wait(module, args):
        time.sleep(waits[0])
        waits[0] *= growth

    model.register_forward_pre_hook(wait)
    return model


def shapes_of_forwards(model):
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return shapes


def test_rounds_go_to_and_fro_after_the_warm_up():
    order = []
    answers = in_turn([lambda: order.append("a"), lambda: order.append("b")], 3, warmups=1)
    assert "".join(order) == "baabbaab"
    assert [len(times) for times in answers] == [3, 3]


def test_no_further_round_begins_once_patience_ends_but_three_always_do():
    calls = []
    (times,) = in_turn([lambda: calls.append(0)], 9, patience=0.0)
    assert len(calls) == 1 + 3
    assert len(times) == 3


def test_a_spread_leaves_out_the_most_extreme_round_on_each_side():
    values = [1.1, 9.0, 1.2, 1.3, 0.1, 1.4]
    assert Spread.of(values) == Spread(statistics.median(values), 1.1, 1.4)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_the_first_token_takes_one_forward_and_each_other_token_one_more():
    timed = time_generation(slowed(0.05), torch.arange(3, 9)[None], 4)
    assert 0.05 <= timed.first_token < 0.15
    assert 3 * 0.05 <= timed.decode < 0.3


def test_a_batch_is_timed_as_the_protocol_says():
    model = slowed(0.02)
    shapes = shapes_of_forwards(model)
    (cost,) = measure_cost([model], BRIEF)
    alone, together = [(1, 6), (1, 1), (1, 1)], [(4, 6), (4, 1), (4, 1)]
    assert shapes == alone * (1 + 3) + together * (1 + 1)
    for batch in cost.batches:
        first = batch.time_to_first_token.median
        assert batch.prefill_tokens_per_second.median == pytest.approx(batch.batch_size * 6 / first)
        seconds = statistics.median(generation.decode for generation in batch.rounds)
        decoded = batch.batch_size * 2
        assert batch.decode_tokens_per_second.median == pytest.approx(decoded / seconds)
        assert seconds >= 2 * 0.02
    assert cost.notes == ()


def test_a_batch_may_have_shorter_prompts_or_be_left_out():
    model = tiny_model()
    shapes = shapes_of_forwards(model)
    protocol = ServingProtocol(8, 2, 3, batch_prompt_tokens=5, num_rounds=1, num_batch_rounds=1)
    (cost,) = measure_cost([model], protocol)
    assert set(shapes) == {(1, 8), (1, 1), (3, 5), (3, 1)}
    assert cost.batch.prompt_tokens == 5
    (cost,) = measure_cost([model], ServingProtocol(8, 2, batch_size=1, num_rounds=1))
    assert cost.batches == [cost.single]


def test_a_batch_for_which_there_is_no_memory_is_left_out_and_told(monkeypatch):
    monkeypatch.setattr("prunelight.evaluation.serving.measured.free_memory", lambda device: -1)
    (cost,) = measure_cost([tiny_model()], BRIEF)
    assert cost.batch is None
    assert "batch 4 was left out: it needs about" in cost.notes[0]


def test_a_batch_after_a_batch_1_that_took_too_long_is_left_out_and_told():
    (cost,) = measure_cost([tiny_model()], replace(BRIEF, patience=0.0))
    assert cost.batch is None
    assert "batch 4 was left out: batch 1 took 0 s, and patience ends after 0 s" in cost.notes


def test_a_short_context_clips_the_usual_prompt_and_is_told():
    protocol = ServingProtocol(new_tokens=8, batch_size=1, num_rounds=1)
    (cost,) = measure_cost([tiny_model()], protocol)
    assert cost.single.prompt_tokens == 120
    assert cost.notes == ("prompts have 120 tokens instead of 256: the context is not longer",)


def test_all_models_get_the_length_that_the_shortest_context_allows():
    long, short = tiny_model(max_position_embeddings=512), tiny_model(max_position_embeddings=64)
    costs = measure_cost([long, short], ServingProtocol(new_tokens=4, batch_size=1, num_rounds=1))
    assert [cost.single.prompt_tokens for cost in costs] == [60, 60]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "serving.batch_size=0 must be at least 1"),
        ({"new_tokens": 1}, "serving.new_tokens=1 must be at least 2"),
        ({"prompt_tokens": 0}, "serving.prompt_tokens=0 must be at least 1"),
        ({"batch_prompt_tokens": 0}, "serving.batch_prompt_tokens=0 must be at least 1"),
        ({"num_rounds": 0}, "serving.num_rounds=0 must be at least 1"),
        ({"num_batch_rounds": 0}, "serving.num_batch_rounds=0 must be at least 1"),
        ({"patience": -1.0}, "serving.patience=-1.0 must be at least 0"),
    ],
)
def test_a_bad_protocol_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ServingProtocol(**arguments)


@pytest.mark.parametrize("name", ["prompt_tokens", "batch_prompt_tokens"])
def test_lengths_beyond_the_context_are_refused_before_anything_runs(name):
    model, reference = tiny_model(), tiny_model(max_position_embeddings=64)
    shapes = shapes_of_forwards(model)
    protocol = ServingProtocol(**{"prompt_tokens": 8, "new_tokens": 8, name: 57})
    with pytest.raises(ValueError, match="seq_len=65 must be at most 64, which the model allows"):
        serving_cost(model, reference, protocol=protocol)
    assert shapes == []


def test_growth_of_memory_is_what_was_allocated_inside_and_freed_again():
    with memory_growth(torch.device("cpu")) as growth:
        torch.ones(50_000_000).sum()
    assert 190e6 < growth() < 260e6


def test_working_memory_grows_with_the_prompt():
    protocol = ServingProtocol(200, 2, batch_size=64, num_rounds=1, num_batch_rounds=1)
    (cost,) = measure_cost([tiny_model(max_position_embeddings=256)], protocol)
    assert cost.batch.working_bytes > 64 * cost.batch.prompt_tokens * 6 * 2 * 16 * 4  # the cache


def test_a_model_beside_its_reference_is_told_with_ratios_and_ideals():
    model, reference = tiny_model(num_hidden_layers=3), tiny_model()
    both = serving_cost(model, reference, protocol=BRIEF)
    own, other = both["serving"], both["reference_serving"]
    shape, dense = (shape_cost(each, prompt_tokens=6) for each in (model, reference))
    assert own["shape"]["parameters"] == shape.parameters
    assert own["batches"].keys() == {"1", "4"} == own["ratios"].keys()
    ideal = own["ratios"]["1"]
    prefill = dense.prefill_multiply_adds / shape.prefill_multiply_adds
    assert ideal["prefill_tokens_per_second"]["ideal"] == prefill
    for size in (1, 4):
        bytes_read = [each.weight_bytes_per_token / size for each in (shape, dense)]
        cache = [each.cache_bytes + 1.5 * each.cache_bytes_per_token for each in (shape, dense)]
        decode = (bytes_read[1] + cache[1]) / (bytes_read[0] + cache[0])
        assert own["ratios"][str(size)]["decode_tokens_per_second"]["ideal"] == pytest.approx(
            decode
        )
    assert own["verdicts"][0].startswith("3 of 6 layers: prefill ")
    assert "ratios" not in other
    alone = serving_cost(model, protocol=BRIEF)
    assert alone.keys() == {"serving"}
    assert alone["serving"]["verdicts"] == []


def test_the_measured_factor_is_that_of_the_models():
    own = serving_cost(slowed(0.02), slowed(0.06), protocol=BRIEF)["serving"]
    for ratios in own["ratios"].values():
        for ratio in ratios.values():
            median, low, high = ratio["measured"]
            assert low <= median <= high
            assert 1.7 < median < 3.5


def test_the_factor_holds_on_a_machine_that_gets_slower_all_the_time():
    own, other = measure_cost([slowing(0.04, 1.02), slowing(0.12, 1.02)], BRIEF)
    for factor in compare_batches(own.single, other.single):
        assert factor.low <= factor.median <= factor.high
        assert 1.5 < factor.median < 4
        assert factor.low > 1


def stage(name, serving):
    return Stage(name, 6, 1, 4, 2.0, 0.5, **stage_speeds(serving), examined={"serving": serving})


def examined(model, *earlier, dense=None):
    examiner = ServingExaminer(dense, BRIEF)
    return examiner.examine(model, None, earlier, ProcessGroup())


def test_a_stage_is_told_by_the_clock_of_the_dense_stage():
    dense, small = tiny_model(), tiny_model(num_hidden_layers=2)
    first = examined(dense)
    assert "ratios" not in first
    assert stage("dense", first).factors == {}
    for batch in first["batches"].values():
        batch["prefill_tokens_per_second"][0] = 1e9
        batch["time_to_first_token"][0] = 1e-3
    pruned = examined(small, stage("dense", first), dense=Architecture.of(dense))
    told = stage("pruned", pruned)
    median, low, high = told.factors["prefill_tokens_per_second"]
    assert low <= median <= high
    assert told.prefill_tokens_per_second == pytest.approx(1e9 * median)
    assert pruned["batches"]["1"]["time_to_first_token"][0] == pytest.approx(1e-3 / median)
    assert pruned["verdicts"][0].startswith("2 of 6 layers")


def test_a_stage_of_the_shape_of_an_earlier_one_is_not_timed_again():
    dense, small = tiny_model(), tiny_model(num_hidden_layers=2)
    first = stage("dense", examined(dense))
    pruned = stage("pruned", examined(small, first, dense=Architecture.of(dense)))
    small.model.layers[0].mlp.up_proj.weight.data[:32] = 0
    shapes = shapes_of_forwards(small)
    recovered = examined(small, first, pruned, dense=Architecture.of(dense))
    assert len(shapes) == 2  # only the two that are counted
    assert recovered["batches"] == pruned.examined["serving"]["batches"]
    assert recovered["ratios"] == pruned.examined["serving"]["ratios"]
    assert recovered["shape"]["nonzeros"] < pruned.examined["serving"]["shape"]["nonzeros"]


def test_a_stage_without_room_for_the_dense_model_is_told_alone(monkeypatch):
    monkeypatch.setattr("prunelight.evaluation.speed.free_memory", lambda device: 0)
    dense = tiny_model()
    first = stage("dense", examined(dense))
    small = examined(tiny_model(num_hidden_layers=2), first, dense=Architecture.of(dense))
    assert "ratios" not in small
    assert stage("pruned", small).factors == {}


def test_the_examiner_says_what_its_answer_depends_on():
    assert ServingExaminer(None, BRIEF).describe_examination()["prompt_tokens"] == 6
    assert ServingExaminer().describe_examination() == asdict(serving.BRIEFLY)
