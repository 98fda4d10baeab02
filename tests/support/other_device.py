"""Methods on a streamed model whose layers compute on the emulated device: FAMILY COUNT METHOD ...

Writes one JSON line a method: what differs from the CPU with COUNT windows, and what was moved.
Without a method, the line says what saving and timing do with such a model.
"""

import copy
import json
import sys
from functools import partial

import torch
from device_parity import compared
from emulated_device import BYTES, DEVICE, Emulating
from lively_models import between
from tiny import tiny_model, token_windows

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.evaluation.perplexity import perplexity
from prunelight.evaluation.quality.divergence import against_reference
from prunelight.evaluation.quality.reference_logits import ReferenceLogits
from prunelight.evaluation.quality.text_quality import text_quality
from prunelight.evaluation.quality.text_windows import TextWindows
from prunelight.evaluation.serving.shape import prompt
from prunelight.evaluation.serving.timing import time_generation
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import compute_device, move_if_it_fits, place_like
from prunelight.models.saving import _compare_behaviour, generation_fault
from prunelight.planner.scoring import score_model
from prunelight.scoring.analysis import analyze
from prunelight.scoring.block_influence import block_influences


def evaluated(family):
    """Return what evaluations of a streamed model cost and say, each beside the CPU's.

    Costs are bytes brought to the device, in sizes of the model.
    """
    model, windows = tiny_model(family).requires_grad_(False), token_windows(300, 16)
    other = copy.deepcopy(model)
    for weight in decoder_layers(other).parameters():
        weight.mul_(3)
    text = TextWindows("text", "protocol", windows)
    with Emulating():
        put = partial(move_if_it_fits, device=torch.device(DEVICE.type), offload=True)
        pair, streamed = (model, other), (put(copy.deepcopy(model)), put(copy.deepcopy(other)))
        kept = ReferenceLogits.of(other, windows, num_windows=300)
        measures = {
            "perplexity": lambda ours, _: perplexity(ours, windows),
            "text": lambda ours, _: text_quality(ours, text).perplexity.value,
            "divergence": lambda *both: against_reference(*both, text)[2].kl.value,
            "kept logits": lambda ours, _: kept.divergence_at(ours).kl.value,
        }
        rows = {}
        for name, measure in measures.items():
            expected = measure(*pair)
            BYTES.clear()
            found = measure(*streamed)
            rows[name] = {"values": [found, expected], "moved": BYTES["to"] / _bytes(model)}
        return rows


def _bytes(model):
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def surroundings(family):
    """Return what the check of a saved model and a timing say of a streamed one."""
    model = tiny_model(family).requires_grad_(False)  # see device_parity
    with Emulating():
        streamed = move_if_it_fits(copy.deepcopy(model), DEVICE, offload=True)
        reloaded = place_like(model, streamed)
        BYTES.clear()
        scores = score_model(streamed, token_windows(300, 16), device=DEVICE, offload=True)
        scored = BYTES["to"] / _bytes(model)
        told = [analyze(tiny_model(family), token_windows(300, 16)).cka[0]]
        BYTES.clear()
        told.append(analyze(streamed, token_windows(300, 16)).cka[0])
        analysed = BYTES["to"] / _bytes(model)
        more = between(tiny_model(family), lambda x, _: (1.5 * x, None)).requires_grad_(False)
        windows = token_windows(8, 16)
        expected = block_influences(copy.deepcopy(more), windows).mean
        expected_perplexity = perplexity(more, windows)
        not_alone = move_if_it_fits(more, DEVICE, offload=True)
        return {
            "not_alone": [block_influences(not_alone, windows).mean, expected],
            "evaluated": evaluated(family),
            "walks_on": str(LayerWalk(streamed, windows, device=torch.device("emulated")).device),
            "perplexity_not_alone": [perplexity(not_alone, windows), expected_perplexity],
            "scored": scored,
            "told": told,
            "analysed": analysed,
            "left_out": scores.left_out,
            "name": "surroundings",
            "reloaded_on": compute_device(reloaded).type,
            "generation_fault": generation_fault(streamed),
            "compared": _compare_behaviour(streamed, reloaded, ""),
            "first_token": time_generation(streamed, prompt(streamed, 4), 3).first_token,
            "home": [weight.device.type for weight in streamed.parameters()],
        }


def main(family, count, names):
    if not names:
        sys.stdout.write(json.dumps(surroundings(family)) + "\n")
    put = partial(move_if_it_fits, device=DEVICE, offload=True)
    for name in names:
        try:
            with Emulating():
                row = compared(name, family, put, DEVICE, num_windows=count, moved=BYTES)
        except Exception as error:  # of one method; the others are still compared
            row = {"name": name, "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
