"""What the matrices of a layer see: which share a statistic, and what it holds."""

import weakref

import pytest
import torch
from lively_models import hooks, lively_model, padded, raw_output
from tiny import tiny_model, token_windows
from tiny_families import tiny_family
from torch.nn.functional import silu

from prunelight.calibration.layer_inputs.input_statistics import InputStatistics
from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import Hessian, InputNorm
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import layer_matrices
from prunelight.planning.steps import Sparsify
from prunelight.pruning.sparsity.sparsify import sparsify

WINDOWS = token_windows(3, 12)
KINDS = {
    "plain": WINDOWS,
    "right": padded(WINDOWS),
    "left": padded(WINDOWS, left=True),
}
every_kind = pytest.mark.parametrize("windows", KINDS.values(), ids=list(KINDS))


def statistics(model, windows, index, make=InputNorm):
    """What the matrices of one layer see, and how many tokens count."""
    with LayerWalk(model, windows) as walk:
        for layer, _ in walk.layers():
            if layer == index:
                seen = InputStatistics(layer_matrices(model, index), make)
                for batch, mask in enumerate(walk.masks):
                    with seen.watching(mask):
                        walk.forward(batch)
                return seen, walk.counted()
            walk.advance()


def short(name):
    return name.rpartition(".")[2]


QKV = ["q_proj", "k_proj", "v_proj"]
SHARED = {
    "llama": [QKV, ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gemma3_text": [QKV, ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "opt": [QKV, ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    # Attention and MLP side by side read one normed state.
    "falcon": [
        ["query_key_value", "dense_h_to_4h"],
        ["dense"],
        ["dense_4h_to_h"],
    ],
    "phi": [[*QKV, "fc1"], ["dense"], ["fc2"]],
    "cohere": [[*QKV, "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]],
    # Side by side too, but each with a norm of its own.
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "mixtral": [QKV, ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "mamba": [["in_proj"], ["x_proj"], ["out_proj"]],
    "rwkv": [[n] for n in ("key", "value", "receptance", "output", "key", "receptance", "value")],
}


@pytest.mark.parametrize("family", SHARED)
def test_matrices_that_read_one_tensor_share_a_statistic(family):
    seen, counted = statistics(tiny_model(family), WINDOWS, 1)
    groups = [sorted(short(matrix.name) for matrix in group) for group in seen.groups()]
    assert sorted(groups) == sorted(sorted(group) for group in SHARED[family])
    for group in seen.groups():
        assert all(seen.of(matrix) is seen.of(group[0]) for matrix in group)
        if not group[0].fused:
            assert [one.tokens for one in seen.of(group[0])] == [counted] == [WINDOWS.numel()]


@every_kind
@pytest.mark.parametrize("family", ["llama", "bloom", "cohere", "opt"])
def test_norms_and_hessians_are_those_of_the_real_tokens(family, windows):
    # The unpadded windows give the truth; a mask changes the attention kernel.
    model = lively_model(family)
    inputs, modules = {}, dict(model.named_modules())
    found = layer_matrices(model, 2)
    for matrix in found:
        modules[matrix.name].register_forward_pre_hook(
            lambda _, args, name=matrix.name: inputs.update({name: args[0].double()})
        )
    raw_output(model, WINDOWS)
    expected = {name: x.flatten(0, -2) for name, x in inputs.items()}
    seen, counted = statistics(model, windows, 2, Hessian)
    assert counted == WINDOWS.numel()
    for matrix in found:
        (one,) = seen.of(matrix)
        x = expected[matrix.name]
        assert one.tokens == counted
        assert torch.allclose(one.norms().double(), x.square().sum(0).sqrt(), 1e-3)
        gram = x.T @ x
        assert (one.result() - gram).norm() < 1e-3 * gram.norm()


@every_kind
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_see_the_tokens_that_are_routed_to_them(family, windows):
    model, routed = lively_model(family), []
    experts = decoder_layers(model)[1].mlp.experts
    seen, _ = statistics(model, windows, 1, Hessian)
    handle = experts.register_forward_pre_hook(lambda _, args: routed.append(args))
    raw_output(model, windows)
    handle.remove()
    ((states, chosen, _),) = routed
    mask = windows["attention_mask"].flatten().bool() if isinstance(windows, dict) else None
    gate_up, down = (m for m in layer_matrices(model, 1) if m.fused)
    for expert in range(4):
        rows = [
            token
            for token in range(len(states))
            if expert in chosen[token] and (mask is None or mask[token])
        ]
        x = states[rows]
        gate, up = (x @ gate_up.views()[expert].T).chunk(2, dim=-1)
        for matrix, inputs in ((gate_up, x), (down, silu(gate) * up)):
            one, inputs = seen.of(matrix)[expert], inputs.double()
            assert one.tokens == len(rows) > 0
            # Products of float32.
            assert torch.allclose(one.result().double(), inputs.T @ inputs, 1e-3, 1e-4)
            assert torch.allclose(one.norms().double(), inputs.norm(dim=0), 1e-4)
    total = WINDOWS.numel() * chosen.shape[1]
    assert sum(one.tokens for one in seen.of(gate_up)) == total


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_weight_of_the_experts_may_be_watched_without_the_other(name):
    model = lively_model("mixtral")
    both, _ = statistics(model, WINDOWS, 0)
    (matrix,) = (m for m in layer_matrices(model, 0) if short(m.name) == name)
    alone = InputStatistics([matrix], InputNorm)
    with LayerWalk(model, WINDOWS) as walk:
        for _ in walk.layers():
            with alone.watching():
                walk.forward(0)
            break
    for one, other in zip(alone.of(matrix), both.of(matrix), strict=True):
        assert torch.equal(one.squares, other.squares)


@torch.no_grad()
def test_inputs_of_earlier_layers_are_not_kept_while_a_whole_model_computes():
    model = tiny_model()
    outputs = [
        m for i in range(6) for m in layer_matrices(model, i) if short(m.name) == "down_proj"
    ]
    inputs, alive = [], []

    def look(module, args):
        alive.append(sum(known() is not None for known in inputs))
        inputs.append(weakref.ref(args[0]))

    for matrix in outputs:
        matrix.owner.register_forward_pre_hook(look)
    with InputStatistics(outputs, InputNorm).watching():
        model(WINDOWS)
    assert alive == [0] * 6


def test_a_matrix_that_is_never_called_is_named():
    model = tiny_model()
    layer = decoder_layers(model)[3]
    layer.mlp.forward = lambda x: x
    step = Sparsify(dict.fromkeys([m.name for m in layer_matrices(model, 3)], 0.5), "wanda")
    message = r"model\.layers\.3\.mlp\.gate_proj was never called in a forward.*leave it out"
    with pytest.raises(ValueError, match=message):
        sparsify(model, step, WINDOWS)
    seen = InputStatistics(layer_matrices(model, 0), InputNorm)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj was never called"):
        seen.groups()


def test_watching_leaves_no_hooks_behind_on_errors_too():
    model = tiny_model()
    seen = InputStatistics(layer_matrices(model, 0), InputNorm)

    def act():
        with seen.watching():
            model(WINDOWS[:, :4])
            raise KeyError("broken")

    with pytest.raises(KeyError):
        act()
    assert hooks(model) == [0] * len(hooks(model))
    model(WINDOWS)
    assert {one.tokens for m in seen.matrices for one in seen.of(m)} == {12}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_statistics_go_on_from_their_saved_state(family, tmp_path):
    model = lively_model(family)
    found = layer_matrices(model, 0)
    whole, first, second = (InputStatistics(found, InputNorm) for _ in range(3))
    for seen, part in ((whole, WINDOWS[:1]), (whole, WINDOWS[1:]), (first, WINDOWS[:1])):
        with seen.watching(), torch.no_grad():
            model(part)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with second.watching(), torch.no_grad():
        model(WINDOWS[1:])
    for matrix in found:
        for one, other in zip(second.of(matrix), whole.of(matrix), strict=True):
            assert one.tokens == other.tokens
            assert torch.equal(one.squares, other.squares)
    assert [[m.name for m in group] for group in second.groups()] == [
        [m.name for m in group] for group in whole.groups()
    ]


def test_sums_are_replaced_once_where_they_are_shared():
    seen, _ = statistics(lively_model(), WINDOWS, 0)
    before = {m.name: seen.of(m)[0].norms() for m in seen.matrices}
    seen.reduce(lambda squares: 4 * squares)
    assert all(torch.equal(seen.of(m)[0].norms(), 2 * before[m.name]) for m in seen.matrices)


# Experts per token; each family has another form of experts.
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "jetmoe", "dbrx", "mixtral"])
def test_each_token_counts_once_for_each_expert_it_is_routed_to(family):
    model = tiny_family(family)
    layer = decoder_layers(model)[1]
    stacks = [m for m in layer_matrices(model, 1) if m.fused and "self_attention" not in m.name]
    block = next(module for module in layer.children() if any(_holds(module, m) for m in stacks))
    entering = []
    handle = block.register_forward_pre_hook(lambda _, args: entering.append(args[0].double()))
    raw_output(model, WINDOWS)
    handle.remove()
    seen, _ = statistics(model, WINDOWS, 1)
    expected = 2 * entering[0].flatten(0, -2).square().sum(0)  # every tiny mixture takes two
    first = next(m for m in stacks if seen.of(m)[0].squares.shape == expected.shape)
    found = sum(statistic.squares.double() for statistic in seen.of(first))
    assert torch.allclose(found, expected, 1e-4)
    assert sum(statistic.tokens for statistic in seen.of(first)) == 2 * WINDOWS.numel()


def _holds(module, matrix):
    return any(parameter is matrix.parameter for parameter in module.parameters())


def test_a_weight_that_a_mixer_reads_itself_is_seen_in_its_product():
    model = tiny_family("mamba")
    seen, counted = statistics(model, WINDOWS, 1)
    (dt_proj,) = (m for m in layer_matrices(model, 1) if m.name.endswith("dt_proj"))
    assert dt_proj.read_directly
    assert seen.of(dt_proj)[0].tokens == counted
    assert seen.of(dt_proj)[0].norms().gt(0).all()


def test_experts_that_hide_padding_are_refused_with_padded_windows():
    model = tiny_family("jetmoe")
    with pytest.raises(ValueError, match="experts of .* hide which tokens are padding; take"):
        statistics(model, padded(WINDOWS), 1)
