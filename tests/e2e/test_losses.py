"""Loss and perplexity of the held-out set: as Transformers computes them, without generating, and as what decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import GenerationMixin

from tests.runs import go, losses_of, read_lines, run_tree
from tests.worlds import run_on_ranks
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.run import preflight
from tsqlora_scale.run.adapted_model import build_base
from tsqlora_scale.tasks.evaluation import evaluate
from tsqlora_scale.tasks.losses import class_losses, on_known_terms
from tsqlora_scale.tasks.objectives.label_heads import LabelObjective

TEXTS = ["loss", "perplexity"]


def metrics_on(world: World, tree: dict[str, Any]) -> dict[str, float]:
    described = preflight.check(parse_config(tree))
    base, _ = build_base(described, device=world.device)
    return evaluate(base, described.task, world, batch_size=3)


class ByPairs(LabelObjective):
    """The cross-entropy, summed over terms of its own: twice as many as there are samples."""

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses, terms = class_losses(logits, targets)
        return 2 * losses, 2 * terms


def test_an_objective_s_own_terms_change_no_ratio(tmp_path: Path, models_dir: Path) -> None:
    """Neither the losses that a step learns, nor their size."""
    plain = run_tree("bert", tmp_path, models_dir, "plain", adapter={"method": "lora"}, train={"max_steps": 3})
    go(plain)
    own = run_tree("bert", tmp_path, models_dir, "own", adapter={"method": "lora"}, train={"max_steps": 3})
    own["task"]["objective"] = f"{__name__}:ByPairs"
    go(own)
    found, expected = (losses_of(tmp_path / "runs" / name) for name in ("own", "plain"))
    assert found == pytest.approx(expected, rel=1e-6)


def test_terms_that_are_none_have_no_loss() -> None:
    losses, counts = torch.tensor([6.0, 0.0, 4.0], requires_grad=True), torch.tensor([3.0, 0.0, 2.0])
    found, terms = on_known_terms(losses, counts, counts)
    assert found.tolist() == [6.0, 0.0, 4.0] and terms.tolist() == [3.0, 0.0, 2.0]
    half, _ = on_known_terms(losses, counts / 2, torch.tensor([3.0, 1.0, 2.0]))
    half.sum().backward()
    assert half.tolist() == [12.0, 0.0, 8.0] and torch.isfinite(losses.grad).all()


def test_the_loss_is_what_decides(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree(
        "bert", tmp_path, models_dir, "run", adapter={"method": "lora"}, train={"eval_every": 4, "lr": 5e-2}
    )
    tree["task"]["metrics"] = ["loss", "accuracy"]
    run = go(tree)
    lines = [line for line in read_lines(run.record.folder / "metrics.jsonl") if "eval" in line and line["step"] > 0]
    values = {line["step"]: line["eval"]["loss"] for line in lines}
    assert len(set(values.values())) == 4
    assert run.best is not None
    assert run.best["step"] == min(values, key=values.__getitem__)
    assert run.best["metric"] == "loss" and run.best["value"] == min(values.values())


@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_texts_are_not_generated_for_a_loss(
    kind: str, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = run_tree(kind, tmp_path, models_dir, "run")
    tree["task"]["metrics"] = TEXTS

    def generate(*_: Any, **__: Any) -> None:
        raise AssertionError("nobody asked for texts")

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    described = preflight.check(parse_config(tree))
    base, _ = build_base(described, device=torch.device("cpu"))
    found = evaluate(base, described.task, World(), batch_size=3)
    batch = described.task.batch(range(8), split="dev")
    sums, terms = [], []
    for row in range(8):
        targets = batch.targets[row : row + 1]
        inputs = {name: tensor[row : row + 1] for name, tensor in batch.inputs.items()}
        with torch.no_grad():
            mean = float(base.eval()(**inputs, labels=targets).loss)
        terms.append(int((targets != -100).sum()))
        sums.append(mean * terms[-1])
    assert found["loss"] == pytest.approx(np.mean(np.array(sums) / terms), rel=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(np.sum(sums) / np.sum(terms)), rel=1e-4)


def test_ranks_find_the_same(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bart", tmp_path, models_dir, "run")
    tree["task"]["metrics"] = [*TEXTS, "rougeL"]
    alone = metrics_on(World(), tree)
    assert all(np.isfinite(list(alone.values())))
    for size in (2, 3):
        assert run_on_ranks(metrics_on, size, tree) == [alone] * size


def test_the_report_says_of_which_class_f1_is(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tsqlora_scale.report.result_table import print_result

    tree = run_tree("bert", tmp_path, models_dir, "run", adapter={"method": "lora"}, train={"max_steps": 2})
    tree["task"]["metrics"] = ["f1", "f1_macro"]
    run = go(tree)
    print_result(json.loads((run.record.folder / "result.json").read_text()))
    out = capsys.readouterr().out
    assert "f1 (of class yes) before" in out and "f1_macro before" in out
