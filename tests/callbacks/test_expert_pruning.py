"""ExpertPruning: what it chooses; a run trains, resumes and reloads it; what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from expert_models import IDLE, MIXTURES, WINDOWS, make_idle, mixture, naive_scores
from runs import make_data, make_module, make_trainer, write_model
from tiny import tiny_model
from tiny_families import tiny_family
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.callbacks import ExpertPruning
from prunelight.callbacks.expert_pruning import lowest_experts
from prunelight.models.families.experts.layout import experts_of
from prunelight.planner.making import plan_of_scores
from prunelight.planner.scores import write_scores
from prunelight.planner.scoring import score_model
from prunelight.planner.telling import decisions
from prunelight.planning.plan import Plan
from prunelight.pruning.abilities import abilities

TINY = {"num_local_experts": 6, "num_experts_per_tok": 2}


@pytest.mark.parametrize("score", ["reap", "frequency"])
@pytest.mark.parametrize("family", MIXTURES)
def test_the_experts_of_the_lowest_scores_go(family, score):
    model = mixture(family)
    plan = ExpertPruning(num_experts=2, score=score).plan(model, WINDOWS)
    (step,) = plan.steps
    for layer, found in naive_scores(model, WINDOWS).items():
        scores = found[score == "frequency"]
        gone = step.experts[str(layer)]
        kept = [expert for expert in range(6) if expert not in gone]
        assert max(scores[i] for i in gone) <= min(scores[i] for i in kept) + 1e-6
    assert (plan.found["num_experts_before"], plan.found["num_experts"]) == (6, 4)


@pytest.mark.parametrize("family", MIXTURES)
def test_unused_experts_go_first_and_cost_nothing(family, tmp_path):
    model = make_idle(mixture(family))
    with torch.no_grad():
        dense = model(WINDOWS, use_cache=False).logits
    plan = ExpertPruning(ratio=0.34).plan(model, WINDOWS)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    prunelight.apply(model, plan, WINDOWS)
    with torch.no_grad():
        pruned = model(WINDOWS, use_cache=False).logits
    torch.testing.assert_close(pruned, dense, rtol=1e-5, atol=1e-5)


def test_lowest_experts_takes_as_many_of_each_group_and_of_equal_ones_the_later():
    assert lowest_experts([3, 1, 2, 0], 2) == [1, 3]
    assert lowest_experts([3, 1, 0, 0], 2, 2) == [1, 3]
    assert lowest_experts([1.0, 1.0, 1.0], 1) == [2]
    assert lowest_experts([1.0, 2.0], 0) == []


def test_a_ratio_of_grouped_experts_is_whole_in_each_group():
    model = tiny_family("deepseek_v3")  # 6 experts in 2 groups
    plan = ExpertPruning(ratio=0.3).plan(model, WINDOWS % 90)
    (step,) = plan.steps
    assert all(min(gone) < 3 <= max(gone) for gone in step.experts.values())
    assert step.num_experts == 2


@pytest.mark.parametrize("recovery", ["lora", "full"])
def test_a_fit_prunes_trains_resumes_and_leaves_a_stock_model(recovery, tmp_path):
    name = write_model(tmp_path / "model", "mixtral", **TINY)

    def fit(root, **arguments):
        pl.seed_everything(0, verbose=False)
        trainer = make_trainer(root, ExpertPruning(num_experts=2))
        trainer.fit(
            make_module(name, recovery=recovery),
            make_data(name, root),
            weights_only=True,
            **arguments,
        )
        return AutoModelForCausalLM.from_pretrained(root / "final")

    for root in ("one", "two"):
        (tmp_path / root).mkdir()
    whole = fit(tmp_path / "one")
    assert type(whole).__name__ == "MixtralForCausalLM"
    assert experts_of(whole).count == 4
    report = (tmp_path / "one" / "report.md").read_text()
    assert "2 of 6 experts removed from 6 layers (33.33 %)" in report
    checkpoint = sorted((tmp_path / "one" / "checkpoints").glob("epoch=0*"))[0]
    resumed = fit(tmp_path / "two", ckpt_path=checkpoint)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, resumed.state_dict()[key])


_RANKS = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
dist.init_process_group("gloo")
from expert_models import WINDOWS, mixture
import prunelight
from prunelight.scoring.experts.expert_scores import expert_scores
from prunelight.callbacks import ExpertPruning
windows = prunelight.share_windows(torch.cat([WINDOWS] * 40)[:159])
model = mixture("gpt_oss")
scores = {str(k): v.tolist() for k, v in expert_scores(model, windows).items()}
steps = ExpertPruning(2).plan(model, windows).to_dict()["steps"]
if dist.get_rank() == 1:
    open(sys.argv[2], "w").write(json.dumps([scores, steps]))
"""


@pytest.mark.parametrize("score", ["reap", "frequency"])
def test_a_plan_of_scores_on_disk_is_that_of_the_model(score, tmp_path):
    model = mixture("deepseek_v3")
    computed = score_model(model, WINDOWS, scores=["experts"], device=torch.device("cpu"))
    write_scores(computed, model, tmp_path / "scores")
    plan, _ = plan_of_scores(ExpertPruning(2, score=score), tmp_path / "scores")
    assert plan.steps == ExpertPruning(2, score=score).plan(model, WINDOWS).steps


@pytest.mark.slow
@pytest.mark.sweep  # test_processes.py shares windows in the same way
def test_two_ranks_give_the_scores_and_the_plan_of_one(tmp_path):
    script, support = tmp_path / "ranks.py", Path(__file__).parent.parent / "support"
    script.write_text(_RANKS)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", str(script), str(support), str(tmp_path / "out.json")),
        ],
        check=True,
        timeout=300,
    )
    shared, steps = json.loads((tmp_path / "out.json").read_text())
    model, windows = mixture("gpt_oss"), torch.cat([WINDOWS] * 40)[:159]
    plan = ExpertPruning(2).plan(model, windows)
    assert plan.to_dict()["steps"] == steps
    for layer, scores in plan.found["expert_scores"].items():
        assert shared[layer] == pytest.approx(scores, rel=1e-5)


def test_a_plan_is_told_in_a_line():
    model = mixture("qwen3_moe")
    plan = ExpertPruning(num_experts=2).plan(model, WINDOWS)
    assert decisions(plan) == {"experts removed": "2 in each of 3 layers"}
    assert plan.steps[0].facts == {"experts_removed": 2, "layers": 3}


@pytest.mark.parametrize(
    ("family", "answer"),
    [
        ("deepseek_v3", "2 of 6 can go in each of 5 layers, as many of each of 2 groups"),
        ("mixtral", "4 of 6 can go in each of 6 layers"),
        ("llama", "no: llama has no experts"),
        ("llama4_text", "no: the experts of llama4_text cannot be scored"),
        ("deepseek_v4", "no: gate.tid2eid of layer 0 names experts by their number"),
    ],
)
def test_families_say_how_many_experts_can_go(family, answer):
    assert abilities(tiny_family(family))["experts"].startswith(answer)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "nothing says how many experts go: give exactly one of num_experts, ratio"),
        ({"num_experts": 1, "ratio": 0.1}, "num_experts=1 and ratio=0.1: give exactly one"),
        ({"num_experts": -1}, "num_experts=-1 must"),
        ({"ratio": 1.0}, r"ratio=1.0 must"),
        ({"ratio": 0.5, "score": "norm"}, "score='norm' must be"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, error):
    with pytest.raises(ValueError, match=error):
        ExpertPruning(**arguments)


def test_what_the_model_cannot_give_is_refused_before_any_forward():
    model = mixture("mixtral")
    model.forward = model.model.forward = None  # a forward would fail
    with pytest.raises(ValueError, match=r"num_experts=5 must lie in \[0, 4\].*takes 2 of 6"):
        ExpertPruning(num_experts=5).plan(model, WINDOWS)
    with pytest.raises(ValueError, match=r"ratio=0.9, number of experts removed=5 must lie in"):
        ExpertPruning(ratio=0.9).check(mixture("mixtral"))
    with pytest.raises(TypeError, match="llama has no experts whose weights are stacked"):
        ExpertPruning(ratio=0.5).check(tiny_model())


def test_scores_of_idle_experts_are_told():
    plan = ExpertPruning(num_experts=1).plan(make_idle(mixture("mixtral")), WINDOWS)
    assert all(count >= len(IDLE) for count in plan.found["experts_without_tokens"].values())
