"""Models whose layers matter, padded windows for them, and what their layers see and put out."""

import copy
import math
import types

import torch
from tiny import tiny_model
from transformers.modeling_outputs import BaseModelOutputWithPast

import prunelight
from prunelight.models.families.layers import decoder_layers, first_tensor


def lively_model(family="llama", **changes):
    """A tiny model whose layers change the hidden states much more than at initialisation."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for name, parameter in decoder_layers(model).named_parameters():
            if parameter.ndim >= 2 and "A_log" not in name:
                parameter.mul_(4)
    return model


def lively(model):
    """Make layers matter, each in its own way: at the usual initialisation they hardly do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(model)):
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_((4, 1, 3, 2, 5, 2, 4, 1)[index])
                else:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def padded(windows, *, left=False, padding=4):
    """Return windows with padding on one side, and the mask that says so."""
    fill = torch.zeros(windows.shape[0], padding, dtype=torch.long)
    parts = [(fill, fill), (windows, torch.ones_like(windows))]
    ids, mask = (torch.cat(p, dim=1) for p in zip(*(parts if left else parts[::-1]), strict=True))
    return {"input_ids": ids, "attention_mask": mask}


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


def plain_divergence(model, other, windows):
    """Mean KL of the next-token distributions, over all positions, in nats."""
    with torch.no_grad():
        logits = [each(windows).logits.double().log_softmax(-1) for each in (model, other)]
    return (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()


@torch.no_grad()
def raw_output(model, windows):
    """What the last decoder layer puts out in the model's own forward."""
    found = []
    handle = decoder_layers(model)[-1].register_forward_hook(
        lambda _, args, output: found.append(first_tensor(output))
    )
    batch = windows if isinstance(windows, dict) else {"input_ids": windows}
    model(**batch, use_cache=False)
    handle.remove()
    return found[0]


@torch.no_grad()
def inputs_of(model, windows, path):
    """What the projections at a path get to see, (tokens, I) of each layer, in float64."""
    found = []
    handles = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda m, args: found.append(args[0].flatten(0, 1).double())
        )
        for layer in decoder_layers(model)
    ]
    model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def nll_without(model, layers, windows):
    other = copy.deepcopy(model)
    kept = [x for i, x in enumerate(other.model.layers) if i not in layers]
    other.model.layers = torch.nn.ModuleList(kept)
    other.config.num_hidden_layers = len(kept)
    return math.log(prunelight.perplexity(other, windows))


def between(model, change):
    """Make a llama do something between its layers: change(hidden states, second output)."""

    def forward(self, input_ids=None, attention_mask=None, **_):
        x, second = self.embed_tokens(input_ids), None
        positions = torch.arange(x.shape[1], device=x.device)[None]
        angles = self.rotary_emb(x, position_ids=positions)
        for layer in self.layers:
            x = layer(x, position_embeddings=angles, attention_mask=None, second=second)
            x, second = change(*x) if isinstance(x, tuple) else change(x, None)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))

    model.model.forward = types.MethodType(forward, model.model)
    return model
