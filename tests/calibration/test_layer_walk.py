"""The walk through the decoder layers equals the model, and leaves it as it was."""

import copy
import inspect

import pytest
import torch
from lively_models import between, hooks, lively_model, padded, raw_output
from tiny import FAMILIES, NUM_LAYERS, UNKNOWN_FAMILIES, tiny_model, token_windows

from prunelight.calibration.layer_walk import LayerWalk, _states_fit
from prunelight.calibration.shared_windows import MICRO_BATCH_TOKENS
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.steps import Sparsify
from prunelight.pruning.sparsity.sparsify import sparsify

WINDOWS = token_windows(3, 12)
KINDS = {
    "plain": WINDOWS,
    "right": padded(WINDOWS),
    "left": padded(WINDOWS, left=True),
}
every_kind = pytest.mark.parametrize("windows", KINDS.values(), ids=list(KINDS))


def walked(model, windows, **options):
    """The states after the last layer, (N, T, D)."""
    with LayerWalk(model, windows, **options) as walk:
        for _ in walk.layers():
            walk.advance()
        return torch.cat(walk.states)


@pytest.mark.parametrize("windows", [KINDS["plain"], KINDS["left"]], ids=["plain", "left"])
@pytest.mark.parametrize("family", [*FAMILIES, *UNKNOWN_FAMILIES])
def test_the_walk_ends_where_the_model_does(family, windows):
    model = tiny_model(family)
    weights = copy.deepcopy(model.state_dict())
    found = walked(model, windows)
    after = model.state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    if family == "rwkv":  # the walk leaves out the halving between its layers, which is no layer's
        model.config.rescale_every = 0
    assert torch.equal(found, raw_output(model, windows))


@every_kind
def test_several_micro_batches_give_the_states_of_each_window_alone(windows):
    model, masked = lively_model(), isinstance(windows, dict)
    ids = token_windows(40, 100)  # two micro-batches of one shape
    big = padded(ids, left=windows is KINDS["left"]) if masked else {"input_ids": ids}
    if masked:
        big["attention_mask"][20, 7:90] = 0  # only the second micro-batch has this
    assert ids.numel() > MICRO_BATCH_TOKENS
    found = walked(model, big)
    for row in (0, 20, 39):
        one = {name: value[row : row + 1] for name, value in big.items()}
        real = one.get("attention_mask", torch.ones_like(one["input_ids"])).bool()
        # Rows of other batch sizes are summed in another order.
        expected = raw_output(model, one)
        assert torch.allclose(found[row : row + 1][real], expected[real], 1e-3, 1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "falcon", "mamba", "rwkv", "opt"])
def test_a_layer_may_be_run_again_and_again(family):
    model = lively_model(family)
    with LayerWalk(model, KINDS["right"]) as walk:
        for _ in walk.layers():
            before = walk.states[0].clone()
            first, second = walk.forward(0), walk.forward(0)
            assert torch.equal(first, second)
            assert torch.equal(walk.states[0], before)
            walk.advance()
            assert torch.equal(walk.states[0], first)


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0"])  # cpu:0 makes the layers move
@pytest.mark.parametrize("offload", [False, True])
def test_place_and_offloading_change_nothing(device, offload):
    model, expected = lively_model(), walked(lively_model(), KINDS["left"])
    device = None if device is None else torch.device(device)
    found = walked(model, KINDS["left"], device=device, offload=offload)
    assert torch.equal(found, expected)
    assert {p.device for p in model.parameters()} == {torch.device("cpu")}


def test_a_walk_may_stop_before_the_end_and_start_anew():
    model = lively_model()
    with LayerWalk(model, WINDOWS) as walk:
        for index, _ in walk.layers():
            walk.advance()
            if index == 2:
                break
    assert torch.equal(walked(model, WINDOWS), raw_output(model, WINDOWS))


def test_an_rwkv_in_mid_evaluation_walks_as_at_rest():
    running, at_rest = lively_model("rwkv"), lively_model("rwkv")
    with torch.no_grad():
        expected = running(WINDOWS).logits  # halves weights by layer
    assert torch.equal(walked(running, WINDOWS), walked(at_rest, WINDOWS))
    assert running.config.rescale_every == FAMILIES["rwkv"]["rescale_every"]
    weights = at_rest.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in running.state_dict().items())
    with torch.no_grad():
        assert torch.equal(running(WINDOWS).logits, expected)


@pytest.mark.parametrize("fault", ["none", "body", "layer", "probe", "recording"])
@pytest.mark.parametrize("family", ["llama", "rwkv"])
def test_the_model_is_restored_whatever_happens(family, fault):
    model = lively_model(family).train()
    layers = decoder_layers(model)
    layers[1].eval()
    model.config.use_cache = True
    windows, calls = WINDOWS.clone(), []
    own = layers[4].forward  # as accelerate wraps one

    def wrapped(*args, **kwargs):
        calls.append(1)
        if fault == "probe" or (fault == "layer" and len(calls) > 3):  # the probe takes three
            raise IndexError("broken")
        return own(*args, **kwargs)

    wrapped.__signature__ = inspect.signature(own)
    layers[4].forward = wrapped
    if fault == "recording":
        windows[-1, -1] = 10_000  # beyond the embeddings and the probe
    weights, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]

    def act():
        with LayerWalk(model, windows) as walk:
            for index, _ in walk.layers():
                assert not torch.is_grad_enabled()
                if fault == "body" and index == 3:
                    raise IndexError("broken")
                walk.advance()

    if fault == "none":
        act()
    else:
        with pytest.raises(IndexError):
            act()
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache is True
    assert getattr(model.config, "rescale_every", 2) == 2
    assert hooks(model) == [0] * len(hooks(model))
    assert ["forward" in vars(layer) for layer in layers] == [i == 4 for i in range(NUM_LAYERS)]
    assert layers[4].forward is wrapped
    assert torch.is_grad_enabled()
    after = model.state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("factor", [1.01, 1.5, 0.0])
def test_a_model_that_does_more_between_its_layers_is_refused(factor):
    walked(between(tiny_model(), lambda x, _: (x, None)), WINDOWS)  # this one does not
    model = between(tiny_model(), lambda x, _: (factor * x, None))
    with pytest.raises(TypeError, match=r"decoder layer \d of llama cannot be run on its own"):
        walked(model, WINDOWS)
    with pytest.raises(TypeError, match="go layer by layer do not support it"):
        sparsify(model, Sparsify({"model.layers.0.mlp.up_proj": 0.5}, "wanda"), WINDOWS)


def test_a_model_that_hands_on_a_second_output_is_refused():
    model = between(lively_model(), lambda x, second: (x, second))
    for layer in decoder_layers(model):

        def forward(hidden_states, second=None, own=layer.forward, **kwargs):
            x = own(hidden_states, **kwargs)
            return x if second is None else x + second, x.mean(dim=(1, 2), keepdim=True)

        layer.forward = forward
    with pytest.raises(TypeError, match=r"decoder layer \d of llama cannot be run on its own"):
        walked(model, WINDOWS)


def test_windows_without_any_token_are_refused():
    empty = {"input_ids": WINDOWS, "attention_mask": torch.zeros_like(WINDOWS)}
    model = tiny_model().train()
    with pytest.raises(ValueError, match="0 tokens were counted; mask less"):
        walked(model, empty)
    assert model.training


def test_states_of_more_windows_than_the_device_has_memory_for_do_not_fit():
    model = tiny_model()
    assert _states_fit(model, token_windows(4, 16))
    endless = torch.zeros(1, 1, dtype=torch.long).expand(2**30, 2**20)  # of eight bytes
    assert not _states_fit(model, endless)
