"""What is hidden in plain text, and that it can be told from what is left."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny import WORDS, tiny_model, tiny_tokenizer
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.config.pretrain_section import PretrainConfig
from tsqlora_scale.config.task_section import TaskConfig
from tsqlora_scale.tasks.batch import IGNORED
from tsqlora_scale.tasks.losses import loss_terms
from tsqlora_scale.tasks.metrics import SampleLosses, mean_loss
from tsqlora_scale.tasks.objectives.corpus import CorruptedText, MaskedText, PlainText, hidden_spans
from tsqlora_scale.tasks.rows.corpus_rows import _masked, _without
from tsqlora_scale.tasks.rows.data import wanted_columns

TEXTS = [" ".join(WORDS[start : start + 30]) for start in range(0, 5)] + ["film"]
STREAMS = list(range(len(TEXTS)))
ROWS = {"text": TEXTS, "mask_stream": STREAMS}


def task(objective: str) -> TaskConfig:
    own = PretrainConfig(objective=objective)  # type: ignore[arg-type]
    return TaskConfig.model_validate(own.task(max_length=40))


def config_of(kind: str, models: Path) -> object:
    return AutoConfig.from_pretrained(tiny_model(kind, models))


@given(st.integers(1, 400), st.integers(1, 100), st.integers(0, 50))
def test_spans_hide_their_share(length: int, most: int, seed: int) -> None:
    hidden = hidden_spans(length, philox(seed, "test"), most=most)
    spans = int(hidden[0]) + int((np.diff(hidden.astype(int)) == 1).sum())
    assert hidden.sum() == (min(max(round(0.15 * length), 1), length - 1) if length > 1 else 1)
    assert 1 <= spans <= most
    assert length == 1 or not hidden[0]


def test_masked_tokens_are_learned_and_the_rest_is_not(models_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    objective = MaskedText(task("mlm"), tokenizer, config_of("bert", models_dir))  # type: ignore[arg-type]
    inputs, targets = objective.collate(ROWS, 40)
    again, _ = objective.collate({"text": TEXTS[2:3], "mask_stream": STREAMS[2:3]}, 40)
    assert (again["input_ids"][0] == inputs["input_ids"][2][: again["input_ids"].shape[1]]).all()
    plain = [tokenizer(text)["input_ids"] for text in TEXTS]
    kinds = {"mask": 0, "same": 0, "other": 0}
    for row, ids in enumerate(plain):
        hidden = [place for place in range(len(ids)) if targets[row, place] != IGNORED]
        assert len(hidden) == max(1, round(0.15 * (len(ids) - 2)))
        assert 0 not in hidden and len(ids) - 1 not in hidden
        for place, token in enumerate(ids):
            seen = int(inputs["input_ids"][row, place])
            if place not in hidden:
                assert seen == token
                continue
            assert int(targets[row, place]) == token
            kinds["mask" if seen == tokenizer.mask_token_id else "same" if seen == token else "other"] += 1
    assert kinds["mask"] > kinds["same"] + kinds["other"]


def test_a_span_goes_on_over_what_the_tokenizer_does_not_know(models_dir: Path) -> None:
    """And has one mark, of which there are only so many."""
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    marks = [f"<extra_id_{number}>" for number in range(4)]
    tokenizer.add_tokens(marks, special_tokens=True)
    objective = CorruptedText(task("span"), tokenizer, config_of("bart", models_dir))  # type: ignore[arg-type]
    text = " ½ ".join((WORDS * 4)[:80])
    assert tokenizer(text)["input_ids"].count(tokenizer.unk_token_id) == 79
    inputs, targets = objective.collate({"text": [text] * 5, "mask_stream": list(range(5))}, 200)
    ids = tokenizer.convert_tokens_to_ids(marks)
    for source, target in zip(inputs["input_ids"].tolist(), targets.tolist(), strict=True):
        assert [token for token in source if token in ids] == [token for token in target if token in ids] == ids
        assert tokenizer.unk_token_id in target


@pytest.mark.parametrize("sentinels", [True, False])
def test_a_text_comes_back_from_its_spans(models_dir: Path, sentinels: bool) -> None:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    if sentinels:
        tokenizer.add_tokens([f"<extra_id_{number}>" for number in range(20)], special_tokens=True)
    objective = CorruptedText(task("span"), tokenizer, config_of("bart", models_dir))  # type: ignore[arg-type]
    inputs, targets = objective.collate(ROWS, 40)
    for row, text in enumerate(TEXTS):
        words = tokenizer(text)["input_ids"][1:-1]
        target = [int(token) for token in targets[row] if token != IGNORED]
        source = [
            int(t) for t, real in zip(inputs["input_ids"][row], inputs["attention_mask"][row], strict=True) if real
        ]
        decoder = [int(token) for token in inputs["decoder_input_ids"][row][: len(target)]]
        assert decoder == [2, *target[:-1]] and target[-1] == tokenizer.eos_token_id
        if not sentinels:
            assert target == tokenizer(text_target=text)["input_ids"], "as the task that follows writes its targets"
            assert tokenizer.mask_token_id in source
            continue
        marks = set(tokenizer.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(20)]))
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token in marks:
                spans[token] = current = []
            else:
                current.append(token)
        back = [token for one in source[1:-1] for token in (spans[one] if one in marks else [one])]
        assert back == words
        assert sum(map(len, spans.values())) == max(1, round(0.15 * len(words)))


def test_every_token_of_plain_text_is_learned(models_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    objective = PlainText(task("causal"), tokenizer, config_of("llama", models_dir))  # type: ignore[arg-type]
    inputs, targets = objective.collate(ROWS, 40)
    ids = tokenizer(TEXTS[-1])["input_ids"]
    assert targets[-1].tolist() == [IGNORED, *ids[1:]] + [IGNORED] * (targets.shape[1] - len(ids))
    assert (inputs["attention_mask"].sum(1) - 1).tolist() == (targets != IGNORED).sum(1).tolist()


def test_the_loss_of_plain_text_is_the_mean_over_its_tokens(models_dir: Path) -> None:
    """Of all but the first, as Transformers has it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", models_dir))
    objective = PlainText(task("causal"), tiny_tokenizer(), model.config)
    inputs, targets = objective.collate({"text": TEXTS[:1], "mask_stream": [0]}, 40)
    sums, terms = objective.losses(model(**inputs).logits, targets)
    wanted = model(**inputs, labels=inputs["input_ids"]).loss
    assert float((sums / terms).detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert loss_terms(targets).tolist() == terms.tolist(), "as a step counts them"


def test_a_text_of_unknown_characters_alone_has_no_loss(models_dir: Path) -> None:
    objective = MaskedText(task("mlm"), tiny_tokenizer(), config_of("bert", models_dir))  # type: ignore[arg-type]
    _, targets = objective.collate({"text": ["\U0001f602", TEXTS[0]], "mask_stream": [0, 1]}, 40)
    terms = (targets != IGNORED).sum(1).numpy()
    assert terms[0] == 0 < terms[1]
    assert mean_loss(SampleLosses(np.array([0.0, 3.0 * terms[1]]), terms)) == pytest.approx(3.0)


def test_tokenizers_without_a_mask(models_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    for cls, objective, kind in ((MaskedText, "mlm", "bert"), (CorruptedText, "span", "t5")):
        with pytest.raises(UserError, match="mask token"):
            cls(task(objective), tokenizer, config_of(kind, models_dir))  # type: ignore[arg-type]


@given(st.integers(1, 60), st.data())
def test_a_table_without_some_rows_is_parts_of_it(size: int, data: st.DataObject) -> None:
    apart = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))), dtype=np.int64)
    table = pa.table({"text": [f"text {i}" for i in range(size)]})
    found = _without(table, apart)
    assert found["text"].to_pylist() == [f"text {i}" for i in range(size) if i not in set(apart.tolist())]
    addresses = {table["text"].chunk(0).buffers()[2].address}
    assert {chunk.buffers()[2].address for chunk in found["text"].chunks} == addresses, "nothing is copied"


def test_a_corpus_is_known_by_what_it_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fingerprint of the table would write all of it once for every part of it."""
    monkeypatch.setattr(datasets.arrow_dataset, "generate_fingerprint", lambda _: pytest.fail("the table was written"))
    table = pa.table({"text": ["a", "b"], "sample_id": ["0", "1"]})
    made = [
        _masked(table, seed, stream, copies, source=source)._fingerprint
        for seed, stream, copies, source in (
            (0, "masks", 1, "x"), (1, "masks", 1, "x"), (0, "held out", 1, "x"), (0, "masks", 2, "x"),
            (0, "masks", 1, "y"), (0, "masks", 1, "x"),
        )
    ]  # fmt: skip
    assert len(set(made[:5])) == 5
    assert made[5] == made[0]


def test_a_corpus_is_a_column_of_its_file() -> None:
    """Whatever else the file has; an objective of a user's own may read all of it."""
    assert not wanted_columns(task("causal"), pool=True).others
    own = task("causal").model_copy(update={"objective": "mine.py:Objective"})
    assert wanted_columns(own, pool=True).others


def test_a_models_languages_and_no_beams_are_those_of_its_texts() -> None:
    found = PretrainConfig(objective="span").task(max_length=20, language="en_XX")
    assert (found["source_lang"], found["target_lang"], found["num_beams"]) == ("en_XX", "en_XX", 1)
    assert "source_lang" not in PretrainConfig(objective="mlm").task(max_length=20, language="en_XX")
