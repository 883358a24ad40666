"""What encoders and decoders are given: languages, ends, segments; and tokens without a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BertTokenizer,
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
)

from tests.bad_input.place import edit_json
from tests.tiny import VOCAB, WORDS, tiny_tokenizer
from tests.unit.tasks.cases import CLASSES, SUMMARIES, task_config
from tests.unit.tasks.families import build_family, config_over, describe_family, save_family
from tests.unit.tasks.vocabularies import dropping
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.model.describe import load_descriptions
from tsqlora_scale.tasks import IGNORED, Task, build_task, load_data, with_tokens

TSV = "source\ttarget\nthe film\tgood\nthe plot is very bad\tvery bad film\n"
LANGUAGES = {"mbart": (MBartTokenizer, "en_XX", "ro_RO"), "mbart50": (MBart50Tokenizer, "en_XX", "ro_RO"),
             "nllb": (NllbTokenizer, "eng_Latn", "deu_Latn")}  # fmt: skip


def translator(kind: str) -> Any:
    """A tokenizer of many languages over a few words."""
    if kind == "nllb":
        letters = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
        return NllbTokenizer(vocab={piece: i for i, piece in enumerate(letters)}, merges=[])
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return LANGUAGES[kind][0](vocab=[*pieces, ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)])


def translation(kind: str, folder: Path, **task: Any) -> tuple[Task, Any]:
    (folder / "train.tsv").write_text(TSV)
    tokenizer = translator(kind)
    _, source, target = LANGUAGES[kind]
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = describe_family("mbart" if kind == "mbart" else "m2m_100", vocab_size=len(tokenizer) + 3,
                             decoder_start_token_id=2, **tokens)  # fmt: skip
    cfg = task_config(folder, SUMMARIES | {"source_lang": source, "target_lang": target} | task)
    made = build_task(cfg, load_data(cfg, seed=0), tokenizer, config)
    return made, build_family(config, AutoModelForSeq2SeqLM)


@pytest.fixture(autouse=True)
def _m2m(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.tasks.families import FAMILIES, WIDE

    monkeypatch.setitem(FAMILIES, "m2m_100", WIDE)


@pytest.mark.parametrize("kind", LANGUAGES)
def test_targets_begin_with_their_language(kind: str, tmp_path: Path) -> None:
    task, model = translation(kind, tmp_path)
    tokenizer, batch = task.tokenizer, task.batch([0, 1])
    source, target = (tokenizer.convert_tokens_to_ids(name) for name in LANGUAGES[kind][1:])
    seen = batch.inputs["decoder_input_ids"]
    targets = [row[row != IGNORED].tolist() for row in batch.targets]
    if kind == "mbart":
        assert seen[:, 0].tolist() == [target] * 2
        assert target not in [number for row in targets for number in row]
    else:
        assert seen[:, 0].tolist() == [2, 2] and seen[:, 1].tolist() == [target] * 2
        assert [row[0] for row in targets] == [target] * 2
    assert [row[-1] for row in targets] == [2, 2]
    assert all(source in row and target not in row for row in batch.inputs["input_ids"].tolist())
    assert source not in seen
    noticed = {}
    generate = model.generate
    model.generate = lambda **options: noticed.update(options) or generate(**options)
    task.predict(model, batch, synced=False)
    asked = noticed["generation_config"]
    assert (asked.decoder_start_token_id if kind == "mbart" else asked.forced_bos_token_id) == target


@pytest.mark.parametrize("kind", LANGUAGES)
def test_cut_targets_keep_their_language(kind: str, tmp_path: Path) -> None:
    task, _ = translation(kind, tmp_path, max_target_length=3)
    batch = task.batch([1])
    assert batch.targets.shape == (1, 3)
    target = task.tokenizer.convert_tokens_to_ids(LANGUAGES[kind][2])
    assert target in batch.inputs["decoder_input_ids"]


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("nllb", {"target_lang": None}, r"task.target_lang is not set, and .* of many languages; name one of ace_"),
        ("nllb", {"source_lang": "eng"}, r"task.source_lang='eng': no language of this model; did you .*'eng_Latn'"),
        ("nllb", {"target_lang": "deu_latn"}, r"task.target_lang='deu_latn': .*did you mean 'deu_Latn'"),
        ("mbart", {"target_lang": "ro"}, r"task.target_lang='ro': .*'ro_RO'"),
    ],
)  # fmt: skip
def test_languages_that_are_missing_or_unknown(kind: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        translation(kind, tmp_path, **keys)


def test_m2m100s_names_are_not_its_tokens() -> None:
    from tsqlora_scale.tasks.objectives.languages import known_languages

    class Named:
        src_lang, lang_code_to_token = "en", {"en": "__en__", "de": "__de__"}
        set_tgt_lang_special_tokens = M2M100Tokenizer.set_tgt_lang_special_tokens

    named: Any = Named()
    assert known_languages(named) == ["de", "en"]


def test_other_models_know_no_languages(make_task: Callable[..., Task]) -> None:
    with pytest.raises(UserError, match=r"task.source_lang='de': the tokenizer of this 'bart' model is not told"):
        make_task("bart", SUMMARIES | {"source_lang": "de"}, TSV)
    with pytest.raises(ValueError, match="'source_lang' is for seq2seq tasks"):
        make_task("bert", CLASSES | {"source_lang": "de"}, TSV)


@pytest.mark.parametrize("adds", ["<s> $A", "$A"])
@pytest.mark.parametrize("limit", [16, 2])
def test_a_target_ends_where_the_tokenizer_adds_no_end(adds: str, limit: int, tmp_path: Path) -> None:
    from tokenizers import processors

    (tmp_path / "train.tsv").write_text(TSV)
    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 1)])
    cfg = task_config(tmp_path, SUMMARIES | {"max_target_length": limit})
    task = build_task(cfg, load_data(cfg, seed=0), made, describe_family("bart"))
    rows = [row[row != IGNORED].tolist() for row in task.batch([0, 1]).targets]
    whole = [[*made(text)["input_ids"], 2] for text in ("good", "very bad film")]
    assert rows == [row[:limit] for row in whole]


def bert_tokenizer() -> BertTokenizer:
    """With segment ids, and without an end token."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


@pytest.mark.parametrize(("kind", "segments"), [("bert", True), ("bart", False), ("roberta", False), ("gpt2", False),
                                                ("distilbert", False), ("xlnet", True), ("llama", False)])  # fmt: skip
def test_a_model_gets_what_it_takes(kind: str, segments: bool, tmp_path: Path) -> None:
    """Of pairs, by BERT's tokenizer, on models with two segments, one or none."""
    folder = tmp_path / "model"
    types = {"type_vocab_size": 1} if kind == "roberta" else {}
    save_family(folder, kind, bert_tokenizer(), eos_token_id=3, **types)
    config = config_over(folder, tmp_path, text=["text", "summary"])
    model_config = load_descriptions(config, str(folder))[0]
    task = build_task(config.task, load_data(config.task, seed=0), bert_tokenizer(), model_config)
    batch = task.batch(range(3))
    assert ("token_type_ids" in batch.inputs) == segments
    if kind != "bart":  # its classifier wants as many end tokens in every text
        with torch.no_grad():
            build_family(model_config)(**batch.inputs)


def test_berts_tokenizer_on_bart(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(TSV)
    cfg = task_config(tmp_path, SUMMARIES)
    config = describe_family("bart", eos_token_id=3, decoder_start_token_id=2)
    task = build_task(cfg, load_data(cfg, seed=0), bert_tokenizer(), config)
    batch = task.batch([0, 1])
    assert sorted(batch.inputs) == ["attention_mask", "decoder_input_ids", "input_ids"]
    assert [row[row != IGNORED][-1] for row in batch.targets] == [3, 3]
    assert len(task.predict(build_family(config, AutoModelForSeq2SeqLM), batch, synced=False)) == 2


def opened(tmp_path: Path, tokenizer: Any, **changes: Any) -> Any:
    folder = save_family(tmp_path / "model", "bert", tokenizer, **changes)
    return load_descriptions(config_over(folder, tmp_path), str(folder))


def test_a_token_without_a_row(tmp_path: Path) -> None:
    made = tiny_tokenizer()
    made.add_tokens(["kinopoisk"])
    with pytest.raises(UserError, match=rf"its token 'kinopoisk' is number {VOCAB}, and the model knows {VOCAB}; give"):
        opened(tmp_path, made)
    opened(tmp_path, made, vocab_size=VOCAB + 1)


def test_a_mark_without_a_row_that_no_text_gives(tmp_path: Path) -> None:
    """As Gemma's image token: it is in the tokenizer of a model that reads text alone."""
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    opened(tmp_path, made)
    folder = tmp_path / "model"
    edit_json(folder / "tokenizer_config.json", pad_token="<image>")
    with pytest.raises(UserError, match=r"pads with number 40; its token '<image>' is number 40"):
        load_descriptions(config_over(folder, tmp_path), str(folder))


NOTHING = ["\u200b", "\u00ad\u2060", "\ufeff \u200d"]


@pytest.mark.parametrize("nothing", NOTHING)
@pytest.mark.parametrize("column", ["source", "target"])
def test_a_text_that_gives_no_token(nothing: str, column: str, tmp_path: Path) -> None:
    rows = [{"source": "the film", "target": "good"}, {"source": "a", "target": "b"}, {"source": "c", "target": "d"}]
    rows[1][column] = nothing
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = task_config(tmp_path, SUMMARIES, train_file="train.jsonl")
    with pytest.raises(
        UserError, match=rf"train.jsonl, row 2: column '{column}' is '.*', of which the tokenizer makes"
    ):
        with_tokens(cfg, load_data(cfg, seed=0), dropping())
    cfg = task_config(tmp_path, SUMMARIES, train_file="train.jsonl", drop_empty=True)
    kept = with_tokens(cfg, load_data(cfg, seed=0), dropping())
    assert kept.train["sample_id"][:] == ["0", "2"]


def test_every_held_out_set_is_looked_at(tmp_path: Path) -> None:
    for name, text in (("train", "the film"), ("a", "the film"), ("b", "\u200b")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"source": text, "target": "good"}))
    sets = {"first": "a.jsonl", "second": "b.jsonl"}
    cfg = task_config(tmp_path, SUMMARIES, train_file="train.jsonl", dev_file=sets)
    with pytest.raises(UserError, match=r"the held-out set 'second', row 1: column 'source' is '.*', of which"):
        with_tokens(cfg, load_data(cfg, seed=0), dropping())


def test_a_tokenizer_that_drops_what_it_does_not_know(tmp_path: Path) -> None:
    """Byte-pair merges without a token for unknown characters: a whole text of another script is gone."""
    from tests.unit.tasks.vocabularies import whole_text_bpe

    made = whole_text_bpe()
    made.backend_tokenizer.normalizer = None
    made.backend_tokenizer.model.unk_token = None
    (tmp_path / "train.tsv").write_text("source\ttarget\nthe film\tgood\n中文電影\tgood\n")
    cfg = task_config(tmp_path, SUMMARIES)
    with pytest.raises(UserError, match=r"train.tsv, row 2: column 'source' is '中文電影'"):
        with_tokens(cfg, load_data(cfg, seed=0), made)
