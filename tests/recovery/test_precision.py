"""What a precision loses, and that adapters stay float32."""

import lightning.pytorch as pl
import pytest
import torch
from runs import make_data, make_module, make_trainer, write_model
from transformers import AutoModelForCausalLM

from prunelight.recovery.precision import precision_faults
from prunelight.run.run_state import FINAL


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


class Dtypes(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        parameters = [*pl_module.model.parameters()]
        self.trained = {p.dtype for p in parameters if p.requires_grad}
        self.frozen = {p.dtype for p in parameters if not p.requires_grad}


@pytest.mark.parametrize(
    ("recovery", "dtype", "precision", "trained", "final"),
    [
        ("lora", "float32", "bf16-true", torch.float32, torch.bfloat16),
        ("lora", "bfloat16", "bf16-mixed", torch.float32, torch.bfloat16),
        ("lora", "float16", "16-true", torch.float32, torch.float16),
        ("full", "float32", "bf16-mixed", torch.float32, torch.float32),
        ("full", "float32", "bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapters_stay_float32_under_every_precision(
    name, tmp_path, recovery, dtype, precision, trained, final
):
    module = make_module(name, recovery=recovery, dtype=dtype, gradient_checkpointing=True)
    dtypes = Dtypes()
    trainer = make_trainer(tmp_path, dtypes, precision=precision, max_steps=3)
    trainer.fit(module, make_data(name, tmp_path))
    assert dtypes.trained == {trained}
    assert dtypes.frozen <= {final}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / FINAL).dtype == final
    dense, recovered = module.record.stages
    assert recovered.perplexity < dense.perplexity


@pytest.mark.parametrize(
    ("dtype", "precision", "recovery", "expected"),
    [
        (torch.float32, "32-true", "full", []),
        (torch.float32, "bf16-mixed", "full", []),
        (torch.float32, "16-mixed", "full", []),
        (torch.bfloat16, "32-true", "lora", []),
        (torch.bfloat16, "bf16-true", "lora", []),
        (torch.float16, "16-mixed", "lora", []),
        (torch.float16, "16-true", "none", []),
        (torch.float32, "bf16-true", "lora", ["casts torch.float32 weights to torch.bfloat16"]),
        (torch.bfloat16, "bf16-mixed", "full", ["small updates are lost"]),
        (torch.float16, "32-true", "lora", ["does not scale the loss"]),
        (torch.float32, "16-true", "full", ["casts", "small updates", "does not scale the loss"]),
    ],
)
def test_what_a_precision_loses_is_told(dtype, precision, recovery, expected):
    faults = precision_faults(dtype, precision, recovery)
    assert len(faults) == len(expected)
    assert all(part in fault for part, fault in zip(expected, faults, strict=True))


def test_float16_weights_cannot_be_trained_with_a_gradient_scaler():
    with pytest.raises(ValueError, match="torch scales no float16 gradients; set model.dtype=fl"):
        precision_faults(torch.float16, "16-mixed", "full")
