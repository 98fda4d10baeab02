"""The study of pruning and quantization: what its numbers mean, and that a fit makes them."""

import json
import math

import pytest
from runs import make_data, make_module, make_trainer, write_model

from prunelight.callbacks import Orthogonality, ShortGPT
from prunelight.evaluation.orthogonality import ROWS, Cell, Interaction, orthogonality_section


def cells(*nats):
    values = (Cell(math.exp(3 + x), 0.4, 1_500_000) for x in (0, *nats))
    return dict(zip(ROWS, values, strict=True))


def test_harms_that_add_up_have_no_interaction():
    found = Interaction.of(cells(0.5, 0.1, 0.6))
    assert found.beyond_sum == pytest.approx(0, abs=1e-12)
    assert "quantization costs 0.1000 on the pruned model" in found.sentence()
    assert found.sentence().endswith(
        "The interaction is +0.0 % of the sum: they are orthogonal here."
    )


@pytest.mark.parametrize(("both", "told"), [(0.75, "+25.0"), (0.3, "-50.0")])
def test_harms_that_amplify_or_mask_each_other_interact(both, told):
    found = Interaction.of(cells(0.5, 0.1, both))
    assert found.sentence().endswith(f"is {told} % of the sum: they are not orthogonal here.")


def test_without_harm_there_is_no_share():
    found = Interaction.of(cells(-0.2, 0.1, -0.1))
    assert math.isnan(found.share)
    assert "means nothing here" in found.sentence()


def test_the_table_has_all_eight_cells():
    text = orthogonality_section(cells(0.5, 0.1, 0.6), cells(0.2, 0.1, 0.5))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["", "---", *ROWS]
    assert rows[5].count("1.5") == 2
    assert "Without recovery, pruning raises log-perplexity by 0.5000" in text
    assert "With recovery, pruning raises log-perplexity by 0.2000" in text


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return write_model(directory, hidden_size=64, intermediate_size=64, num_hidden_layers=3)


def test_a_fit_recovers_the_other_models_too_and_tells_in_its_report(name, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install 'prunelight[quantization]'")
    module = make_module(name, quantization="nf4", loss="kd")
    trainer = make_trainer(tmp_path, Orthogonality(), ShortGPT(num_layers=1), max_epochs=1)
    trainer.fit(module, make_data(name, tmp_path))
    reports = {
        what: json.loads((tmp_path / "orthogonality" / what / "report.json").read_text())
        for what in ("dense", "pruned", "quantized")
    }
    stages = {what: [s["name"] for s in told["stages"]] for what, told in reports.items()}
    assert stages["dense"] == stages["pruned"] == ["dense", "recovered"]
    assert stages["quantized"] == ["dense", "quantized", "recovered"]
    own = json.loads((tmp_path / "report.json").read_text())
    steps = {told["recovery"]["optimizer_steps"] for told in (own, *reports.values())}
    assert steps == {3}
    assert reports["pruned"]["stages"][0]["perplexity"] == own["stages"][1]["perplexity"]
    assert reports["pruned"]["recovery"]["distillation.name"] == name, "it has the same teacher"
    text = (tmp_path / "report.md").read_text()
    assert "## Are pruning and quantization orthogonal?" in text
    for value in (own["stages"][1], own["stages"][2], reports["dense"]["stages"][1]):
        assert f"| {value['perplexity']:.4g} | {value['accuracy']:.4f} |" in text


@pytest.mark.parametrize(
    ("callbacks", "arguments", "message"),
    [
        ([], {"quantization": "nf4"}, "pruning callback False"),
        ([ShortGPT(num_layers=1)], {}, "model.quantization=none"),
        ([ShortGPT(num_layers=1)], {"recovery": "none"}, "model.recovery=none must be there"),
    ],
)
def test_a_run_with_nothing_to_compare_is_refused(callbacks, arguments, message, name, tmp_path):
    module, trainer = (
        make_module(name, **arguments),
        make_trainer(tmp_path, Orthogonality(), *callbacks),
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, make_data(name, tmp_path))
    assert not list(tmp_path.glob("pruned-*"))
