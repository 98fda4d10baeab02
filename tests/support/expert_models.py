"""Tiny models with experts, some of which no token takes, and what a naive loop finds of them."""

from __future__ import annotations

import torch
from tiny import COMMON, token_windows
from tiny_families import make_lively
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prunelight.models.families.experts.layout import experts_of
from prunelight.models.families.layers import decoder_layers

NUM_EXPERTS = 6
IDLE = (1, 4)  # experts that no token takes
# model_type -> what differs from tiny.COMMON
MIXTURES: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": NUM_EXPERTS},
    "qwen3_moe": {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "head_dim": 8,
        "decoder_sparse_step": 2,  # layers 1, 3 and 5 have experts
    },
    "gpt_oss": {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "head_dim": 8},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_nextn_predict_layers": 0,
    },
}


def mixture(family: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a lively tiny model with experts, in eval mode and float32."""
    settings = {**COMMON, **MIXTURES[family], **changes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    make_lively(model, seed)
    return model.float().eval()


def router_of(model: PreTrainedModel, layer: int) -> torch.nn.Module:
    """Return the module whose weight has a row for each expert."""
    block = decoder_layers(model)[layer].mlp
    return block.gate if hasattr(block, "gate") else block.router


@torch.no_grad()
def make_idle(model: PreTrainedModel) -> PreTrainedModel:
    """Change routers so that no token takes the experts of `IDLE`, whatever it is; in place.

    Of the others two are opposites: of a and -a, b and -b, two logits are above 0, that of an idle
    expert is 0.
    """
    busy = [expert for expert in range(NUM_EXPERTS) if expert not in IDLE]
    for layer in experts_of(model).layers:
        router = router_of(model, layer)
        router.weight[list(IDLE)] = 0
        router.weight[busy[1]] = -router.weight[busy[0]]
        router.weight[busy[3]] = -router.weight[busy[2]]
        for name in ("bias", "e_score_correction_bias"):
            if getattr(router, name, None) is not None:
                getattr(router, name).zero_()
    return model


@torch.no_grad()
def naive_scores(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None):
    """Return {layer: (REAP scores, share of tokens)}: a loop over tokens, one at a time."""
    inputs = {}
    layers = experts_of(model).layers

    def keep(layer):
        def hook(module, args, kwargs):
            inputs.setdefault(layer, []).append([*args, *kwargs.values()])

        return hook

    modules = {layer: decoder_layers(model)[layer].mlp.experts for layer in layers}
    handles = [
        m.register_forward_pre_hook(keep(layer), with_kwargs=True) for layer, m in modules.items()
    ]
    model(ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    counted = torch.ones(ids.numel(), dtype=torch.bool) if mask is None else mask.flatten().bool()
    found = {}
    for layer in layers:
        ((hidden, indices, gates),) = inputs[layer]
        products = {expert: [] for expert in range(NUM_EXPERTS)}
        for token in counted.nonzero().flatten().tolist():
            for slot, expert in enumerate(indices[token].tolist()):
                output = expert_output(model, modules[layer], hidden[token], expert)
                products[expert].append(gates[token, slot].item() * output.norm().item())
        reap = [sum(x) / len(x) if x else 0.0 for x in products.values()]
        found[layer] = (reap, [len(x) / int(counted.sum()) for x in products.values()])
    return found


def expert_output(model: PreTrainedModel, experts, x: torch.Tensor, j: int) -> torch.Tensor:
    """Return f_j(x) of one token by hand: gated projections, as the families' papers write them."""
    if model.config.model_type == "gpt_oss":
        both = x @ experts.gate_up_proj[j] + experts.gate_up_proj_bias[j]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return inner @ experts.down_proj[j] + experts.down_proj_bias[j]
    gate, up = (experts.gate_up_proj[j] @ x).chunk(2)
    return experts.down_proj[j] @ (torch.nn.functional.silu(gate) * up)


WINDOWS = token_windows()
