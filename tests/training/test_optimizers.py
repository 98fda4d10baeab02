"""AdamW is fused where that is possible, and takes the same steps."""

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from prunelight.training.optimizers import adamw, are_on_cuda, fused_adamw


class Place:
    """Says where it is and what it holds, as a parameter does."""

    def __init__(self, cuda=True, floating=True):
        self.is_cuda, self.is_floating_point = cuda, lambda: floating


def test_adamw_is_fused_where_all_parameters_are_numbers_on_cuda():
    assert are_on_cuda([Place(), Place()])
    assert not are_on_cuda([Place(), Place(cuda=False)])
    assert not are_on_cuda([Place(), Place(floating=False)])


def test_on_the_cpu_it_is_torchs_own_choice_as_checkpoints_of_before_have_it():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    ours, plain = adamw([weight], 0.1), torch.optim.AdamW([weight], lr=0.1)
    assert ours.defaults == plain.defaults


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")])
def test_the_fused_step_is_clipped_and_scaled_like_the_other(scaler):
    """Torch has a fused step on the CPU too, so that this needs no GPU."""
    after = []
    for make in (fused_adamw, lambda p, rate: torch.optim.AdamW(p, lr=rate)):
        weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
        optimizer = make([weight], 0.1)
        plugin = MixedPrecision("16-mixed" if scaler else "bf16-mixed", "cpu", scaler)
        for _ in range(3):
            loss = (weight**2).sum()
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(optimizer)
            plugin.clip_gradients(optimizer, 1.0)
            norm = weight.grad.norm().item()
            scaler.step(optimizer) if scaler else optimizer.step()
            if scaler:
                scaler.update()
            optimizer.zero_grad()
            optimizer.load_state_dict(optimizer.state_dict())  # as a resumed run does
        assert norm == pytest.approx(1.0, rel=1e-4)
        after.append(weight.detach().clone())
    torch.testing.assert_close(*after, rtol=1e-5, atol=1e-5)
