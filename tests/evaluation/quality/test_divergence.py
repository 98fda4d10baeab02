import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import quality_ranks
import torch
from quality_ranks import measure
from source_tree import ROOT
from tiny import tiny_model, token_windows

import prunelight
from prunelight.evaluation.quality.divergence import (
    against_reference,
    by_position,
    compare_logits,
    divergence_of,
)
from prunelight.evaluation.quality.reference_memory import ReferenceMemory
from prunelight.evaluation.quality.text_quality import text_quality
from prunelight.evaluation.quality.text_windows import TextWindows

TEXT = TextWindows("text", "protocol", token_windows(5, 40))


@pytest.fixture(scope="module")
def models():
    return tiny_model("llama", seed=0), tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def found(models):
    return against_reference(*models, TEXT, batch_tokens=80)


def log_probabilities(model):
    """In float64, from whole logits; (N, T - 1, V)."""
    with torch.no_grad():
        return model(TEXT.ids).logits[:, :-1].double().log_softmax(-1)


def test_perplexity_equals_a_computation_token_by_token(models):
    model, nll = models[0], []
    with torch.no_grad():
        for window in TEXT.ids:
            for position in range(1, len(window)):
                logits = model(window[None, :position]).logits[0, -1].double()
                nll.append(-logits.log_softmax(-1)[window[position]].item())
    quality = text_quality(model, TEXT)
    assert quality.perplexity.value == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)
    assert quality.tokens == len(nll) == 5 * 39
    assert sum(quality.window_nll) == pytest.approx(sum(nll), rel=1e-6)
    assert quality.perplexity.value == pytest.approx(prunelight.perplexity(model, TEXT.ids))


def test_every_figure_equals_one_in_float64_on_whole_logits(models, found):
    q, p = (log_probabilities(model) for model in models)
    target = TEXT.ids[:, 1:, None]
    kl = (p.exp() * (p - q)).sum(-1)
    change = (q.gather(2, target).exp() - p.gather(2, target).exp())[..., 0].numpy()
    ours, theirs, divergence = found
    assert divergence.kl.value == pytest.approx(kl.mean().item(), rel=1e-5)
    assert divergence.kl_median == pytest.approx(kl.median().item(), rel=1e-5)
    assert divergence.kl_p99 == pytest.approx(np.percentile(kl.numpy(), 99), rel=1e-5)
    same = (q.argmax(-1) == p.argmax(-1)).double()
    assert divergence.same_top1.value == same.mean().item()
    assert divergence.window_same_top1 == same.sum(1).int().tolist()
    assert divergence.window_kl == pytest.approx(kl.sum(1).tolist(), rel=1e-5)
    assert divergence.right_token_change == pytest.approx(change.mean(), rel=1e-4)
    assert divergence.right_token_change_rms == pytest.approx(np.sqrt((change**2).mean()), rel=1e-5)
    assert divergence.right_token_change_percentiles["5"] == pytest.approx(
        np.percentile(change, 5), rel=1e-4
    )
    ratio = math.log(ours.perplexity.value / theirs.perplexity.value)
    assert divergence.ln_perplexity_ratio.value == pytest.approx(ratio)
    accuracy = (q.argmax(-1) == TEXT.ids[:, 1:]).double().mean().item()
    assert ours.accuracy == accuracy


def test_a_model_does_not_diverge_from_itself(models):
    ours, theirs, divergence = against_reference(models[0], models[0], TEXT)
    assert ours == theirs == text_quality(models[0], TEXT)
    assert divergence.kl.value == pytest.approx(0, abs=1e-9)
    assert divergence.same_top1.value == 1
    assert divergence.right_token_change_rms == 0
    assert divergence.ln_perplexity_ratio.value == 0


def test_quality_does_not_depend_on_the_batch(models, found):
    other = against_reference(*models, TEXT, batch_tokens=40)
    assert other[2].kl.value == pytest.approx(found[2].kl.value, rel=1e-6)
    assert other[0].window_nll == pytest.approx(found[0].window_nll, rel=1e-6)


@pytest.mark.parametrize(("windows_kept", "forwards"), [(0, 10), (2, 8), (5, 5)])
def test_a_reference_is_asked_again_only_for_what_was_not_kept(models, windows_kept, forwards):
    vocabulary = models[1].config.vocab_size
    memory = ReferenceMemory(windows_kept * 40 * vocabulary * 4)
    asked = []
    handle = models[1].register_forward_hook(lambda *_: asked.append(1))
    try:
        found = [against_reference(*models, TEXT, batch_tokens=40, memory=memory) for _ in range(2)]
    finally:
        handle.remove()
    assert len(asked) == forwards
    assert found[0] == found[1] == against_reference(*models, TEXT, batch_tokens=40)


def test_a_small_divergence_is_exact_where_a_plain_sum_is_rounding(models):
    logits = torch.randn(2, 9, 5000, generator=torch.Generator().manual_seed(0)) * 3
    other = logits + 1e-4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    target = torch.zeros(2, 8, dtype=torch.long)
    kl = compare_logits(other, logits, target)[0]
    p, q = (x[:, :-1].double().log_softmax(-1) for x in (logits, other))
    exact = (p.exp() * (p - q)).sum(-1)
    assert float((kl - exact).abs().max()) < 1e-7
    assert float(kl.min()) >= 0


def test_a_token_that_the_reference_rules_out_is_no_nan():
    logits = torch.randn(1, 3, 8)
    reference = logits.clone()
    reference[..., 2] = -torch.inf
    found = compare_logits(logits, reference, torch.zeros(1, 2, dtype=torch.long))
    assert torch.isfinite(found).all()
    turned = compare_logits(reference, logits, torch.zeros(1, 2, dtype=torch.long))
    assert torch.isinf(turned[0]).all()


def test_positions_are_put_together_in_ranges_that_double():
    kl = np.array([[1.0, 2, 4, 8, 8, 8, 8, 3]])
    counted = np.ones_like(kl, dtype=bool)
    assert by_position(kl, counted) == [(1, 1.0), (2, 3.0), (4, 8.0), (8, 3.0)]
    counted[0, 0] = False
    assert by_position(kl, counted)[0] == (2, 3.0)


def test_a_model_of_nan_logits_has_nan_figures_and_not_those_of_its_good_tokens(models):
    broken = tiny_model("llama", seed=0)
    broken.get_input_embeddings().weight.data[int(TEXT.ids[2, 7])] = math.nan
    ours, theirs, divergence = against_reference(broken, models[1], TEXT)
    assert ours.tokens == theirs.tokens == 5 * 39
    assert math.isnan(ours.perplexity.value)
    assert math.isfinite(theirs.perplexity.value)
    assert math.isnan(divergence.kl.value)
    assert math.isnan(divergence.kl_p99)
    assert math.isnan(text_quality(broken, TEXT).perplexity.value)


def test_tokens_that_do_not_count_change_nothing():
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 2, 6, 11, generator=generator).unbind(0)
    target = torch.randint(11, (2, 5), generator=generator)
    whole = compare_logits(logits, reference, target)
    target[:, 3:] = -100
    part = compare_logits(logits, reference, target)
    assert torch.equal(part[..., :3], whole[..., :3])
    assert part[..., 3:].isnan().all()
    found = divergence_of(part.transpose(0, 1).numpy())
    assert found.tokens == 6
    assert found.kl.value == pytest.approx(whole[0, :, :3].mean().item())


def test_models_are_left_as_they_were(models):
    models[0].train()
    against_reference(*models, TEXT)
    assert models[0].training
    models[0].eval()


def test_a_reference_with_another_vocabulary_is_refused(models):
    other = tiny_model("llama", vocab_size=64)
    with pytest.raises(ValueError, match="logits of 128 tokens and its reference of 64"):
        against_reference(models[0], other, replace(TEXT, ids=TEXT.ids % 64))
    with pytest.raises(ValueError, match="vocabulary"):
        text_quality(other, replace(TEXT, ids=TEXT.ids * 0 + 127))


def test_two_processes_find_what_one_finds(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", quality_ranks.__file__, str(tmp_path / "found.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    together, alone = json.loads((tmp_path / "found.json").read_text()), measure()
    assert together == json.loads(json.dumps(alone))
    assert asdict(text_quality(tiny_model("llama", seed=0), TEXT))["tokens"] > 0
