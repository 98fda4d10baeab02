"""Packed documents: models that keep them apart, and training on rows of them."""

import json

import pytest
import torch
from runs import SEQ_LEN, make_module, make_trainer, write_model
from sliced_models import CUT, sliced
from text_tokenizers import ALPACA, PAIR, make_tokenizer
from tiny import FAMILIES, UNKNOWN_FAMILIES, tiny_model, token_windows
from torch.nn.functional import cross_entropy

from prunelight.callbacks import ShortGPT
from prunelight.data.document_rows import pack_documents
from prunelight.losses import IGNORED_LABEL
from prunelight.models.loading import load
from prunelight.recovery.lora import LoRA, attach_lora
from prunelight.recovery.packed_rows import check_packing, cross_document_attention
from prunelight.training.text_datamodule import TextDataModule

# Their code leaves positions out of the mask, or knows no mask at all.
MIXING = {"opt", "falcon", "bloom", "mamba", "mamba2", "rwkv", "gpt_oss"}
TEXTS = [f"Document {i}. " + "The mill stands by the river. " * i for i in range(1, 9)]


def documents(*lengths):
    parts = [token_windows(1, length, seed=length)[0] for length in lengths]
    return [(part, part) for part in parts]


def token_losses(logits, labels):
    """Loss of each predicted token, NaN where nothing is predicted."""
    flat = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return flat[labels[:, 1:].flatten() != IGNORED_LABEL]


# --- models


@pytest.mark.parametrize("family", [f for f in {**FAMILIES, **UNKNOWN_FAMILIES} if f not in MIXING])
def test_packed_documents_have_the_losses_that_they_have_alone(family):
    model = tiny_model(family)
    given = documents(23, 14, 3)  # sliding windows are 8 wide
    ((ids, labels, positions),) = pack_documents(given, 64)
    with torch.no_grad():
        packed = model(ids[None], position_ids=positions[None], use_cache=False).logits
        alone = [model(part[None], use_cache=False).logits for part, _ in given]
    losses = [token_losses(a, part[None]) for a, (part, _) in zip(alone, given, strict=True)]
    torch.testing.assert_close(token_losses(packed, labels[None]), torch.cat(losses))
    check_packing(model, batch_size=2)


@pytest.mark.parametrize("family", sorted(MIXING))
def test_a_model_whose_documents_see_each_other_is_refused(family):
    with pytest.raises(ValueError, match=rf"{family} with \w+ attention lets them .*=stream"):
        check_packing(tiny_model(family), batch_size=1)


def test_a_sliced_model_and_one_with_adapters_keep_documents_apart_too():
    model = sliced("llama", True, CUT)
    assert cross_document_attention(model) < 1e-4
    assert cross_document_attention(attach_lora(model, LoRA(dropout=0.0)).get_base_model()) < 1e-4


def test_half_precision_is_told_from_a_leak():
    assert cross_document_attention(tiny_model(dtype=torch.bfloat16)) < 0.05
    assert cross_document_attention(tiny_model("gpt_oss", dtype=torch.bfloat16)) > 0.5


def test_flash_attention_with_several_rows_is_refused():
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 needs batch_size=1, not 4"):
        check_packing(model, batch_size=4)


# --- data and training


@pytest.fixture
def source(tmp_path):
    rows = [{"text": text} for text in TEXTS] + [ALPACA, PAIR]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def make_data(tokenizer, source, **arguments):
    settings = {"seq_len": SEQ_LEN, "packing": "documents", "batch_size": 2, "num_calibration": 4}
    return TextDataModule(
        tokenizer, train=source, validation=source, calibration=source, **{**settings, **arguments}
    )


def test_all_text_and_examples_are_in_the_rows_and_end_with_eos(source):
    tokenizer = make_tokenizer()
    data = make_data(tokenizer, source, seq_len=512)
    found = []
    for ids, _, positions in data.examples("train"):
        starts = (positions == 0).nonzero().flatten().tolist()
        found += [part.tolist() for part in ids.tensor_split(starts[1:])]
    texts = [tokenizer.decode(part, skip_special_tokens=True) for part in found]
    assert set(TEXTS) <= set(texts)
    assert len(found) == len(TEXTS) + 2
    assert all(part[-1] == tokenizer.eos_token_id for part in found)


def test_padding_is_alone_and_counts_nowhere(source):
    data = make_data(make_tokenizer(), source, batch_size=64)
    (batch,) = data.train_dataloader()
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == IGNORED_LABEL).all()
    assert (batch["position_ids"][padding] == 0).all()


def test_validation_and_calibration_stay_windows(source):
    tokenizer = make_tokenizer()
    packed, stream = (make_data(tokenizer, source, packing=p) for p in ("documents", "stream"))
    for ours, others in (
        (packed.validation_windows(), stream.validation_windows()),
        (packed.calibration_windows(), stream.calibration_windows()),
    ):
        torch.testing.assert_close(ours, others, rtol=0, atol=0)
    assert all("position_ids" not in batch for batch in packed.val_dataloader())


def test_an_unknown_packing_is_named(source):
    with pytest.raises(ValueError, match="packing='dense' must be one of stream, documents"):
        make_data(make_tokenizer(), source, packing="dense")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_training_loss_is_that_of_the_documents_alone(source, tmp_path, checkpointing):
    name = write_model(tmp_path / "tiny")
    module = make_module(name, gradient_checkpointing=checkpointing)
    data = make_data(name, source, batch_size=64)
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2), max_steps=1)
    trainer.fit(module, data)
    pruned, _ = load(next(tmp_path.glob("pruned-*")))  # adapters start without effect
    losses = []
    for ids, labels, positions in data.examples("train"):
        starts = (positions == 0).nonzero().flatten().tolist()[1:]
        for part, wanted in zip(ids.tensor_split(starts), labels.tensor_split(starts), strict=True):
            losses.append(token_losses(pruned(part[None]).logits, wanted[None].long()))
    expected = torch.cat(losses).mean().item()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-5)
    assert module.record.recovery["tokens_seen"] == data.describe()["counts"]["train"]["tokens"]


def test_a_family_that_mixes_documents_is_refused_before_any_pruning(source, tmp_path):
    name = write_model(tmp_path / "tiny", "opt")
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2))
    with pytest.raises(ValueError, match="opt with sdpa attention lets them"):
        trainer.fit(make_module(name), make_data(name, source))
    assert not list(tmp_path.glob("pruned-*"))
    with pytest.raises(ValueError, match="opt with sdpa attention lets them"):
        make_trainer(tmp_path / "alone").fit(make_module(name), make_data(name, source))
