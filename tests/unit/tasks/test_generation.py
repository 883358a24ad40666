"""Generation: deterministic, from the source alone, the same in any batch."""

from __future__ import annotations

import copy
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
from tsqlora_scale.tasks.objectives.decoding import kept_settings, unfit

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


#: Generation settings that checkpoints come with, and that an evaluation does not keep.
NOT_KEPT: list[dict[str, Any]] = [
    {},
    {"max_length": 12},
    {"max_new_tokens": 2},
    {"max_new_tokens": 2, "max_length": 12},
    {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.4},
    {"min_length": 56},
    {"min_length": 8, "min_new_tokens": 8},
    {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True, "output_logits": True},
    {"num_beams": 2, "num_return_sequences": 2},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"stop_strings": ["film"]},
    {"max_time": 1e-9},
    {"exponential_decay_length_penalty": [1, 3.0]},
    {"guidance_scale": 3.0},
    {"prompt_lookup_num_tokens": 2},
    {"sequence_bias": [[[9], -100.0]]},
    {"force_words_ids": [[7]], "constraints": None},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "high"},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"watermarking_config": {"bias": 5.0}},
    {"token_healing": True},
    {"decoder_start_token_id": 7, "pad_token_id": -1},
]
OF_BEAMS = {"length_penalty": 5.0, "early_stopping": True}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_models_own_settings_do_not_interfere(
    kind: str, num_beams: int, make_task: Make, models: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    task, model = build(kind, TARGETS, make_task, models, num_beams=num_beams)
    batch = task.batch(range(3), split="dev")
    before = model.generation_config
    before.suppress_tokens = [0, 1, 3, 4] if num_beams > 1 else [0, 1, 2, 3, 4]  # a random model likes to say nothing
    before.forced_eos_token_id = None
    expected = task.predict(model, batch, synced=False)
    assert any(expected)
    transformers.utils.logging.enable_propagation()
    try:
        for own in NOT_KEPT + ([OF_BEAMS] if num_beams == 1 else []):
            model.generation_config = copy.deepcopy(before)
            for name, value in own.items():
                setattr(model.generation_config, name, value)
            held = model.generation_config.to_dict()
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                state = torch.get_rng_state()
                assert task.predict(model, batch, synced=False) == expected, own
                assert torch.equal(torch.get_rng_state(), state)
            assert [r.getMessage() for r in caplog.records] == [], own
            assert model.generation_config.to_dict() == held, "an export writes them as they were"
    finally:
        transformers.utils.logging.disable_propagation()


@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_what_decides_which_text_is_right_is_kept(kind: str, make_task: Make, models: Callable[[str], Path]) -> None:
    task, model = build(kind, TARGETS, make_task, models)
    batch = task.batch(range(3), split="dev")
    first = task.tokenizer.convert_ids_to_tokens([8])[0]
    free = task.predict(model, batch, synced=False)
    model.generation_config.forced_bos_token_id = 8
    if kind != "llama":  # whose texts begin with the prompt
        forced = task.predict(model, batch, synced=False)
        assert all(text.split()[0] == first for text in forced)
    model.generation_config.forced_bos_token_id = None
    banned = {token for text in free for token in task.tokenizer(text, add_special_tokens=False)["input_ids"]}
    for settings in ({"suppress_tokens": sorted(banned)}, {"bad_words_ids": [[token] for token in sorted(banned)]}):
        model.generation_config.update(**settings)
        texts = task.predict(model, batch, synced=False)
        found = {token for text in texts for token in task.tokenizer(text, add_special_tokens=False)["input_ids"]}
        assert found and not found & banned
        model.generation_config.update(**dict.fromkeys(settings))
    assert task.predict(model, batch, synced=False) == free
    model.generation_config.repetition_penalty = 1e9
    assert (task.predict(model, batch, synced=False) == free) == (kind == "llama")


def test_kept_settings() -> None:
    found = {"length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3, "min_length": 9, "top_k": None}
    kept = kept_settings(found, num_beams=2, is_encoder_decoder=False)
    assert kept == {"length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3}
    assert kept_settings(found, num_beams=1, is_encoder_decoder=False) == {"no_repeat_ngram_size": 3}


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"forced_bos_token_id": 50}, "token of the model"),
        ({"forced_eos_token_id": "</s>"}, "token of the model"),
        ({"suppress_tokens": [-1]}, "list of the model's tokens"),
        ({"begin_suppress_tokens": 3}, "list of the model's tokens"),
        ({"bad_words_ids": [3]}, "list of lists"),
        ({"bad_words_ids": [[]]}, "list of lists"),
        ({"no_repeat_ngram_size": -2}, "whole number"),
        ({"encoder_no_repeat_ngram_size": 2.5}, "whole number"),
        ({"length_penalty": "high"}, "number"),
        ({"length_penalty": float("nan")}, "number"),
        ({"early_stopping": "yes"}, "'never'"),
        ({"repetition_penalty": 0}, "above 0"),
        ({"forced_eos_token_id": 2, "suppress_tokens": [1, 2]}, "suppress_tokens"),
    ],
)
def test_settings_that_no_generation_can_use(setting: dict[str, Any], rule: str) -> None:
    found = unfit(setting, 50)
    assert found is not None and rule in found and next(iter(setting)) in found


def test_settings_that_can_be_used() -> None:
    fit = {"forced_bos_token_id": 0, "bad_words_ids": [[49], [1, 2]], "early_stopping": "never", "length_penalty": 1}
    assert unfit(fit | {"temperature": "hot", "suppress_tokens": None, "repetition_penalty": 1.5}, 50) is None


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
