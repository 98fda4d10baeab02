"""Scores on disk: a plan made of them is the plan of the model, or they say what they lack."""

import json
from contextlib import suppress

import pytest
import torch
from killed_at_rename import kill_at_rename
from lively_models import between, padded
from methods_table import METHODS, VARIANTS
from runs import VARIED_TEXT, write_model
from tiny import tiny_model, token_windows
from warm_command import call

from prunelight.calibration.layer_readers import read_layers
from prunelight.callbacks import ShortGPT
from prunelight.cli import main
from prunelight.models.families.experts.layout import has_experts
from prunelight.models.families.layers import decoder_layers
from prunelight.planner.making import plan_of_scores
from prunelight.planner.scores import SCORES, TENSORS, read_scores, write_scores
from prunelight.planner.scoring import SCORERS, score_model
from prunelight.planning.plan import Plan
from prunelight.pruning.healing.writers import first_writer
from prunelight.scoring.angular_distance import AngularReader, angular_distances
from prunelight.scoring.block_influence import (
    block_influences,
    relative_magnitudes,
    sublayer_influences,
)
from prunelight.scoring.experts.expert_scores import expert_scores
from prunelight.scoring.remembered import Memory, remembering_scores
from prunelight.scoring.weight_scores import WeightReader, weight_scores
from prunelight.scoring.width_scores import standardised_scores, width_scores

CPU = torch.device("cpu")
TABLE = {name: method for name, method in {**METHODS, **VARIANTS}.items() if not method.gradual}
# Methods whose plan is made of scores alone, or of no data; all others must say what is missing.
FROM_SCORES = {
    *("ShortGPT by number", "ShortGPT by ratio", "ShortGPT, angular", "ShortGPT, layers by hand"),
    *("ShortGPT, relative magnitude", "ShortGPT, share of all parameters", "ShortGPT, healed"),
    *("attention dropped", "sublayers dropped", "MLPs dropped, healed"),
    *("Shortened LLaMA, Taylor", "SliceGPT", "SliceGPT, sliced embeddings", "SliceGPT, healed"),
    *("SliceGPT, one rotation", "DynamicSlicing, by hand"),
    *("width", "width by layer", "width by layer, Taylor, no correction", "width by DLP's shares"),
    *("width by layer, healed", "FLAP", "Wanda-sp", "width in a range of layers"),
    *("DLP, Wanda", "DLP, Wanda's variant", "DLP, SparseGPT", "DLP by linear", "DLP, mixed 2:4"),
    *("DLP, healed", "Wanda", "magnitude", "OWL, Wanda", "2:4, SparseGPT", "Wanda, swapped"),
    *("ALPS", "2:4, ALPS", "2:4, ALPS, swapped"),
    *("ShortGPT, layers trained", "Wanda, layers trained", "ShortGPT, an MLP stands in"),
    "ShortGPT, a matrix at the gap",
}


def rows(names):
    """Return rows of the table in order; variants are swept alone."""
    swept = pytest.mark.sweep
    return [pytest.param(n, marks=swept) if n in VARIANTS else n for n in sorted(names)]


def scored(model, windows, directory, names=SCORERS):
    write_scores(score_model(model, windows, scores=[*names], device=CPU), model, directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model, windows = tiny_model(), token_windows(8, 32)
    return model, windows, scored(model, windows, tmp_path_factory.mktemp("scores") / "llama")


@pytest.mark.parametrize("name", rows(FROM_SCORES))
def test_a_plan_of_scores_is_that_of_the_model(name, llama):
    model, windows, directory = llama
    plan, _ = plan_of_scores(TABLE[name].make(), directory)
    assert plan.to_dict() == TABLE[name].make().plan(model, windows).to_dict()


@pytest.mark.parametrize("name", rows({*TABLE} - FROM_SCORES))
def test_a_method_that_needs_more_than_scores_says_so_in_one_line(name, llama):
    with pytest.raises(ValueError, match="plan from the model itself") as raised:
        plan_of_scores(TABLE[name].make(), llama[2])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mamba", "mixtral"])
def test_scores_of_other_families_give_their_plans(family, tmp_path):
    model, windows = tiny_model(family), token_windows(4, 16)
    directory = scored(model, windows, tmp_path / family)
    method = ShortGPT(num_layers=2)
    assert plan_of_scores(method, directory)[0].to_dict() == method.plan(model, windows).to_dict()


def test_a_score_that_the_family_does_not_have_is_left_out_and_told(tmp_path):
    model, windows = tiny_model("mamba"), token_windows(4, 16)
    scores = read_scores(scored(model, windows, tmp_path / "scores", ["width", "block_influence"]))
    assert [*scores.left_out] == ["width"]
    assert [*scores.seconds] == ["block_influence"]


def asked_alone(model, windows):
    """Return what a memory holds of each scoring function that computed alone, if it could."""
    memory = Memory()
    with remembering_scores(memory):
        block_influences(model, windows)
        relative_magnitudes(model, windows)
        with suppress(TypeError):  # gpt2's attention and MLP cannot be pruned apart
            sublayer_influences(model, windows)
        for size in range(6):
            angular_distances(model, windows, size)
        for summary in ("median", "mean", "outlier_ratio"):
            for by_matrix in (False, True):
                weight_scores(model, windows, summary, by_matrix=by_matrix)
        with suppress(TypeError):
            for kinds in (["heads", "neurons"], ["heads"], ["neurons"]):
                for score in ("wanda", "fluctuation"):
                    width_scores(model, windows, score, kinds)
                standardised_scores(model, windows, kinds)
        if has_experts(model):
            for score in ("reap", "frequency"):
                expert_scores(model, windows, score)
        first_writer(model, windows)
    return memory


def assert_same(result, expected):
    """Compare results, exactly."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(result, expected)
    elif isinstance(expected, dict):
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(result[key], value)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(result, expected, strict=True):
            assert_same(one, other)
    else:
        assert result == expected


@pytest.mark.parametrize("shape", ["plain", "padded"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3_moe", "rwkv"])
def test_scores_of_one_pass_are_those_that_each_function_computes_alone(family, shape):
    model, windows = tiny_model(family), token_windows(300, 16)  # three micro-batches
    if shape == "padded" and family != "qwen3_moe":  # whose experts hide what is padding
        windows = padded(windows)
    together, alone = score_model(model, windows, device=CPU).memory, asked_alone(model, windows)
    assert {*together.calls.values()} == {*alone.calls.values()}
    for key, (result, _) in alone.scores.items():
        assert_same(together.scores[key][0], result)


def test_all_scores_together_read_the_windows_once():
    model, windows, read = tiny_model(), token_windows(300, 16), []
    mlp = decoder_layers(model)[3].mlp  # a walk replaces the forward of a layer
    with mlp.register_forward_hook(lambda module, args, output: read.append(output.numel())):
        score_model(model, windows, device=CPU)
    tokens = sum(read) / model.config.hidden_size
    assert windows.numel() <= tokens <= windows.numel() + 64  # a walk begins with a few tokens


def test_where_layers_cannot_be_run_alone_the_other_scores_are_read_all_the_same():
    model, windows = between(tiny_model(), lambda x, _: (1.5 * x, None)), token_windows(8, 16)
    scores = score_model(model, windows, device=CPU)
    assert {*scores.left_out} == {"weights", "healing"}
    assert "cannot be run on its own" in scores.left_out["weights"]
    with remembering_scores(scores.memory):
        kept = block_influences(model, windows)
    assert kept == block_influences(model, windows)


def test_padding_does_not_count_in_scores_either(tmp_path):
    model, ids = tiny_model(), token_windows(4, 16)
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    windows = {"input_ids": ids, "attention_mask": mask}
    directory = scored(model, windows, tmp_path / "scores", ["block_influence"])
    method = ShortGPT(num_layers=2)
    assert plan_of_scores(method, directory)[0].to_dict() == method.plan(model, windows).to_dict()


def test_other_arguments_than_those_scored_are_named(llama):
    with pytest.raises(ValueError, match=r"no block_influences\(ignore_first_tokens=4\)"):
        plan_of_scores(ShortGPT(num_layers=2, ignore_first_tokens=4), llama[2])


def test_one_forward_gives_the_angular_distances_of_every_size():
    model, windows = tiny_model(), token_windows(4, 16)
    reader = AngularReader(model, windows)
    read_layers(model, windows, [reader])
    for size, distances in reader.result(range(6)).items():
        assert distances == angular_distances(model, windows, size)


@pytest.mark.parametrize("by_matrix", [False, True])
def test_one_walk_gives_several_weight_scores(by_matrix):
    model, windows = tiny_model("qwen3_moe"), token_windows(4, 16)
    kinds = ("median", "mean", "outlier_ratio", "std")
    reader = WeightReader(model, windows, kinds, [False, True])
    read_layers(model, windows, [reader])
    for kind in kinds:
        assert reader.scores[by_matrix][kind] == weight_scores(
            model, windows, kind, by_matrix=by_matrix
        )


def test_a_kept_result_is_given_however_the_call_is_written():
    model, windows = tiny_model(), token_windows(4, 16)
    with remembering_scores(Memory(source="here")) as memory:
        memory.keep(weight_scores, {"a": 1.0}, 2.0, model, windows, "median")
        found = weight_scores(model, windows, score="median", outlier_factor=5.0, device=CPU)
        assert found == {"a": 1.0}
        assert memory.seconds_spared == 2.0
        with pytest.raises(ValueError, match="here holds no weight_scores"):
            weight_scores(model, windows, "mean")


DAMAGES = {
    "no JSON": (SCORES, lambda text: text[:-20]),
    "a newer format": (SCORES, lambda text: text.replace(b'"format": 1', b'"format": 2')),
    "something else": (SCORES, lambda text: b"[]"),
    "other windows": (SCORES, lambda text: text.replace(b'"num_samples": 8', b'"num_samples": 9')),
    "no model": (SCORES, lambda text: text.replace(b'"fingerprint"', b'"finger"')),
    "half of the tensors": (TENSORS, lambda text: text[: len(text) // 2]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_scores_are_refused_in_one_line(damage, llama, tmp_path):
    for file in llama[2].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name, change = DAMAGES[damage]
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match="holds no whole scores") as raised:
        read_scores(tmp_path)
    assert "\n" not in str(raised.value)


def test_scores_beside_another_config_are_refused_in_one_line(llama, tmp_path):
    for file in llama[2].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    with pytest.raises(ValueError, match="config.json has num_hidden_layers=9, and the scores"):
        plan_of_scores(ShortGPT(num_layers=2), tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, a text, and the scores that the command wrote of both."""
    root = tmp_path_factory.mktemp("command")
    name = write_model(root / "model")
    (root / "text.txt").write_text(VARIED_TEXT, encoding="utf-8")
    data = ["--data.calibration", str(root / "text.txt"), "--data.seq_len", "32"]
    data += ["--data.num_calibration", "4"]
    main(["score", name, *data, "--out", str(root / "scores")])
    return name, data, root / "scores"


def test_the_command_plans_from_scores_what_it_plans_from_the_model(saved, tmp_path):
    name, data, scores = saved
    files = [tmp_path / "model.json", tmp_path / "scores.json"]
    method = ["--method", "ShortGPT", "--num_layers", "2", "--out"]
    main(["plan", name, *data, *method, str(files[0])])
    end = call(["plan", str(scores), *method, str(files[1])])
    assert end.kind == "ended"
    assert not end.loaded
    assert Plan.load(files[0]) == Plan.load(files[1])


def test_scores_say_of_what_they_are(saved):
    facts = json.loads((saved[2] / SCORES).read_text())
    assert facts["model"]["num_hidden_layers"] == 6
    assert facts["calibration"]["seq_len"] == 32
    assert {*facts["seconds"]} == {*SCORERS} - {"taylor"}
    assert len({entry["key"] for entry in facts["scores"]}) == len(facts["scores"])


ERRORS = {
    "unknown score": (
        ["score", "MODEL", "--out", "NEW", "--scores", "bi"],
        "there is no score 'bi'",
    ),
    "no place": (["score", "MODEL"], "out"),
    "a place that is there": (["score", "MODEL", "--out", "SCORES"], "exists; choose another"),
    "no such model": (["score", "/no/model", "--out", "NEW"], "/no/model"),
    "a text with scores": (
        ["plan", "SCORES", "--method", "ShortGPT", "--ratio", "0.2", "--data.seq_len", "8"],
        "data.seq_len has no effect with scores",
    ),
    "whole data with scores": (
        ["plan", "SCORES", "--method", "ShortGPT", "--ratio", "0.2", "--data", "{seq_len: 8}"],
        "data has no effect with scores",
    ),
    "more than the scores": (
        ["plan", "SCORES", "--method", "SLEB", "--num_layers", "1", "--out", "NEW"],
        "plan from the model itself",
    ),
    "too many layers": (
        ["plan", "SCORES", "--method", "ShortGPT", "--num_layers", "9", "--out", "NEW"],
        "9",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_value_ends_in_one_line(case, saved, tmp_path):
    command, told = ERRORS[case]
    places = {"MODEL": saved[0], "SCORES": str(saved[2]), "NEW": str(tmp_path / "new")}
    end = call([places.get(word, word) for word in command])
    assert end.kind == "one line", end
    assert told in end.text
    assert not (tmp_path / "new").exists()


def score_command(saved, out, *more):
    name, data, _ = saved
    return ["score", name, "--out", str(out), *data, *more]


def computed_in(directory):
    """Return scores as bytes and JSON, without the times that they took."""
    facts = json.loads((directory / SCORES).read_text())
    del facts["checksum"]
    for timed in (facts, *facts["scores"]):
        del timed["seconds"]
    return facts, (directory / TENSORS).read_bytes()


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[] if n == 4 else pytest.mark.sweep) for n in range(1, 9)]
)
def test_a_killed_score_goes_on_from_the_last_whole_one(number, saved, tmp_path, caplog):
    whole, out = tmp_path / "whole", tmp_path / "out"
    main(score_command(saved, whole))
    kill_at_rename(number, r"\d+", score_command(saved, out))
    assert not out.exists()
    with caplog.at_level("INFO"):
        main(score_command(saved, out))
    told = [line for line in caplog.messages if "was scored before" in line]
    before = told[0].split(": ")[1].split(", ") if told else []
    assert len(before) == number - 1
    assert computed_in(out) == computed_in(whole)
    assert not (tmp_path / ".out.scores").exists()


OTHERWISE = {
    "windows": ("--data.seed", "1"),
    "dtype": ("--dtype", "bfloat16"),
    "attention": ("--attn_implementation", "eager"),
}


@pytest.mark.parametrize("other", OTHERWISE)
def test_scores_that_were_left_of_another_computation_are_not_taken(other, saved, tmp_path, caplog):
    out = tmp_path / "out"
    kill_at_rename(3, r"\d+", score_command(saved, out, *OTHERWISE[other]))
    with caplog.at_level("INFO"):
        main(score_command(saved, out))
    assert "was scored before" not in caplog.text
    assert f"(block_influence, relative_magnitude) are of another computation ({other})" in (
        caplog.text
    )
    main(score_command(saved, tmp_path / "whole"))
    assert computed_in(out) == computed_in(tmp_path / "whole")
