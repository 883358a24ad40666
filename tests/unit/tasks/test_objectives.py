"""Batches, per-sample losses and predictions, on tiny models of every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from tests.reference.tasks import alone, mean_losses
from tests.unit.tasks.cases import ANSWERS, CLASSES, NUMBERS, SUMMARIES, task_config
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks import IGNORED, Batch, Task, build_task, load_data

LABELLED = (
    "text\tpair\tlabel\n"
    "the film is very good\tit is great\tgood\n"
    "bad\tawful and dull plot\tbad\n"
    "a lovely scene and a strong ending\tweak\tgood\n"
    "the director is not good\tboring\tbad\n"
)
SCORED = LABELLED.replace("good\n", "4.5\n").replace("bad\n", "-0.25\n")
TEXTS = (
    "source\ttarget\n"
    "the film is very good and the actor is great\tgood film\n"
    "the plot\tbad plot with a weak ending and dull music\n"
    "a lovely scene\tlovely\n"
)
KINDS = {
    "bert": (CLASSES, LABELLED),
    "mpnet": (NUMBERS, SCORED),
    "deberta": (CLASSES | {"text": ["text", "pair"]}, LABELLED),
    "bart": (SUMMARIES, TEXTS),
    "t5": (SUMMARIES | {"prefix": "story of "}, TEXTS),
    "llama": (ANSWERS, TEXTS),
}
Make = Callable[..., Task]
#: What the description of a model says of its head.
HEADS: dict[str, dict[str, Any]] = {
    "bert": {"num_labels": len(CLASSES["labels"])},
    "mpnet": {"num_labels": 1},
    "deberta": {"num_labels": len(CLASSES["labels"])},
}


def build(kind: str, make_task: Make, models: Callable[[str], Path]) -> tuple[Task, Any]:
    """The task and the model of a kind; a new head is drawn by a fixed seed."""
    task = make_task(kind, *KINDS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = task.auto_class.from_pretrained(models(kind), **HEADS.get(kind, {}))
    return task, model.eval()


def sample_losses(task: Task, model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        sums, counts = task.loss_sums(model(**batch.inputs), batch)
    assert sums.shape == counts.shape == (batch.size,)
    assert sums.dtype == counts.dtype == torch.float32
    assert torch.equal(counts, task.loss_terms(batch))
    return sums / counts


@pytest.mark.parametrize("kind", KINDS)
class TestLosses:
    def test_are_those_of_each_sample_alone(self, kind: str, make_task: Make, models: Callable[[str], Path]) -> None:
        task, model = build(kind, make_task, models)
        batch = task.batch(range(len(task)))
        assert (batch.inputs["attention_mask"] == 0).any(), "nothing is padded, nothing is tested"
        found = sample_losses(task, model, batch)
        torch.testing.assert_close(found, mean_losses(model, batch), atol=1e-5, rtol=1e-5)
        assert found.unique().numel() == batch.size

    def test_do_not_depend_on_the_batch(self, kind: str, make_task: Make, models: Callable[[str], Path]) -> None:
        task, model = build(kind, make_task, models)
        rows = np.array([2, 0, 1, 2])
        together = sample_losses(task, model, task.batch(rows))
        one_by_one = torch.cat([sample_losses(task, model, task.batch([i])) for i in rows])
        torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-5)

    def test_sum_to_the_models_own_loss(self, kind: str, make_task: Make, models: Callable[[str], Path]) -> None:
        """Same rows repeated: nothing is padded, and the model's own mean is over all terms of the batch."""
        task, model = build(kind, make_task, models)
        batch = task.batch([0, 0, 0])
        with torch.no_grad():
            sums, counts = task.loss_sums(model(**batch.inputs), batch)
            inputs = {n: t for n, t in batch.inputs.items() if n != "decoder_input_ids"}
            own = model(**inputs, labels=batch.targets).loss
        torch.testing.assert_close(sums.sum() / counts.sum(), own, atol=1e-5, rtol=1e-5)

    def test_have_gradients(self, kind: str, make_task: Make, models: Callable[[str], Path]) -> None:
        task, model = build(kind, make_task, models)
        batch = task.batch([0, 1])
        sums, _ = task.loss_sums(model(**batch.inputs), batch)
        inputs, labels = alone(batch, 1)
        own = model(**inputs, labels=labels).loss * task.loss_terms(batch)[1]
        weights = [p for p in model.parameters() if p.requires_grad]
        ours, theirs = (torch.autograd.grad(x, weights, allow_unused=True) for x in (sums[1], own))
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def test_of_half_precision_logits_are_float32(
        self, kind: str, make_task: Make, models: Callable[[str], Path]
    ) -> None:
        task, model = build(kind, make_task, models)
        batch = task.batch([0, 1])
        outputs = model(**batch.inputs)
        outputs.logits = outputs.logits.detach().bfloat16()
        rounded, _ = task.loss_sums(outputs, batch)
        outputs.logits = outputs.logits.float()
        exact, _ = task.loss_sums(outputs, batch)
        assert torch.equal(rounded, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_batches(kind: str, make_task: Make, models: Callable[[str], Path]) -> None:
    task, _ = build(kind, make_task, models)
    batch = task.batch(np.array([2, 0]))
    assert batch.size == 2
    assert batch.indices.tolist() == [2, 0]
    assert "labels" not in batch.inputs
    assert all(t.dtype == torch.int64 and len(t) == 2 for t in batch.inputs.values())
    moved = batch.to("meta")
    assert {t.device.type for t in (*moved.inputs.values(), moved.targets)} == {"meta"}
    assert moved.indices is batch.indices
    assert task.tokenizer is not None
    assert task.auto_class is task._objective.auto_class


def test_classes(make_task: Make, models: Callable[[str], Path]) -> None:
    task, model = build("bert", make_task, models)
    batch = task.batch([0, 1, 2], split="dev")
    assert batch.targets.tolist() == [1, 0, 1]
    assert batch.targets.dtype == torch.int64
    assert task.references([2, 1], split="dev") == [1, 0]
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    assert task.predict(model, batch, synced=False) == logits.argmax(-1).tolist()
    assert (task.peft_task_type, task.best_metric, task.higher_is_better) == ("SEQ_CLS", "f1", True)
    assert task.metrics([1, 0, 0], [1, 0, 1]) == {"f1": pytest.approx(2 / 3)}


def test_numbers(make_task: Make, models: Callable[[str], Path]) -> None:
    task, model = build("mpnet", make_task, models)
    batch = task.batch([0, 1])
    assert batch.targets.tolist() == [4.5, -0.25]
    assert batch.targets.dtype == torch.float32
    predicted = task.predict(model, batch, synced=False)
    assert all(type(value) is float for value in predicted)
    sums, _ = task.loss_sums(model(**batch.inputs), batch)
    assert sums.tolist() == pytest.approx([(p - t) ** 2 for p, t in zip(predicted, [4.5, -0.25], strict=True)])
    assert task.references([1]) == [-0.25]
    assert model.config.num_labels == 1


def test_pairs_are_told_apart(make_task: Make, models: Callable[[str], Path]) -> None:
    task, _ = build("deberta", make_task, models)
    ids = task.batch([1]).inputs["input_ids"][0].tolist()
    assert task.tokenizer.decode(ids) == "<s> bad </s> awful and dull plot </s>"
    assert task.preview(1) == "bad | awful and dull plot"


def test_sources_and_targets(make_task: Make, models: Callable[[str], Path]) -> None:
    task, _ = build("t5", make_task, models)
    batch = task.batch([2, 1])
    decode = task.tokenizer.decode
    assert decode(batch.inputs["input_ids"][0]).startswith("<s> story of a lovely scene </s>")
    assert decode(batch.targets[0][batch.targets[0] != IGNORED]) == "<s> lovely </s>"
    assert decode(batch.inputs["decoder_input_ids"][0]).split()[:3] == ["<pad>", "<s>", "lovely"]
    assert task.references([2, 1]) == ["lovely", "bad plot with a weak ending and dull music"]
    assert task.preview(2) == "a lovely scene -> lovely"
    assert task.peft_task_type == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("kind", ["bert", "bart", "llama"])
def test_lengths(kind: str, make_task: Make) -> None:
    limits = {"max_length": 12, "max_target_length": 5}
    task = make_task(kind, KINDS[kind][0] | limits, KINDS[kind][1].replace("the ", "the the the the the the the the "))
    rows = range(len(task.train))
    assert task.batch(rows).inputs["input_ids"].shape[1] == 12
    assert task.batch(rows, max_length=8).inputs["input_ids"].shape[1] == 8
    assert task.batch(rows, max_length=99).inputs["input_ids"].shape[1] == 12
    targets = task.batch(rows).targets
    if targets.dim() == 2:
        assert (targets != IGNORED).sum(1).tolist() == [min(5, int(n)) for n in (targets != IGNORED).sum(1)]
        assert (targets != IGNORED).any(1).all()


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("llama", SUMMARIES, r"task.type='seq2seq' needs an encoder-decoder.*'llama'"),
        ("bart", ANSWERS, r"task.type='causal' needs a decoder-only model.*'bart'.*use task.type: seq2seq"),
        (
            "llama",
            ANSWERS | {"max_length": 20, "max_target_length": 20},
            r"max_length=20 leaves 0 tokens for the prompt",
        ),
    ],
)
def test_models_that_cannot_do_the_task(model: str, kind: dict[str, Any], message: str, make_task: Make) -> None:
    with pytest.raises(UserError, match=message):
        make_task(model, kind, TEXTS if "source" in kind else LABELLED)


def test_no_dev_split(tmp_path: Path, models: Callable[[str], Path], make_task: Make) -> None:
    make_task("bert", CLASSES, LABELLED)
    cfg = task_config(tmp_path, CLASSES)
    tokenizer = AutoTokenizer.from_pretrained(models("bert"))
    task = build_task(cfg, load_data(cfg, seed=0), tokenizer, AutoConfig.from_pretrained(models("bert")))
    assert task.dev is None
    with pytest.raises(UserError, match=r"task.dataset.dev_file is not set"):
        task.batch([0], split="dev")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("class Mine:\n    pass", "lacks auto_class, peft_task_type, collate, losses, predict, preview; derive"),
        (
            "class Mine:\n    auto_class, peft_task_type = Label.auto_class, 'SEQ_CLS'\n"
            "    collate, losses, predict = Label.collate, Label.losses, Label.predict",
            "lacks preview; derive",
        ),
        ("class Mine(Label):\n    def __init__(self, *_):\n        pass", "lacks columns, answer; derive"),
        ("Mine = Label.losses", "is no class; name the class of an objective"),
    ],
)
def test_an_objective_of_ones_own_has_every_member(body: str, words: str, make_task: Make, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"from tsqlora_scale.tasks.objectives.label_heads import LabelObjective as Label\n{body}\n")
    with pytest.raises(UserError) as error:
        make_task("bert", CLASSES | {"objective": f"{path}:Mine"}, LABELLED)
    assert str(error.value).startswith("task.objective=")
    assert words in str(error.value)
