"""Whole runs by prompts: the zero-shot number, resumed runs, words that the base finds, answers and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM

from tests.prompted import PROMPTS, base_of, masked_model, prompted_tree
from tests.reference.prompts import word_scores
from tests.runs import go, losses_of, result_of
from tsqlora_scale import UserError, evaluate, export, predict
from tsqlora_scale.config.load import load_config, parse_config
from tsqlora_scale.report.result_table import print_result
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.training import take_steps

END = {"masked": " it was <mask> and", "causal": " it was", "seq2seq": " it was"}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def resumed_half_way(tree: dict[str, Any]) -> Path:
    """A run that stops after its first checkpoint and goes on in another process's place."""
    run = build_run(preflight.check(parse_config(tree)))
    with run.record:
        run.metrics_before = run.evaluate()
        take_steps(run, until=2)
    return go(tree, resume="auto").record.folder


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_run_begins_with_the_zero_shot_number_and_resumes(
    kind: str, tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = prompted_tree(kind, tmp_path, models_dir)
    folder = go(tree).record.folder
    dev = rows_of(tmp_path / "data-classification" / "dev.jsonl")
    scores = word_scores(kind, base_of(kind, models_dir), [row["text"] + END[kind] for row in dev], ["bad", "good"])
    right = scores.argmax(1) == torch.tensor([row["label"] == "yes" for row in dev])
    result = result_of(folder)
    print_result(result)
    assert "accuracy zero-shot -> after" in capsys.readouterr().out
    assert result["metrics_before"] == {"accuracy": pytest.approx(float(right.float().mean()))}
    assert result["prompt"]["label_words"] == {"no": "bad", "yes": "good"}
    losses = losses_of(folder)
    assert min(losses[1:]) < losses[0]
    tree["run"]["name"] = "resumed"
    assert losses_of(resumed_half_way(tree)) == losses
    answers = tmp_path / "answers.jsonl"
    predict(tmp_path / "data-classification" / "dev.jsonl", answers, run=folder)
    predicted = rows_of(answers)
    right = torch.tensor([row["prediction"] == row["label"] for row in predicted])
    assert float(right.float().mean()) == pytest.approx(result["metrics"]["accuracy"])


def test_what_stands_before_every_text_is_not_the_base_alone(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vectors that are drawn change the answers before anything is learned."""
    tree = prompted_tree("masked", tmp_path, models_dir, max_length=24)
    tree["adapter"] = {"method": "prompt"}
    result = result_of(go(tree).record.folder)
    assert not result["prompt"]["starts_from_base"]
    print_result(result)
    assert "accuracy before -> after" in capsys.readouterr().out


def test_words_of_the_base_are_found_once_and_kept(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the whole method; the words are in the resolved config, with which all that follows reads them."""
    tree = prompted_tree("masked", tmp_path, models_dir, label_words="auto", demonstrations=1, max_length=48)
    tree["adapter"]["method"] = "tsqlora"
    tree["train"] |= {"max_steps": 6}
    tree["schedule"] = {"start": 4, "end": 5, "every": 1}
    folder = go(tree).record.folder
    found = load_config(folder / "config.yaml").task
    assert isinstance(found.label_words, list)
    assert len(set(found.label_words)) == 2
    assert result_of(folder)["prompt"] == {
        "template": tree["task"]["prompt"],
        "label_words": dict(zip(["no", "yes"], found.label_words, strict=True)),
        "demonstrations": 2,
        "starts_from_base": True,
    }
    print_result(result_of(folder))
    assert "untrained" in capsys.readouterr().out
    tree["run"]["name"] = "resumed"
    resumed = resumed_half_way(tree)
    assert losses_of(resumed) == losses_of(folder)
    assert load_config(resumed / "config.yaml").task == found
    assert evaluate(parse_config(tree), folder / "adapter") == pytest.approx(result_of(folder)["metrics"])
    alone = tmp_path / "alone"
    (folder / "adapter").rename(alone)
    with pytest.raises(UserError, match=r"task.label_words=auto.*not known; give the config.yaml"):
        evaluate(parse_config(tree), alone)


def test_the_exported_model_answers_as_the_adapter_does(tmp_path: Path, models_dir: Path) -> None:
    tree = prompted_tree("masked", tmp_path, models_dir)
    folder = go(tree).record.folder
    out = tmp_path / "merged"
    export(folder / "adapter", "merged", out, config=parse_config(tree))  # which leaves open what the base is
    merged = AutoModelForMaskedLM.from_pretrained(out).eval()
    base = AutoModelForMaskedLM.from_pretrained(masked_model(models_dir))
    adapted: Any = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    ids = torch.tensor([[1, 5, 6, 4, 2]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    for card in (folder / "adapter", out):
        text = (card / "README.md").read_text(encoding="utf-8")
        assert "`{text} it was {mask} and`" in text
        assert "yes: `good`" in text
        assert "AutoModelForMaskedLM.from_pretrained(" in text
