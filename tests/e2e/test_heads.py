"""Checkpoints that bring a head: it is the task's from the first step on, it trains, and everything reads it back."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.classifiers import HEADS, class_logits, tiny_classifier
from tests.runs import go, result_of, run_tree, write_config
from tests.tiny import tiny_model
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import ModelConfig
from tsqlora_scale.model.base_model import load_base
from tsqlora_scale.model.heads import centre_head
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks.objectives.label_heads import LabelObjective
from tsqlora_scale.tasks.target_scale import TargetScale

SHORT: dict[str, Any] = {"train": {"max_steps": 3}, "allocation": {"policy": "fixed"}, "sampling": {"selector": "full"}}
KINDS = [kind for kind in HEADS if kind not in ("xlnet", "gpt2")]


def tree_of(base: Path, folder: Path, models: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Classes ``no`` and ``yes``."""
    tree = run_tree("bert", folder, models, "run", **(SHORT | sections))
    tree["model"] |= {"name_or_path": str(base)}
    return tree


def built(model: Path, folder: Path, models: Path, **sections: dict[str, Any]) -> Run:
    return build_run(preflight.check(parse_config(tree_of(model, folder, models, **sections))))


def trained_parts(run: Run) -> set[str]:
    """Parts of the head that get gradients."""
    names = [name for name, param in run.engine.module.named_parameters() if param.requires_grad]
    return {name.split(".")[2] for name in names if ".modules_to_save." in name}


def rewrite(data: Path, *, no: str, yes: str) -> None:
    """Other answers in the data's files."""
    for path in data.glob("*.jsonl"):
        path.write_text(path.read_text().replace('"label": "no"', no).replace('"label": "yes"', yes))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_in_the_order_of_the_labels_and_train(
    kind: str, tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_classifier(kind, tmp_path / "model", ["Yes", "NO "])
    own = class_logits(AutoModelForSequenceClassification.from_pretrained(model))
    run = built(model, tmp_path, models_dir)
    torch.testing.assert_close(class_logits(run.engine.module), own[:, [1, 0]], rtol=0, atol=0)
    assert run.engine.module.config.id2label == {0: "no", 1: "yes"}
    assert trained_parts(run) == set(HEADS[kind])
    assert "Yes, NO ; its rows are put in the order of task.labels" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_classes_is_a_new_output_layer(
    kind: str, tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_classifier(kind, tmp_path / "model", ["entailment", "neutral", "contradiction"])
    run = built(model, tmp_path, models_dir)
    logits = class_logits(run.engine.module)
    assert logits.shape == (3, 2)
    assert logits.abs().max() < 1, "drawn small"
    assert trained_parts(run) == set(HEADS[kind])
    assert "3 outputs (entailment, neutral, contradiction), the task 2" in caplog.text
    again = built(model, tmp_path / "again", models_dir)
    torch.testing.assert_close(class_logits(again.engine.module), logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["xlnet", "gpt2"])
@pytest.mark.parametrize("labels", [["b", "a"], 3])
def test_heads_of_more_architectures(kind: str, labels: Any, tmp_path: Path) -> None:
    path = str(tiny_classifier(kind, tmp_path / "model", labels))
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    loaded, trained = load_base(
        path,
        ModelConfig(name_or_path=path),
        auto_class=AutoModelForSequenceClassification,
        model_config=AutoConfig.from_pretrained(path, num_labels=2, **names),
        unquantised=[],
        generator=torch.Generator().manual_seed(0),
        peft_task_type="SEQ_CLS",
    )
    assert trained == HEADS[kind]
    logits = class_logits(loaded)
    assert logits.shape == (3, 2)
    if labels != 3:
        own = class_logits(AutoModelForSequenceClassification.from_pretrained(path))
        torch.testing.assert_close(logits, own[:, [1, 0]], rtol=0, atol=0)


def test_names_that_do_not_match_are_taken_by_position(
    tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_classifier("bert", tmp_path / "model", 2)
    own = class_logits(AutoModelForSequenceClassification.from_pretrained(model))
    torch.testing.assert_close(class_logits(built(model, tmp_path, models_dir).engine.module), own, rtol=0, atol=0)
    assert "LABEL_0, LABEL_1; they are taken by position, as no, yes of task.labels" in caplog.text


@pytest.mark.parametrize("labels", [["no", "yes"], 2])
def test_nothing_is_said_where_nothing_changes(
    labels: Any, tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_classifier("deberta", tmp_path / "model", ["no", "yes"])
    own = class_logits(AutoModelForSequenceClassification.from_pretrained(model))
    tree = tree_of(model, tmp_path, models_dir)
    tree["task"]["labels"] = labels
    if labels == 2:
        data = Path(tree["task"]["dataset"]["path"])
        for path in data.glob("*.jsonl"):
            path.write_text(
                path.read_text().replace('"label": "no"', '"label": 0').replace('"label": "yes"', '"label": 1')
            )
    run = build_run(preflight.check(parse_config(tree)))
    torch.testing.assert_close(class_logits(run.engine.module), own, rtol=0, atol=0)
    assert run.engine.module.config.id2label == {0: "no", 1: "yes"}
    assert caplog.text == ""


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression(outputs: int, tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_classifier("bart", tmp_path / "model", outputs)
    tree = tree_of(model, tmp_path, models_dir)
    tree["task"] |= {"type": "regression", "label": "score", "labels": None, "metrics": ["pearson"]}
    for path in Path(tree["task"]["dataset"]["path"]).glob("*.jsonl"):
        path.write_text(
            path.read_text().replace('"label": "no"', '"score": 0.5').replace('"label": "yes"', '"score": 1.5')
        )
    run = build_run(preflight.check(parse_config(tree)))
    logits = class_logits(run.engine.module)
    assert logits.shape == (3, 1)
    assert trained_parts(run) == {"classification_head"}
    if outputs == 1:
        own = class_logits(AutoModelForSequenceClassification.from_pretrained(model))
        torch.testing.assert_close(logits, own, rtol=0, atol=0)
    assert ("is drawn anew" in caplog.text) == (outputs == 3)


def far_from_zero(tree: dict[str, Any]) -> tuple[float, float]:
    """Make a classification's data numbers about 270, a hundred apart, weighted; mean and deviation as drawn."""
    tree["task"] |= {"type": "regression", "label": "score", "labels": None, "metrics": ["pearson", "mse"]}
    tree["task"]["dataset"]["weight"] = "weight"
    for path in Path(tree["task"]["dataset"]["path"]).glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row |= {"score": 220.0 + 100 * (row.pop("label") == "yes"), "weight": 1.0 + (len(row["text"]) % 3)}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if path.name == "train.jsonl":
            scores, weights = (np.array([row[name] for row in rows]) for name in ("score", "weight"))
            mean = float(np.average(scores, weights=weights))
            deviation = float(np.average((scores - mean) ** 2, weights=weights)) ** 0.5
    return mean, deviation


@pytest.mark.parametrize("kind", ["bert", "deberta", "bart"])
def test_a_new_head_for_numbers_starts_where_they_lie(kind: str, tmp_path: Path, models_dir: Path) -> None:
    """As a head for targets of mean 0 and deviation 1 would, in their unit."""
    tree = tree_of(tiny_model(kind, models_dir), tmp_path, models_dir)
    mean, deviation = far_from_zero(tree)
    run = build_run(preflight.check(parse_config(tree)))
    plain = copy.deepcopy(tree) | {"run": tree["run"] | {"name": "plain"}}
    folder = tmp_path / "standard"
    shutil.copytree(tree["task"]["dataset"]["path"], folder)
    for path in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | {"score": (row["score"] - mean) / deviation}) + "\n" for row in rows))
    plain["task"]["dataset"]["path"] = str(folder)
    standard = class_logits(build_run(preflight.check(parse_config(plain))).engine.module)
    assert 0 < standard.abs().max() < 1, "drawn small"
    torch.testing.assert_close(class_logits(run.engine.module), mean + deviation * standard, rtol=1e-5, atol=1e-3)


def test_a_head_that_cannot_start_at_the_mean_says_so(
    tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = tree_of(tiny_model("llama", models_dir), tmp_path, models_dir)
    mean, deviation = far_from_zero(tree)
    build_run(preflight.check(parse_config(tree)))
    said = f"task.label='score': its mean is {mean:.3g}, its standard deviation {deviation:.3g}, and the new head score"
    assert said in caplog.text


@pytest.mark.parametrize(
    ("kind", "mean", "deviation", "said"),
    [
        (
            torch.bfloat16,
            2005.0,
            8.0,
            "its mean is 2e+03, its standard deviation 8: too near to be told apart",
        ),
        (torch.bfloat16, 2.7, 1.5, None),
        (torch.float32, 1e5, 8.0, None),
    ],
)
def test_a_type_that_tells_no_targets_apart(
    kind: torch.dtype, mean: float, deviation: float, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    head = torch.nn.Linear(4, 1, dtype=kind)
    before = head.weight.detach().clone()
    centre_head("classifier", head, TargetScale("year", mean, deviation), says=True)
    torch.testing.assert_close(head.weight.detach(), before * deviation, rtol=0, atol=0)
    assert head.bias.item() == pytest.approx(mean, rel=2**-8)
    assert said is None or f"task.label='year': {said}" in caplog.text
    assert said is not None or not caplog.text


@pytest.mark.parametrize(("mean", "deviation"), [(1e5, 1.0), (0.0, 1e7)])
def test_a_type_that_holds_no_such_numbers(mean: float, deviation: float) -> None:
    head = torch.nn.Linear(4, 1, dtype=torch.float16)
    with pytest.raises(UserError, match=r"task.label='price': its mean is .* model.dtype=fp16 ends at 6.55e\+04"):
        centre_head("classifier", head, TargetScale("price", mean, deviation), says=True)


class OwnNumbers(LabelObjective):
    """A regression whose head means the logarithm of the number."""

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.squeeze(-1).float()
        return logits.exp() - targets * logits, torch.ones_like(targets)


def test_an_objective_of_ones_own_starts_at_0(tmp_path: Path, models_dir: Path) -> None:
    """What its head means is its own affair."""
    tree = tree_of(tiny_model("bert", models_dir), tmp_path, models_dir)
    far_from_zero(tree)
    tree["task"]["objective"] = f"{__name__}:OwnNumbers"
    run = build_run(preflight.check(parse_config(tree)))
    assert class_logits(run.engine.module).abs().max() < 1


def test_what_starts_at_the_mean_is_saved_and_predicts(tmp_path: Path, models_dir: Path) -> None:
    """A run, its resume and its adapter's numbers are those of any head; targets far from 0 are learned at once."""
    tree = tree_of(tiny_model("bert", models_dir), tmp_path, models_dir, train={"max_steps": 6, "checkpoint_every": 3})
    mean, deviation = far_from_zero(tree)
    run = go(tree)
    found = result_of(run.record.folder)
    assert found["metrics_before"]["mse"] < 2 * deviation**2 < mean**2 / 10
    config = write_config(tmp_path / "config.yaml", tree)
    (tmp_path / "again").mkdir()
    shutil.copytree(run.record.folder / "checkpoints" / "step-00000003", tmp_path / "again" / "step-00000003")
    resumed = go(tree | {"run": tree["run"] | {"name": "resumed"}}, str(tmp_path / "again" / "step-00000003"))
    assert result_of(resumed.record.folder)["metrics"] == found["metrics"]
    adapter = str(run.record.folder / "adapter")
    said = tmp_path / "said.json"
    assert cli.main(["evaluate", "--config", str(config), "--adapter", adapter, "--json", str(said)]) == 0
    assert json.loads(said.read_text())["metrics"] == pytest.approx(found["metrics"])


def test_a_head_that_stays_as_it_is(tmp_path: Path, models_dir: Path) -> None:
    """Plain PEFT opens the trained function."""
    model = tiny_classifier("bert", tmp_path / "model", ["no", "yes"])
    run = go(tree_of(model, tmp_path, models_dir, adapter={"r": 4, "alpha": 8, "train_head": False}))
    assert trained_parts(run) == set()
    adapter = run.record.folder / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    base = AutoModelForSequenceClassification.from_pretrained(model)
    own = class_logits(base)
    found = class_logits(PeftModel.from_pretrained(base, str(adapter)))
    torch.testing.assert_close(found, class_logits(run.engine.module), rtol=0, atol=1e-6)
    assert (found - own).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("labels", "words"),
    [(["yes", "no"], r"give task\.labels in it: \['yes', 'no'\]"), (3, r"classifier\.bias .* is new")],
)
def test_a_head_that_cannot_stay_as_it_is(labels: Any, words: str, tmp_path: Path, models_dir: Path) -> None:
    model = tiny_classifier("bert", tmp_path / "model", labels)
    with pytest.raises(UserError, match=rf"adapter\.train_head=false.*{words}"):
        built(model, tmp_path, models_dir, adapter={"r": 4, "train_head": False})


@pytest.mark.parametrize(("kind", "labels"), [("deberta", ["yes", "no"]), ("bart", 3), ("t5", 2)])
def test_evaluate_export_and_resume(
    kind: str, labels: Any, tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_classifier(kind, tmp_path / "model", labels)
    tree = tree_of(
        model, tmp_path, models_dir, train={"max_steps": 4, "checkpoint_every": 2},
        sampling={"selector": "quality"}, scoring={"warmup_steps": 1, "refresh": "none", "include_head": True},
        model={"quantization": "nf4"} if kind == "deberta" else {},
    )  # fmt: skip
    run = go(tree)
    run_dir, config = run.record.folder, str(write_config(tmp_path / "config.yaml", tree))
    result = result_of(run_dir)
    capsys.readouterr()
    assert cli.main(["evaluate", "--config", config, "--adapter", str(run_dir / "adapter")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"accuracy: {result['metrics']['accuracy']:.6f}\n"
    assert "head" not in captured.err
    out = ["--out", str(tmp_path / "merged")]
    export = ["export", "--adapter", str(run_dir / "adapter"), "--format", "merged", "--config", config, *out]
    assert cli.main(export) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "no", 1: "yes"}
    torch.testing.assert_close(class_logits(merged), class_logits(run.engine.module), rtol=0, atol=1e-5)
    resumed = go(tree | {"run": tree["run"] | {"name": "resumed"}}, resume=str(run_dir / "checkpoints/step-00000002"))
    torch.testing.assert_close(class_logits(resumed.engine.module), class_logits(run.engine.module), rtol=0, atol=0)
