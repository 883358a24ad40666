"""What a user is told of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import run_tree, write_config
from tests.unit.tasks.cases import ANSWERS, CLASSES, SUMMARIES
from tsqlora_scale.commands import main as cli
from tsqlora_scale.report.input_preview import input_preview
from tsqlora_scale.tasks import Task

LONG = "the plot is very bad and the actor is dull"
TEXTS = f"source\ttarget\nthe film\tgood film\nthe film\tgood\n{LONG}\tgood film and story\nthe film\tbad\n"
LIMITS = {"max_length": 16, "max_target_length": 4}


def test_of_a_classifier(make_task: Callable[..., Task]) -> None:
    task = make_task("bert", CLASSES | {"max_length": 8}, f"text\tlabel\nthe film\tgood\n{LONG}\tgood\na plot\tgood\n")
    first, lengths = input_preview(task, seed=1)
    assert first.startswith("a sample, what is learned in [[ ]]: <s> ") and first.endswith("</s> [[good]]")
    assert lengths == (
        "text: 4 / 4 / 12 / 12 tokens (least / median / 95 % / most of 3 rows), 8 are kept: 33% lose their end"
    )


def test_of_an_encoder_and_a_decoder(make_task: Callable[..., Task]) -> None:
    task = make_task("bart", SUMMARIES | LIMITS | {"max_length": 6}, TEXTS)
    first, source, target = input_preview(task, seed=1)
    assert "</s> -> [[<s> " in first
    assert source.startswith("source: 4 / 4 / 12 / 12 tokens") and source.endswith("6 are kept: 25% lose their end")
    assert target.endswith("of 4 rows), 4 are kept: 25% lose their end")


def test_of_prompts(make_task: Callable[..., Task]) -> None:
    task = make_task("llama", ANSWERS | LIMITS | {"max_length": 12}, TEXTS)
    first, prompt, answer = input_preview(task, seed=1)
    assert first.endswith("]]") and "[[" in first and "</s>]]" in first.replace(" ]]", "]]")
    assert prompt.startswith("prompt: 3 / 3 / 11 / 11 tokens")
    assert prompt.endswith("8 are kept: 25% lose their source's beginning")
    assert answer.endswith("4 are kept: 25% lose their end")


def test_a_sample_is_one_line_and_not_long(make_task: Callable[..., Task]) -> None:
    task = make_task("bert", CLASSES, "text\tlabel\n" + "film " * 5000 + "\tgood\n")
    lines = input_preview(task, seed=1)
    assert all(line.isprintable() and len(line) < 600 for line in lines)


def test_a_dry_run_and_a_run_show_it(
    tmp_path: Path, models_dir: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = run_tree("bert", tmp_path, models_dir, "run", sensitivity={"enabled": False}, train={"max_steps": 5})
    config = ["train", "--config", str(write_config(tmp_path / "config.yaml", tree))]
    assert cli.main([*config, "--dry-run"]) == 0
    shown = [line for line in capfd.readouterr().out.splitlines() if "a sample" in line or "are kept" in line]
    assert len(shown) == 2
    assert cli.main(config) == 0
    assert [line for line in capfd.readouterr().err.splitlines() if line in shown] == shown
