"""torch.compile of decoder layers: the same numbers as without, and nothing of it left behind."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from own_models import own_model
from runs import make_data, make_module, make_trainer, write_model
from safetensors.torch import load_file
from sliced_models import VARIED, sliced
from tiny import tiny_model, token_windows

from prunelight.callbacks import DLP, ShortGPT
from prunelight.losses import next_token_loss
from prunelight.planning.plan import Plan
from prunelight.planning.steps import Sparsify
from prunelight.pruning.apply import apply
from prunelight.recovery.lora import LoRA
from prunelight.recovery.prepared_model import PreparedModel, RecoverySettings
from prunelight.recovery.zeros.gradual_zeros import Schedule

WINDOWS = token_windows(2, 12)
SGD = partial(torch.optim.SGD, lr=0.5)


@pytest.fixture(autouse=True)
def fresh():
    """Let every test compile anew: caches are of functions, which models share."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def sparse():
    model = tiny_model(num_hidden_layers=2)
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    step = Sparsify(sparsity=dict.fromkeys(names, 0.5), solver="magnitude")
    plan = Plan(method="test", arguments={}, model={}, calibration={}, scores={}, steps=(step,))
    return apply(model, plan), [plan]


MODELS = {
    "llama": lambda: (tiny_model(num_hidden_layers=1), []),
    "sliced": lambda: (sliced("llama", True, VARIED), []),  # every layer has other widths
    "widths": lambda: (own_model("widths", "phi3"), []),  # so has every layer here
    "sparse": sparse,
}


def losses(kind, backend, recovery="lora", checkpointing=False, optimizer=SGD):
    """Train three steps, evaluate, merge; return all losses and the merged weights."""
    model, plans = MODELS[kind]()
    settings = RecoverySettings(
        recovery=recovery,
        lora=LoRA(dropout=0.0),
        gradient_checkpointing=checkpointing,
        compile_backend=backend,
    )
    torch.manual_seed(0)  # of the adapters
    adapted = PreparedModel(model, plans, settings)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    if adapted.zeros.masks is not None:
        adapted.zeros.masks.watch(optimizer)
    found = []
    for _ in range(3):
        loss = next_token_loss(adapted.model(WINDOWS, use_cache=False).logits, WINDOWS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    names = set(adapted.model.state_dict())
    plain = adapted.merged()
    with torch.no_grad():
        found.append(next_token_loss(plain(WINDOWS).logits, WINDOWS).item())
    return found, plain.state_dict(), names


@pytest.mark.parametrize(
    ("kind", "backend", "recovery", "checkpointing"),
    [
        ("sparse", "aot_eager", "lora", True),
        ("sparse", "eager", "full", False),
        ("sliced", "eager", "full", True),
        ("widths", "aot_eager", "lora", False),
        pytest.param("llama", "inductor", "full", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_train_as_others_do(kind, backend, recovery, checkpointing):
    eager, weights, names = losses(kind, None, recovery, checkpointing)
    compiled, ours, our_names = losses(kind, backend, recovery, checkpointing)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= (6 if kind in ("sliced", "widths") else 1), (
        "every layer of another width was compiled"
    )
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert eager[-1] < eager[0]
    assert our_names == names
    # Compilers may reorder sums: rounding of float32 over a few steps.
    torch.testing.assert_close(ours, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_backends_of_torchs_own_kernels_give_the_same_bits_with_adam(backend):
    adam = partial(torch.optim.AdamW, lr=0.01)
    plain, weights, _ = losses("llama", None, "full", optimizer=adam)
    compiled, ours, _ = losses("llama", backend, "full", optimizer=adam)
    assert compiled == plain
    assert all(torch.equal(ours[name], weight) for name, weight in weights.items())


class Compiled(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        layers = [m for m in pl_module.modules() if getattr(m, "_compiled_call_impl", None)]
        self.layers = len(layers)


def test_a_compiled_fit_gives_the_checkpoint_and_result_of_another(tmp_path):
    name, found = write_model(tmp_path / "tiny"), []
    for backend in (None, "eager"):
        root = tmp_path / str(backend)
        pl.seed_everything(0, verbose=False)
        # Adam divides by gradients near zero, which makes rounding as large as a step.
        settings = {"recovery": "full", "optimizer": partial(torch.optim.SGD, lr=0.1)}
        watch, module = Compiled(), make_module(name, compile_backend=backend, **settings)
        trainer = make_trainer(root, ShortGPT(num_layers=2), watch, max_epochs=1)
        trainer.fit(module, make_data(name, tmp_path, num_validation=2))
        assert watch.layers == (4 if backend else 0)
        assert not any(m._compiled_call_impl for m in module.modules()), "merged ones are plain"
        checkpoint = torch.load(root / "checkpoints" / "epoch=0.ckpt", weights_only=True)
        found.append((checkpoint["state_dict"], load_file(root / "final" / "model.safetensors")))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_an_unknown_backend_is_named_at_once():
    with pytest.raises(ValueError, match="compile_backend='induktor' must be one of .*inductor"):
        make_module("unused", compile_backend="induktor")


def test_a_gradual_schedule_and_compiled_layers_exclude_each_other(tmp_path):
    name = write_model(tmp_path / "tiny")
    trainer = make_trainer(tmp_path, DLP(sparsity=0.5, schedule=Schedule(0, 2)))
    with pytest.raises(ValueError, match="watches inputs inside .* compile_backend='eager'"):
        trainer.fit(make_module(name, compile_backend="eager"), make_data(name, tmp_path))
