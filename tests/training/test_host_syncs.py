"""A host does not wait for its accelerator in a micro-batch, but where transformers itself does."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from host_syncs import CountSyncs, HostSyncs
from runs import make_data, make_module, make_trainer, write_model
from tiny import tiny_model, token_windows

from prunelight.recovery.distillation.objective import Distillation, Objective, hidden_state_loss
from prunelight.recovery.packed_rows import model_inputs


def of_transformers(model, batch, padded):
    """Count the waits of a forward alone: do positions restart, and is there padding?"""
    with HostSyncs() as syncs:
        model(**model_inputs(batch, padded=padded))
    return sum(syncs.counts.values())


def batch_of(padding):
    ids = token_windows(2, 12)
    mask = torch.ones_like(ids)
    if padding:
        mask[1, -padding:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


class Cache:
    """Stands for the teacher's cache, whose files other tests read: 3 of 128 tokens each."""

    def targets(self, batch):
        counted = int((batch["labels"][:, 1:] != -100).sum())
        return torch.arange(3).expand(counted, 3), torch.full((counted, 4), -1.4)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("loss", ["lm", "kd", "kd_topk"])
def test_with_the_facts_of_a_batch_a_loss_asks_nothing_of_its_device(loss, padding):
    student, batch = tiny_model(num_hidden_layers=2).requires_grad_(True), batch_of(padding)
    objective = Objective(loss, Distillation(hidden_weight=0.5 if loss == "kd" else 0.0))
    if loss == "kd":
        objective.use_teacher(tiny_model(num_hidden_layers=2, seed=1), range(2))
    if loss == "kd_topk":
        objective.cache = Cache()
    objective.start(student)
    facts = objective.facts(batch)
    assert facts.padded == bool(padding)
    assert facts.num_tokens == 24 - padding
    forwards = 2 if loss == "kd" else 1
    allowed = forwards * of_transformers(student, batch, bool(padding))
    with HostSyncs() as syncs:
        told = objective(student, batch, facts)
        told.backward()
    assert sum(syncs.counts.values()) == allowed, syncs.counts
    assert torch.equal(told, objective(student, batch)), "and says the same without them"


def test_hidden_states_of_padding_never_count():
    states = [torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    mask = batch_of(5)["attention_mask"]
    loss = hidden_state_loss(states[:1], states[1:], mask)
    spoiled = [state.masked_fill(mask[..., None] == 0, 0.0) for state in states]  # 0 / 0 there
    torch.testing.assert_close(hidden_state_loss(spoiled[:1], spoiled[1:], mask), loss)


def test_a_batch_that_a_callback_changes_is_looked_at_again(tmp_path):
    seen = []

    class Changing(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx:
                batch["labels"][:, : 4 * batch_idx] = -100  # in place

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(len(pl_module._facts_of(batch).positions))

    name = write_model(tmp_path / "model", num_hidden_layers=2)
    trainer = make_trainer(tmp_path / "run", Changing(), max_steps=3)
    trainer.fit(make_module(name), make_data(name, tmp_path, batch_size=1))
    assert seen == [31, 28, 24], "the first label predicts nothing"


def test_nor_does_a_micro_batch_of_a_fit(tmp_path):
    name = write_model(tmp_path / "model", num_hidden_layers=2)
    counted = CountSyncs()
    trainer = make_trainer(tmp_path / "run", counted, max_steps=4, log_every_n_steps=50)
    # AdamW keeps its count of steps on the CPU, and reads it there.
    sgd = partial(torch.optim.SGD, lr=1e-3)
    trainer.fit(make_module(name, optimizer=sgd), make_data(name, tmp_path))
    assert len(counted.batches) == 4
    allowed = of_transformers(tiny_model(num_hidden_layers=2), batch_of(0), padded=False)
    for counts in counted.batches:
        assert sum(counts.values()) == allowed, counts
