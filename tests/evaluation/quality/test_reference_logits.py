from dataclasses import asdict

import pytest
import torch
from tiny import tiny_model, token_windows

from prunelight.evaluation.quality.divergence import against_reference
from prunelight.evaluation.quality.reference_logits import ReferenceLogits
from prunelight.evaluation.quality.text_windows import TextWindows

WINDOWS = token_windows(5, 40)


@pytest.fixture(scope="module")
def models():
    return tiny_model("llama", seed=0), tiny_model("llama", seed=1)


def test_all_positions_give_the_divergence_from_the_live_reference(models):
    model, reference = models
    text = TextWindows("text", "protocol", WINDOWS)
    _, _, live = against_reference(model, reference, text)
    kept = ReferenceLogits.of(reference, WINDOWS, num_positions=5 * 39)
    found = kept.divergence_at(model)
    close = {"rel": 1e-5, "abs": 1e-7}
    for name, value in asdict(live).items():
        if isinstance(value, list) and isinstance(value[0], tuple):
            assert [*map(list, getattr(found, name))] == [pytest.approx(x, **close) for x in value]
        else:
            assert asdict(found)[name] == pytest.approx(value, **close), name


def test_a_reference_does_not_diverge_from_itself(models):
    found = ReferenceLogits.of(models[1], WINDOWS, num_positions=20).divergence_at(models[1])
    assert found.kl.value < 1e-9
    assert found.same_top1.value == 1
    assert found.tokens == 20


def test_the_choice_follows_its_seed_and_takes_as_many_positions_of_each_window(models):
    chosen = [
        ReferenceLogits.of(models[1], WINDOWS, num_positions=15, num_windows=3, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert chosen[0].rows.bincount().tolist() == [5, 5, 5]
    assert torch.equal(chosen[0].columns, chosen[1].columns)
    assert not torch.equal(chosen[0].columns, chosen[2].columns)


def test_padding_and_prompts_are_never_chosen(models):
    mask = torch.ones_like(WINDOWS)
    mask[1, 10:] = 0
    labels = WINDOWS.masked_fill(mask == 0, -100)
    labels[2] = -100
    windows = {"input_ids": WINDOWS, "attention_mask": mask, "labels": labels}
    kept = ReferenceLogits.of(models[1], windows, num_positions=1000)
    assert kept.rows.bincount().tolist() == [39, 9, 0, 39, 39]
    found = kept.divergence_at(models[0])
    assert found.tokens == len(kept.rows)
    assert len(found.window_kl) == 4


def test_what_is_written_is_read_as_it_was(models, tmp_path):
    kept = ReferenceLogits.of(models[1], WINDOWS, num_positions=30)
    kept.save(tmp_path / "dense.safetensors")
    again = ReferenceLogits.load(tmp_path / "dense.safetensors")
    assert again.fingerprint == kept.fingerprint
    assert asdict(again.divergence_at(models[0])) == asdict(kept.divergence_at(models[0]))


def test_what_cannot_be_used_is_refused(models, tmp_path):
    for name in ("num_positions", "num_windows"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            ReferenceLogits.of(models[1], WINDOWS, **{name: 0})
    ignored = {"input_ids": WINDOWS, "labels": torch.full_like(WINDOWS, -100)}
    with pytest.raises(ValueError, match="no token of the windows counts"):
        ReferenceLogits.of(models[1], ignored)
    kept = ReferenceLogits.of(models[1], WINDOWS % 64, num_positions=5)
    with pytest.raises(ValueError, match="64 tokens and its reference of 128"):
        kept.divergence_at(tiny_model("llama", vocab_size=64))
    (tmp_path / "dense.safetensors").write_text("nothing")
    with pytest.raises(ValueError, match="holds no predictions of a reference"):
        ReferenceLogits.load(tmp_path / "dense.safetensors")
    with pytest.raises(OSError, match="cannot"):
        kept.save(tmp_path / "none" / "dense.safetensors")
