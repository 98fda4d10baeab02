"""What a recovery keeps in memory, told from shapes, against what it keeps when it runs."""

import json

import pytest
import torch
from runs import make_data, make_module, make_trainer, write_model
from saved_bytes import saved_bytes
from tiny import tiny_model, token_windows
from torch import nn

from prunelight.cli import main
from prunelight.models.placement import copy_without_values
from prunelight.models.sizes import stored_bytes, tensor_bytes
from prunelight.planner.memory import pruning_memory
from prunelight.recovery.distillation.language_head import LanguageHead
from prunelight.recovery.lora import LoRA, make_trainable
from prunelight.recovery.memory.recovery_memory import Batch, needs_checkpointing, recovery_memory
from prunelight.recovery.prepared_model import RecoverySettings
from prunelight.recovery.quantization import BitsAndBytes, quantize

BATCH, SEQ_LEN = 2, 24


def estimated(family="llama", *, dtype=torch.float32, batch=None, changes=None, **settings):
    outline = copy_without_values(tiny_model(family, **(changes or {})))
    batch = batch or Batch(BATCH, SEQ_LEN)
    return recovery_memory(outline, RecoverySettings(**settings), batch, dtype)


@pytest.mark.parametrize("recovery", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "opt", "phi3", "falcon", "rwkv"])
def test_activations_are_those_that_autograd_keeps(family, recovery):
    changes = {} if family == "rwkv" else {"attn_implementation": "eager"}
    model = tiny_model(family, **changes)
    trained = make_trainable(model, recovery, LoRA()).train()
    inputs = {"input_ids": token_windows(BATCH, SEQ_LEN), "use_cache": False}
    real = saved_bytes(trained, lambda: LanguageHead(trained).hidden_states(inputs))
    assert estimated(family, recovery=recovery, changes=changes).activations == real


def test_fused_attention_keeps_no_square_of_the_tokens():
    eager, fused = (
        estimated(changes={"attn_implementation": kind}, batch=Batch(1, 512)).activations
        for kind in ("eager", "sdpa")
    )
    squares = 6 * 4 * 512 * 512 * 4  # of each layer and head, in float32
    assert eager - fused == pytest.approx(squares, rel=0.01)  # it keeps a number a row instead


def test_gradients_and_states_are_those_of_adamw():
    model = tiny_model().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    windows = token_windows(BATCH, SEQ_LEN)
    model(windows, labels=windows).loss.backward()
    optimizer.step()
    memory = estimated(recovery="full")
    assert memory.gradients == tensor_bytes(p.grad for p in model.parameters())
    states = [s for state in optimizer.state.values() for s in state.values() if s.dim()]
    assert memory.optimizer == tensor_bytes(states)
    assert memory.weights == tensor_bytes([*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("nf4", {}), ("nf4", {"use_double_quant": False}), ("int8", {})],
    ids=["nf4", "nf4, scales in float32", "int8"],
)
def test_weights_in_few_bits_take_what_bitsandbytes_takes(kind, options):
    pytest.importorskip("bitsandbytes", reason="pip install 'prunelight[quantization]'")
    options = BitsAndBytes(**options)
    changes = {"hidden_size": 256, "intermediate_size": 1024}
    model = tiny_model(dtype=torch.bfloat16, **changes)
    quantize(model, kind, options, torch.device("cpu"))
    memory = estimated(
        dtype=torch.bfloat16, changes=changes, quantization=kind, bitsandbytes=options
    )
    adapters = memory.gradients  # as large as the adapters themselves
    assert memory.weights - adapters == pytest.approx(stored_bytes(model), rel=0.02)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all():
    plain, checkpointed = (
        estimated(changes={"num_hidden_layers": 12}, gradient_checkpointing=on).activations
        for on in (False, True)
    )
    states = BATCH * SEQ_LEN * 32 * 4  # the hidden states of one layer
    assert checkpointed - 12 * states == pytest.approx(plain / 12, rel=0.1)


def test_fsdp2_cuts_weights_gradients_and_states_and_gathers_layers():
    whole = estimated(recovery="full")
    cut = estimated(recovery="full", batch=Batch(BATCH, SEQ_LEN, devices=4, strategy="fsdp2"))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(cut, part) == getattr(whole, part) // 4
    assert whole.gathered == 0 < cut.gathered < whole.weights
    assert cut.activations == whole.activations


def test_ddp_holds_the_gradients_twice():
    one = estimated()
    many = estimated(batch=Batch(BATCH, SEQ_LEN, devices=2))
    assert many.gradients == 2 * one.gradients
    assert many.weights == one.weights


def test_a_streamed_model_takes_one_layer_and_what_is_outside():
    model = tiny_model()
    sizes = pruning_memory(copy_without_values(model), torch.bfloat16)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    assert sizes["whole"] == 2 * sum(p.numel() for p in model.parameters())
    assert sizes["whole"] - sizes["streamed"] == 2 * layers * 5 // 6


def test_experts_in_bfloat16_can_be_told():
    assert estimated("mixtral", dtype=torch.bfloat16, recovery="full").activations > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recovery": "none"}, "recovery='none' must be one of lora, full"),
        ({"recovery": "full", "quantization": "nf4"}, "keeps the base frozen"),
        ({"lora": LoRA(targets=["nothing"])}, "fit no module"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        estimated(**settings)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"devices": 0}, "devices=0 must be at least 1"),
        ({"strategy": "fsdp"}, "strategy='fsdp' must be one of ddp, fsdp2"),
    ],
)
def test_batches_that_cannot_be_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Batch(**values)


def test_the_verb_reads_a_config_alone(tmp_path, capsys):
    tiny_model().config.save_pretrained(tmp_path / "model")
    file = tmp_path / "memory.json"
    main(["estimate", str(tmp_path / "model"), "--seq_len", "64", "--out", str(file)])
    parts = json.loads(file.read_text())
    assert parts["total"] == sum(
        parts[part]
        for part in ("weights", "gradients", "optimizer", "gathered", "activations", "loss")
    )
    assert "recovery: together" in capsys.readouterr().out


def test_a_wrong_setting_of_the_verb_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["estimate", "llama", "--strategy", "deepspeed"])
    said = str(ended.value.code)
    assert "strategy='deepspeed' must be one of ddp, fsdp2" in said
    assert "\n" not in said


def test_the_outline_stays_as_it_was():
    outline = copy_without_values(tiny_model())
    before = {name: (p.shape, p.dtype) for name, p in outline.named_parameters()}
    recovery_memory(outline, RecoverySettings(), Batch(BATCH, SEQ_LEN), torch.bfloat16)
    assert {name: (p.shape, p.dtype) for name, p in outline.named_parameters()} == before
    assert not any(isinstance(m, nn.ModuleDict) for m in outline.modules())


def test_checkpointing_is_chosen_only_where_memory_lacks_without_it(caplog):
    model, settings, batch = tiny_model(), RecoverySettings(), Batch(BATCH, SEQ_LEN)
    cpu = torch.device("cpu")
    plain, checkpointed = (
        recovery_memory(
            model, RecoverySettings(gradient_checkpointing=on), batch, torch.float32, cpu
        ).total
        for on in (False, True)
    )
    assert checkpointed < plain
    for free, needed, told in (
        (2 * plain, False, ""),
        (
            (plain + checkpointed) / 2 / 0.9,
            True,
            "gradient checkpointing is on: the recovery needs",
        ),
        (checkpointed / 2, True, "even so memory may run short: lower batch_size"),
    ):
        caplog.clear()
        assert needs_checkpointing(model, settings, batch, cpu, int(free)) == needed
        assert told in caplog.text
        assert bool(caplog.text) == needed
    assert not needs_checkpointing(model, RecoverySettings("none"), batch, cpu, 0)


@pytest.mark.parametrize(
    ("asked", "batch_size", "on"),
    [(None, 2, False), (None, 10**6, True), (False, 10**6, False), (True, 2, True)],
)
def test_a_run_looks_at_the_memory_where_nothing_is_asked(asked, batch_size, on, tmp_path):
    name = write_model(tmp_path / "tiny")
    module = make_module(name, gradient_checkpointing=asked)
    data = make_data(name, tmp_path, batch_size=batch_size)  # there are fewer rows than that
    make_trainer(tmp_path / "run", max_steps=1).fit(module, data)
    assert module.run.prepared.settings.gradient_checkpointing is on
