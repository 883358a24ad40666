"""Prompts: what the model reads, where its answer stands, which words answer, and mistakes in one line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tests.prompted import PROMPTS, base_of, masked_model, prompted_tree
from tests.reference.prompts import word_scores
from tests.tiny import WORDS, tiny_model, tiny_tokenizer
from tests.unit.tasks.vocabularies import KINDS
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.prompt_template import Piece, pieces_of
from tsqlora_scale.run import preflight
from tsqlora_scale.tasks.batch import class_logits
from tsqlora_scale.tasks.logit_gaps import squared_gaps
from tsqlora_scale.tasks.objectives.prompted import CausalPrompt, MaskedPrompt, PromptedObjective
from tsqlora_scale.tasks.word_search import best_words, judged, likely_words

AUTO = {"masked": AutoModelForMaskedLM, "causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
ROW = {"text": ["the film"], "label": [1]}


def checked(tree: dict[str, Any]) -> preflight.Preflight:
    return preflight.check(parse_config(tree))


def objective_of(folder: Path, models: Path, **task: Any) -> PromptedObjective:
    """Of a masked model, without data."""
    cfg = parse_config(prompted_tree("masked", folder, models, **task)).task
    base = masked_model(models)
    model_config = AutoModelForMaskedLM.from_pretrained(base).config
    return MaskedPrompt(cfg, AutoTokenizer.from_pretrained(base), model_config)


@pytest.mark.parametrize("kind", PROMPTS)
def test_logits_are_those_of_the_words_at_the_slot(kind: str, tmp_path: Path, models_dir: Path) -> None:
    task = checked(prompted_tree(kind, tmp_path, models_dir)).task
    model = AUTO[kind].from_pretrained(base_of(kind, models_dir)).eval()
    batch = task.batch(range(6))
    assert batch.targets.shape == (6,)
    end = {"masked": " it was <mask> and", "causal": " it was", "seq2seq": " it was"}[kind]
    prompts = [text + end for (text,) in task.texts(range(6))]
    wanted = word_scores(kind, base_of(kind, models_dir), prompts, ["bad", "good"])
    with torch.no_grad():
        outputs = model(**batch.inputs)
        torch.testing.assert_close(class_logits(outputs.logits, batch), wanted, rtol=1e-5, atol=1e-5)
        sums, terms = task.loss_sums(outputs, batch)
        gaps = squared_gaps(task.needed(outputs, batch), torch.zeros(6, 2), batch.targets, batch.places)
    torch.testing.assert_close(gaps, wanted.square().mean(1), rtol=1e-5, atol=1e-5)
    losses = torch.nn.functional.cross_entropy(wanted, batch.targets, reduction="none")
    torch.testing.assert_close(sums / terms, losses, rtol=1e-5, atol=1e-5)
    answers, probabilities = task.predict_in_full(model, batch, synced=False)
    assert answers == wanted.argmax(1).tolist() == task.predict(model, batch, synced=False)
    torch.testing.assert_close(torch.tensor(probabilities), wanted.softmax(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_words_of_several_tokens_are_told_by_their_first(kind: str, tmp_path: Path, models_dir: Path) -> None:
    several = ["bad film", "good film good film good film good film good film"]
    task = checked(prompted_tree(kind, tmp_path, models_dir, label_words=several)).task
    model = AUTO[kind].from_pretrained(base_of(kind, models_dir)).eval()
    batch = task.batch(range(3))
    prompts = [text + " it was" for (text,) in task.texts(range(3))]
    with torch.no_grad():
        found = class_logits(model(**batch.inputs).logits, batch)
    wanted = word_scores(kind, base_of(kind, models_dir), prompts, ["bad", "good"])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="'good' and 'good film' are told by the same token"):
        checked(prompted_tree(kind, tmp_path, models_dir, label_words=["good", "good film"]))


def test_first_tokens_that_say_nothing_of_the_word_are_refused(tmp_path: Path, models_dir: Path) -> None:
    """A blank alone; and one that is the template's end and the word's beginning in one."""
    byte_level = KINDS["byte_level"]()

    def taken(prompt: str, *words: str) -> None:
        tree = prompted_tree("causal", tmp_path, models_dir, prompt=prompt, label_words=list(words))
        cfg = parse_config(tree).task
        CausalPrompt(cfg, byte_level, AutoModelForCausalLM.from_pretrained(base_of("causal", models_dir)).config)

    taken("{text} it was {answer}", "good film", "weak")
    with pytest.raises(UserError, match=r"'zzq' begins with a blank.*without the blank before \{answer\}"):
        taken("{text} it was {answer}", "zzq", "good")
    taken("{text} it was{answer}", "zzq", "good")
    with pytest.raises(UserError, match=r"no tokens of 'ood film' alone.*a blank before the slot"):
        taken("{text} it was g{answer}", "ood film", "weak")


def test_logits_of_the_places_alone_are_the_same(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = checked(prompted_tree("masked", tmp_path, models_dir)).task
    model = AutoModelForMaskedLM.from_pretrained(masked_model(models_dir)).eval()
    batch = task.batch(range(5))
    wanted = task.losses(model, batch)
    monkeypatch.setattr("tsqlora_scale.tasks.needed_logits.WORTH", 1)
    assert task.outputs(model, batch).logits.shape[:2] == (1, 5)
    torch.testing.assert_close(task.losses(model, batch), wanted, rtol=1e-5, atol=1e-6)


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30), min_size=2, max_size=2),
    limit=st.integers(10, 24),
)
def test_long_texts_lose_their_ends_and_the_template_stays(
    prompt_of_two: PromptedObjective, texts: list[list[str]], limit: int
) -> None:
    rows: dict[str, list[Any]] = {"text": [" ".join(texts[0])], "other": [" ".join(texts[1])], "label": [0]}
    inputs, _ = prompt_of_two.collate(rows, limit)
    words = tiny_tokenizer().convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert len(words) <= limit
    assert len(words) == min(limit, sum(map(len, texts)) + 6)
    assert (words[0], words[-1]) == ("<s>", "</s>")
    slot = words.index("<mask>")
    assert words[slot - 1] == "was"
    first, second = words[2 : slot - 1], words[slot + 1 : -2]
    assert (words[1], words[-2]) == ("the", "and")
    assert first == texts[0][: len(first)]
    assert second == texts[1][: len(second)]
    lost = [len(whole) - len(left) for whole, left in zip(texts, (first, second), strict=True)]
    assert not all(lost) or abs(len(first) - len(second)) <= 1, "the longer one first"


@pytest.fixture(scope="module")
def prompt_of_two(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> PromptedObjective:
    prompt = "the {text} was {mask} {other} and"
    return objective_of(tmp_path_factory.mktemp("two"), models_dir, text=["text", "other"], prompt=prompt)


def test_marks_in_a_text_are_characters(tmp_path: Path, models_dir: Path) -> None:
    objective = objective_of(tmp_path, models_dir)
    inputs, _ = objective.collate({"text": ["the <mask> film </s>"], "label": [1]}, 24)
    ids = inputs["input_ids"][0].tolist()
    assert (ids.count(4), ids.count(2)) == (1, 1)
    assert int(objective.slots(inputs)[0]) == ids.index(4) == len(ids) - 3


def test_demonstrations_stand_before_the_prompt_but_not_before_themselves(tmp_path: Path, models_dir: Path) -> None:
    rows = [["a plot", "0"], ["the film", "1"]]
    objective = objective_of(tmp_path, models_dir, demonstrations=1, demonstrated=rows)
    shown = ["a plot it was bad and", "the film it was good and"]
    assert objective.preview({"text": ["music"], "label": [0]}) == ["\n".join([*shown, "music it was<mask> and"])]
    assert objective.preview(ROW) == [f"{shown[0]}\nthe film it was<mask> and"]
    inputs, _ = objective.collate({"text": ["music"], "label": [0]}, 24)
    assert inputs["input_ids"].shape == (1, 2 + 6 + 6 + 5)


def test_demonstrations_are_drawn_by_the_seed_within_classes(tmp_path: Path, models_dir: Path) -> None:
    tree = prompted_tree("causal", tmp_path, models_dir, demonstrations=2, max_length=64)
    first = checked(tree)
    shown = first.config.task.demonstrated
    assert [number for _, number in shown] == ["0", "1", "0", "1"]
    given = dict(zip(first.task.texts(range(48)), first.task.references(range(48)), strict=True))
    assert all(given[(text,)] == int(number) for text, number in shown)
    assert checked(tree).config.task.demonstrated == shown
    tree["run"]["seed"] = 2
    assert checked(tree).config.task.demonstrated != shown
    tree["task"]["demonstrated"] = shown
    assert checked(tree).config.task.demonstrated == shown, "those of a finished run"


def test_pieces_of_a_template() -> None:
    assert pieces_of("{{a}} {x: y!} {mask}.") == [
        Piece("{", None), Piece("a}", None), Piece(" ", "x: y!"), Piece(" ", "mask"), Piece(".", None),
    ]  # fmt: skip


def test_likely_words_are_whole_and_each_there_once() -> None:
    words = {0: "Good", 1: "good", 2: None, 3: "bad", 4: "fine"}
    sums = torch.tensor([[-1.0, -2.0, 0.0, -3.0, -4.0], [-4.0, -4.0, 0.0, -1.0, -4.0]]).double()
    assert likely_words(sums, words.get, 3) == [[0, 3, 4], [3, 0, 4]]


@given(st.data())
def test_no_other_word_of_one_class_answers_the_samples_better(data: st.DataObject) -> None:
    classes, width = data.draw(st.integers(2, 3)), data.draw(st.integers(4, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    labels = torch.arange(classes).repeat(4)
    scores = torch.randn(len(labels), width, generator=generator).log_softmax(1)
    candidates = [list(range(width))] * classes
    chosen = best_words(scores, labels, candidates)
    assert len(set(chosen)) == classes
    own = judged(scores.double()[:, chosen], labels)
    for number, column in itertools.product(range(classes), range(width)):
        if column not in chosen:
            other = [*chosen[:number], column, *chosen[number + 1 :]]
            assert judged(scores.double()[:, other], labels) <= own


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"prompt": "{text} it was"}, ("has no slot", "put {mask}")),
        ({"prompt": "{text} {mask} {mask}"}, ("has 2 slots", "leave one")),
        ({"prompt": "{text} {answer} it was"}, ("{answer}", "at the end")),
        ({"prompt": "{txt} {mask}"}, ("{txt}", "did you mean {text}?")),
        ({"prompt": "it was {mask}"}, ("no place {text}",)),
        ({"prompt": "{text it was {mask}"}, ("'prompt'", "brace")),
        ({"label_words": None}, ("'label_words'", "'auto'")),
        ({"label_words": "good"}, ("one word", "'auto'")),
        ({"label_words": ["bad"]}, ("no word for the class 'yes'",)),
        ({"label_words": {"no": "bad"}}, ("no word for the class 'yes'",)),
        ({"label_words": {"no": "bad", "yes": "good", "maybe": "fine"}}, ("'maybe'", "remove it")),
        ({"label_words": ["bad", "bad"]}, ("'bad' to two classes",)),
        ({"label_words": ["bad", "good film"]}, ("'good film' is 2 tokens", "a single one")),
        ({"label_words": ["bad", "marvellous"]}, ("does not know 'marvellous'",)),
        ({"type": "regression", "metrics": ["mse"]}, ("'prompt' asks for classes",)),
        ({"prompt": None}, ("'label_words' is of a task with a 'prompt'",)),
        ({"prompt_base": "causal"}, ("prompt_base: causal", "{answer}")),
        ({"prompt": "{text} it was {answer}"}, ("slot {answer}", "fills in masks", "use a slot {mask}")),
        ({"max_length": 5}, ("task.max_length=5", "takes 6 tokens without a text")),
        ({"demonstrations": 4, "max_length": 24}, ("with 8 demonstrations", "lower task.demonstrations")),
    ],
)
def test_mistakes_are_one_line(task: dict[str, Any], words: tuple[str, ...], tmp_path: Path, models_dir: Path) -> None:
    with pytest.raises(UserError) as error:
        checked(prompted_tree("masked", tmp_path, models_dir, **task))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_bases_of_another_kind_and_without_a_head_are_refused(tmp_path: Path, models_dir: Path) -> None:
    tree = prompted_tree("causal", tmp_path, models_dir, prompt="{text} it was {mask}")
    with pytest.raises(UserError, match=r"slot \{mask\}.*'llama' model.*put \{answer\}"):
        checked(tree)
    tree = prompted_tree("masked", tmp_path, models_dir)
    tree["model"]["name_or_path"] = str(tiny_model("bert", models_dir))  # without a head
    with pytest.raises(UserError, match=r"no cls\.predictions\S+, no language head.*BertForMaskedLM"):
        checked(tree)


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_is_the_token_that_stands_there_in_the_whole_text(kind: str, tmp_path: Path, models_dir: Path) -> None:
    tokenizer = KINDS[kind]()
    known = 0
    for prompt, made in (("{text} it was {mask}", MaskedPrompt), ("{text} it was {answer}", CausalPrompt)):
        tree = prompted_tree("masked", tmp_path, models_dir, prompt=prompt, label_words="auto", max_length=80)
        model_config = AutoModelForMaskedLM.from_pretrained(masked_model(models_dir)).config
        objective = made(parse_config(tree).task, tokenizer, model_config)
        inputs, _ = objective.collate({"text": ["the plot"], "label": [0]}, 80)
        ids, slot = inputs["input_ids"][0].tolist(), int(objective.slots(inputs)[0])
        for number in range(len(tokenizer)):
            word = objective.word_of(number)
            if word is None:
                continue
            known += 1
            whole = tokenizer(f"the plot it was {word}")["input_ids"]
            if made is CausalPrompt:
                assert whole[:-1] == [*ids, number]
            else:
                assert whole[slot] == number
                assert whole[:slot] == ids[:slot]
    assert known > 5
