"""Fingerprints of models, windows and values: what changes them and what does not."""

import torch
from plans import plan_for
from tiny import tiny_model, token_windows

from prunelight.planning.fingerprints import (
    describe_windows,
    fingerprint_of,
    model_fingerprint,
)


def test_the_fingerprint_does_not_depend_on_the_precision():
    model = tiny_model()
    fingerprint = model_fingerprint(model)
    assert len(fingerprint) == 16
    assert model_fingerprint(tiny_model(dtype=torch.bfloat16)) == fingerprint
    plan_for(model.to(torch.bfloat16), 2).check(tiny_model())


def test_the_fingerprint_changes_with_any_weight_tensor():
    model = tiny_model()
    fingerprints = {model_fingerprint(model)}
    parameters = list(model.parameters())
    for parameter in parameters:
        with torch.no_grad():
            parameter.mul_(1.05)
        fingerprints.add(model_fingerprint(model))
    assert len(fingerprints) == len(parameters) + 1


def test_the_fingerprint_of_windows_depends_on_ids_and_mask():
    windows = token_windows(4, 16)
    mask = torch.ones_like(windows)
    mask[0, 10:] = 0
    plain, masked = describe_windows(windows), describe_windows(windows, mask)
    assert plain == describe_windows(windows.clone())
    assert (plain["num_samples"], plain["seq_len"], plain["tokens"]) == (4, 16, 64)
    assert masked["tokens"] == 64 - 6
    other = describe_windows(token_windows(4, 16, seed=1))
    assert len({plain["fingerprint"], masked["fingerprint"], other["fingerprint"]}) == 3


def test_the_fingerprint_of_values_does_not_depend_on_the_order_of_keys():
    assert fingerprint_of({"a": 1, "b": [2]}) == fingerprint_of({"b": [2], "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})
    assert len(fingerprint_of(1)) == 16
