"""Generation: deterministic, from the source alone, the same in any batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from tests.reference.tasks import alone, greedy
from tests.unit.tasks.cases import ANSWERS, SUMMARIES
from tsqlora_scale.tasks import IGNORED, Task
from tsqlora_scale.tasks.objectives.causal import CausalObjective

SOURCES = ["the film is very good and the actor is great", "the plot", "a lovely scene with music " * 6]
TARGETS = ["good film", "bad plot with a weak ending", "lovely"]
OTHERS = ["awful dull boring music and bad script " * 5, "it", "the director is not good"]
KINDS = {"bart": SUMMARIES, "t5": SUMMARIES, "llama": ANSWERS}
LIMITS = {"max_length": 24, "max_target_length": 9, "num_beams": 3}
Make = Callable[..., Task]


def build(
    kind: str, targets: list[str], make_task: Make, models: Callable[[str], Path], **more: Any
) -> tuple[Task, Any]:
    tsv = "\n".join(["source\ttarget", *(f"{s}\t{t}" for s, t in zip(SOURCES, targets, strict=True))])
    task = make_task(kind, KINDS[kind] | LIMITS | more, tsv)
    return task, task.auto_class.from_pretrained(models(kind)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_not_seen(kind: str, make_task: Make, models: Callable[[str], Path]) -> None:
    """Other targets, of other lengths (one too long to be kept), next to the same sources."""
    texts = []
    for targets in (TARGETS, OTHERS):
        task, model = build(kind, targets, make_task, models)
        texts.append(task.predict(model, task.batch(range(3), split="dev"), synced=False))
        assert task.references(range(3), split="dev") == [t.strip() if t != OTHERS[0] else t for t in targets]
    assert texts[0] == texts[1]
    assert any(texts[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_changes_nothing(kind: str, make_task: Make, models: Callable[[str], Path]) -> None:
    task, model = build(kind, TARGETS, make_task, models)
    together = task.predict(model, task.batch([1, 2, 0], split="dev"), synced=False)
    one_by_one = [task.predict(model, task.batch([i], split="dev"), synced=False)[0] for i in (1, 2, 0)]
    assert together == one_by_one


def test_causal_prompts_move_to_the_right(make_task: Make, models: Callable[[str], Path]) -> None:
    task, _ = build("llama", TARGETS, make_task, models)
    batch = task.batch(range(3), split="dev")
    assert isinstance(task._objective, CausalObjective)
    prompts = task._objective.prompts_only(batch)
    for i in range(3):
        inputs, _ = alone(batch, i)
        length = int((batch.targets[i] != IGNORED).int().argmax())
        kept = prompts["input_ids"][i][prompts["attention_mask"][i] == 1]
        assert kept.tolist() == inputs["input_ids"][0, :length].tolist()
        assert prompts["attention_mask"][i].diff().ge(0).all(), "gaps belong on the left"
    assert prompts["attention_mask"][:, -1].all()


def test_one_beam_is_greedy_search(make_task: Make, models: Callable[[str], Path]) -> None:
    task, model = build("llama", TARGETS, make_task, models, num_beams=1)
    batch = task.batch(range(3), split="dev")
    expected = []
    for i in range(3):
        length = int((batch.targets[i] != IGNORED).int().argmax())
        words = greedy(model, batch.inputs["input_ids"][i, :length].tolist(), {2}, max_new_tokens=9)
        expected.append(task.tokenizer.decode(words, skip_special_tokens=True).strip())
    assert task.predict(model, batch, synced=False) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "own", [{}, {"max_length": 12}, {"max_new_tokens": 2}, {"do_sample": True, "temperature": 0.5}]
)
def test_the_models_own_settings_do_not_interfere(
    kind: str, own: dict[str, Any], make_task: Make, models: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    task, model = build(kind, TARGETS, make_task, models, num_beams=1)
    batch = task.batch(range(3), split="dev")
    expected = task.predict(model, batch, synced=False)
    model.generation_config.update(**own)
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            state = torch.get_rng_state()
            assert task.predict(model, batch, synced=False) == expected
            assert torch.equal(torch.get_rng_state(), state)
    finally:
        transformers.utils.logging.disable_propagation()
    assert [r.getMessage() for r in caplog.records] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model_generates_too(kind: str, make_task: Make, models: Callable[[str], Path]) -> None:
    task, model = build(kind, TARGETS, make_task, models)
    batch = task.batch(range(3), split="dev")
    expected = task.predict(model, batch, synced=False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type=task.peft_task_type))
    assert task.predict(adapted.eval(), batch, synced=False) == expected  # B is zero


def test_answers_are_no_longer_than_asked(make_task: Make, models: Callable[[str], Path]) -> None:
    for kind in KINDS:
        task, model = build(kind, TARGETS, make_task, models, max_target_length=3)
        texts = task.predict(model, task.batch(range(3), split="dev"), synced=False)
        assert all(len(text.split()) <= 3 for text in texts)
