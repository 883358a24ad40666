"""Figures of made-up runs: which there are, and that the same runs give the same files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.unit.comparison.fakes import FakeLaunch, comparison
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.comparison.drawn_figures import draw_runs
from tsqlora_scale.comparison.findings_of_arms import seconds_of
from tsqlora_scale.comparison.run_folder import LayerPlace, places_of
from tsqlora_scale.quality.scores.score_table import ScoreTable


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison."""
    folder = tmp_path_factory.mktemp("figures")
    comparison(folder).run(FakeLaunch(scratch=folder / "scratch"))
    table = ScoreTable.empty(50)
    numbers = np.random.default_rng(0)
    for name in ("loss", "grad_norm", "quality"):
        getattr(table, name)[:] = numbers.normal(size=50)
    table.scoring_pass[:40] = 0
    table.write(folder / "out/runs/words/tsqlora/seed0/scores", [str(row) for row in range(50)])
    return folder


def test_figures_of_a_comparison(out: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ["words-metric", "words-samples", "words-scores", "words-tsqlora-ranks", "words-tsqlora-sensitivity"]
    files = comparison(out).report(figures="svg").figures
    assert sorted(path.stem for path in files) == names
    before = {path: path.read_bytes() for path in files}
    assert all(content.startswith(b"<?xml") for content in before.values())
    comparison(out).report(figures="svg", tables=False)
    assert {path: path.read_bytes() for path in before} == before


def test_figures_of_run_folders(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = out / "out" / "runs" / "words"
    files = draw_runs([runs / "lora" / "seed0", runs / "tsqlora" / "seed0"], tmp_path, kind="png")
    stems = sorted(path.name.split("_words_")[-1] for path in files)
    assert stems[:3] == ["runs-accuracy.png", "runs-samples.png", "runs-scores.png"]
    assert len(files) == 5
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    with pytest.raises(UserError, match="no finished run"):
        draw_runs([tmp_path], tmp_path)


def test_without_matplotlib_one_line_says_what_to_install(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"tsqlora-scale\[figures\]"):
        comparison(out).report(figures="svg")


def test_layers_by_block_and_kind() -> None:
    names = {
        "base_model.model.bert.encoder.layer.3.attention.self.query": LayerPlace(3, "query"),
        "base_model.model.bert.encoder.layer.3.attention.output.dense": LayerPlace(3, "attention.output"),
        "base_model.model.bert.encoder.layer.3.output.dense": LayerPlace(3, "output"),
        "base_model.model.bert.encoder.layer.10.intermediate.dense": LayerPlace(10, "intermediate"),
    }
    assert places_of(list(names)) == names
    stacks = {
        "base_model.model.model.encoder.layers.0.self_attn.q_proj": LayerPlace(0, "encoder q_proj"),
        "base_model.model.model.decoder.layers.0.self_attn.q_proj": LayerPlace(0, "decoder self_attn.q_proj"),
        "base_model.model.model.decoder.layers.0.encoder_attn.q_proj": LayerPlace(0, "decoder encoder_attn.q_proj"),
    }
    found = places_of(list(stacks))
    assert len(set(found.values())) == 3
    assert places_of(["base_model.model.score"]) == {"base_model.model.score": LayerPlace(0, "base_model.model.score")}


def test_what_plain_text_has_cost_is_training() -> None:
    result = {"seconds": {"warmup": 1.0, "training": 2.0, "scoring": 4.0}, "pretraining": {"seconds": 8.0}}
    assert [seconds_of(result, phase) for phase in ("training", "scoring", "resizing")] == [11.0, 4.0, 0.0]
    assert seconds_of({"seconds": {"training": 2.0}, "pretraining": None}, "training") == 2.0
