"""``scoring.proxy_model``: another model scores, before the one that is trained is loaded."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs import losses_of, ranks_of, result_of, run_tree, write_config
from tests.steps import signalled_in_step
from tests.tiny import tiny_model
from tsqlora_scale import proxy
from tsqlora_scale.commands import main as cli
from tsqlora_scale.quality import BatchSampler, ScoreTable
from tsqlora_scale.run.training_run import Run


def tree_with_proxy(tmp_path: Path, models_dir: Path, **train: Any) -> dict[str, Any]:
    tree = run_tree("bert", tmp_path, models_dir, "run", train=train)
    tree["scoring"] |= {"proxy_model": str(tiny_model("deberta", models_dir)), "refresh": "none"}
    return tree


def test_a_proxy_scores_the_pool(tmp_path: Path, models_dir: Path) -> None:
    tree = tree_with_proxy(tmp_path, models_dir, checkpoint_every=5, checkpoint_keep=5)
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["train", "--config", str(config)]) == 0
    run_dir = tmp_path / "runs" / "run"
    table, ids = ScoreTable.read(run_dir / "scores")
    assert (table.scoring_pass == 0).all()
    assert len(list((run_dir / "scores").glob("*.parquet"))) == 1
    assert result_of(run_dir)["seconds"]["scoring"] > 0
    assert len(losses_of(run_dir)) == 13
    assert len(ranks_of(run_dir)) == 2
    assert "warmup" not in result_of(run_dir)["seconds"], "the warm-up is the proxy's"
    assert len(losses_of(tmp_path / "runs" / "run-proxy")) == 2
    assert not (tmp_path / "runs" / "run-proxy" / "score-parts").exists()

    # the same as scoring with the proxy alone
    alone = run_tree("deberta", tmp_path, models_dir, "alone")
    assert cli.main(["score", "--config", str(write_config(tmp_path / "alone.yaml", alone))]) == 0
    expected, expected_ids = ScoreTable.read(tmp_path / "runs" / "alone" / "scores")
    assert ids == expected_ids
    for name, column in vars(expected).items():
        np.testing.assert_array_equal(getattr(table, name), column, err_msg=name)

    # a run that goes on has the scores in its checkpoint
    losses, ranks = losses_of(run_dir), ranks_of(run_dir)
    shutil.rmtree(tmp_path / "runs" / "run-proxy")
    for step in (10, 13):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step:08d}")
    moved = Path(tree["scoring"]["proxy_model"]).rename(tmp_path / "moved")
    assert cli.main(["train", "--config", str(config), "--resume", "auto"]) == 0
    moved.rename(tree["scoring"]["proxy_model"])
    assert not (tmp_path / "runs" / "run-proxy").exists()
    assert (losses_of(run_dir), ranks_of(run_dir)) == (losses, ranks)


def test_a_run_killed_after_its_proxy(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checkpoint of its own, it takes the proxy's pass up where that was, its seconds too."""
    config = write_config(tmp_path / "config.yaml", tree_with_proxy(tmp_path, models_dir))
    assert cli.main(["train", "--config", str(config)]) == 0
    run_dir = tmp_path / "runs" / "run"
    losses = losses_of(run_dir)
    shutil.rmtree(run_dir)
    score = proxy.warm_up_and_score

    def after_long(run: Run) -> None:
        run.record.seconds["warmup"] += 1000  # as if the process that was killed had taken so long
        score(run)

    monkeypatch.setattr(proxy, "warm_up_and_score", after_long)
    assert cli.main(["train", "--config", str(config), "--resume", "auto"]) == 0
    assert losses_of(run_dir) == losses
    assert result_of(run_dir)["seconds"]["scoring"] > 1000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scoring.refresh=every_event"], "'proxy_model' scores once"),
        (["scoring.proxy_model=./nowhere"], "scoring.proxy_model='./nowhere': model.name_or_path='./nowhere'"),
    ],
)
def test_mistakes(
    tmp_path: Path, models_dir: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "config.yaml", tree_with_proxy(tmp_path, models_dir))
    assert cli.main(["train", "--config", str(config), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_proxys_folder_is_not_written_over(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "config.yaml", tree_with_proxy(tmp_path, models_dir))
    folder = tmp_path / "runs" / "run-proxy"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("a run of someone")
    assert cli.main(["train", "--config", str(config)]) == 2
    assert "run-proxy" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == "a run of someone"


def test_scoring_alone_has_no_proxy(tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "config.yaml", tree_with_proxy(tmp_path, models_dir))
    assert cli.main(["score", "--config", str(config)]) == 2
    assert "set model.name_or_path to it" in capsys.readouterr().err


def test_a_proxy_that_is_stopped(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier run has left is not resumed in its place."""
    config = write_config(tmp_path / "config.yaml", tree_with_proxy(tmp_path, models_dir))
    assert cli.main(["train", "--config", str(config)]) == 0
    run_dir = tmp_path / "runs" / "run"
    losses = losses_of(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(BatchSampler, "draw", signalled_in_step(0, signal.SIGTERM))
        assert cli.main(["train", "--config", str(config), "--overwrite"]) == 0
    assert not (run_dir / "checkpoints").exists()
    assert len(losses_of(tmp_path / "runs" / "run-proxy")) == 1
    assert cli.main(["train", "--config", str(config), "--resume", "auto"]) == 0
    assert losses_of(run_dir) == losses
