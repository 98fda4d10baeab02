"""Pictures and text of an analysis: whole, or not there."""

import json
from dataclasses import asdict

import matplotlib.image
import pytest
import torch
from tiny import tiny_model, token_windows

import prunelight
from prunelight.evaluation.report.analysis_report import write_analysis
from prunelight.evaluation.report.heat_maps import plot_cka

WINDOWS = token_windows(4, 24)


def test_the_files_are_pictures_and_text(tmp_path):
    found = asdict(prunelight.analyze(tiny_model(), WINDOWS))
    files = write_analysis(tmp_path / "new", found)
    names = [
        "analysis.json",
        "analysis-cka.png",
        "analysis-angular_distance.png",
        "analysis-layers.png",
        "analysis.md",
    ]
    assert [file.name for file in files] == names
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(names)
    assert json.loads(files[0].read_text()) == found
    for file in files[1:4]:
        picture = matplotlib.image.imread(file)
        assert picture.shape[0] > 400
        assert picture[..., :3].std() > 0.05, "it is blank"
        assert f"]({file.name})" in files[4].read_text()


def test_the_heat_map_outlines_each_merged_window():
    matrix = torch.eye(7).tolist()
    axes = plot_cka(matrix, "title", [[1, 2], [4, 5, 6]]).axes[0]
    boxes = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in axes.patches]
    assert boxes == [(1.5, 1.5, 2, 2), (4.5, 4.5, 3, 3)]  # state i + 1 is after layer i
    assert not plot_cka(matrix, "title").axes[0].patches


def test_a_full_disk_leaves_no_half_picture(tmp_path, monkeypatch):
    def disk_full(figure, path, **_):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", disk_full)
    found = asdict(prunelight.analyze(tiny_model(), WINDOWS))
    with pytest.raises(OSError, match="no space left"):
        write_analysis(tmp_path, found)
    assert [path.name for path in tmp_path.iterdir()] == ["analysis.json"]
