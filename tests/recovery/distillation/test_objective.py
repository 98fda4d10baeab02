"""The loss of distillation: chunks, hidden states, and which layer stands for which."""

import copy

import pytest
import torch
from tiny import tiny_model, token_windows

from prunelight.planning.plan import Plan
from prunelight.planning.steps import MergeLayers, RemoveLayers
from prunelight.recovery.distillation.objective import (
    Distillation,
    Objective,
    hidden_state_loss,
    kept_layers,
)


def test_kd_of_a_batch_is_the_same_in_chunks(data, teacher):
    """With another scale than the student's: each has its own."""
    dense = tiny_model("granite", seed=1, logits_scaling=2.0)
    batch = {"input_ids": token_windows(3, 20) % 128}
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(20) < 5, -100)
    found = []
    for chunked in (True, False):
        student = tiny_model("cohere").requires_grad_(True)
        settings = Distillation(temperature=2.0, lm_weight=0.3, hidden_weight=0.1)
        objective = Objective("kd", settings, chunked=chunked)
        objective.use_teacher(dense, range(6))
        objective.start(student)
        loss = objective(student, batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in student.parameters())])
    assert dense.lm_head.weight.grad is None
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher):
    batch = {"input_ids": token_windows(), "labels": token_windows()}
    objective = Objective("kd", Distillation(lm_weight=0.0, hidden_weight=1.0))
    student = copy.deepcopy(teacher).requires_grad_(True)
    objective.use_teacher(teacher, range(6))
    objective.start(student)
    loss = objective(student, batch)
    loss.backward()
    assert loss.abs() < 1e-5
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-5


def test_hidden_states_count_relative_to_the_teachers_and_without_padding():
    wanted = torch.randn(2, 3, 4) * 100
    found = wanted * torch.tensor([1.0, 1.1, 9.0])[:, None]
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    # (0 + 0.1^2) / 2 in one layer, 0 in the other
    loss = hidden_state_loss([found, wanted], [wanted, wanted], mask)
    assert loss.item() == pytest.approx(0.0025, rel=1e-4)


def test_each_layer_stands_for_the_one_whose_place_it_took():
    def plan(step):
        return Plan("test", {}, {}, (step,))

    assert kept_layers([], 3) == [0, 1, 2]
    plans = [plan(RemoveLayers((1,))), plan(MergeLayers(((2, 3),)))]
    # left after the first: 0 2 3 4 5; layers 2 and 3 of these are 3 and 4, the higher one is left
    assert kept_layers(plans, 6) == [0, 2, 4, 5]
