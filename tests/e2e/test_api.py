"""The Python interface: in one process, again and again, without a launcher and without an exit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from tests.runs import losses_of, run_tree, write_config
from tsqlora_scale import Config, UserError, evaluate, export, load_config, score, train


def config_of(folder: Path, models: Path, name: str, *overrides: str) -> Config:
    path = write_config(folder / f"{name}.yaml", run_tree("bert", folder, models, name))
    return load_config(path, list(overrides))


def test_a_whole_life(tmp_path: Path, models_dir: Path) -> None:
    config = config_of(tmp_path, models_dir, "run")
    result = train(config)
    assert result.folder == tmp_path / "runs" / "run"
    assert result.record == json.loads((result.folder / "result.json").read_text())
    assert result.metrics.keys() == result.metrics_before.keys() == {"accuracy"}
    assert sum(result.ranks.values()) == sum(result.record["ranks_end"].values())
    assert result.seconds["training"] > 0
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name_or_path, num_labels=2)
    PeftModel.from_pretrained(base, str(result.adapter))
    assert evaluate(config, result.adapter) == pytest.approx(result.metrics)
    notes = export(result.adapter, "padded", tmp_path / "padded")
    assert "rank" in notes[0]
    scores = score(config_of(tmp_path, models_dir, "pool"), adapter=result.adapter, top=2)
    assert len(scores.summary["best"]) == 2
    assert json.loads((scores.folder.parent / "scores.json").read_text()) == scores.summary


@pytest.mark.slow
def test_one_process_trains_again_and_otherwise(tmp_path: Path, models_dir: Path) -> None:
    """Other accumulation and another type of the base: Accelerate's state is the process's."""
    first = train(config_of(tmp_path, models_dir, "first"))
    train(config_of(tmp_path, models_dir, "bf16", "model.dtype=bf16", "train.max_steps=9"))
    train(config_of(tmp_path, models_dir, "other", "train.micro_batch_size=6", "train.max_steps=9"))
    again = train(config_of(tmp_path, models_dir, "again"))
    assert losses_of(again.folder) == losses_of(first.folder)


def test_resuming_and_starting_over(tmp_path: Path, models_dir: Path) -> None:
    config = config_of(tmp_path, models_dir, "run", "train.checkpoint_every=5", "train.checkpoint_keep=9")
    whole = train(config)
    losses = losses_of(whole.folder)
    resumed = train(config, resume=whole.folder / "checkpoints" / "step-00000005")
    assert losses_of(resumed.folder) == losses
    with pytest.raises(UserError, match="already holds a run"):
        train(config)
    assert losses_of(train(config, overwrite=True).folder) == losses


def test_mistakes_are_user_errors(tmp_path: Path, models_dir: Path) -> None:
    config = config_of(tmp_path, models_dir, "run")
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match=r"--resume 'nowhere'"):
        train(config, resume="nowhere")
    with pytest.raises(UserError, match="no folder"):
        evaluate(config, tmp_path / "nothing")
    with pytest.raises(UserError, match="top"):
        score(config, top=0)
    with pytest.raises(UserError, match="nothing to score"):
        score(config_of(tmp_path, models_dir, "lora", "adapter.method=lora"))
    with pytest.raises(UserError, match="form='onnx'"):
        export(tmp_path, "onnx", tmp_path / "out")  # type: ignore[arg-type]


def test_importing_it_is_cheap() -> None:
    """Nothing heavy is loaded before it is used, and every name is there."""
    code = (
        "import sys, tsqlora_scale as t; t.load_config, t.Config, t.train, t.UserError; "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules); "
        "assert set(t.__all__) <= set(dir(t)); [getattr(t, name) for name in t.__all__]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
