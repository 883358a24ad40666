"""The pools of the studies: counts, truth, and that no row is where it must not be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from benchmarks.studies.corpora import READERS, read_corpus
from benchmarks.studies.pools import POOLS, Maker, StudyPool, read_rows, write_pool
from benchmarks.studies.settings import NAMES, config_of, make_setting
from tests.unit.studies.small_data import write_small_data
from tsqlora_scale.config.load import parse_config

SCALE = 0.01  # of 300 rows 3, of 64 the least, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_data(tmp_path_factory.mktemp("data") / "all")


def texts(pool: StudyPool) -> list[str]:
    return [row.example.text for row in pool.rows]


@pytest.mark.parametrize("name", READERS)
def test_a_corpus_has_each_text_once(name: str, data: Path) -> None:
    corpus = read_corpus(data, name)
    every = [example.text for example in [*corpus.train, *corpus.dev]]
    assert len(set(every)) == len(every)
    assert all(text and text == " ".join(text.split()) for text in every)
    tune, test = corpus.halves()
    assert len(tune) == len(test) == len(corpus.dev) // 2
    assert len({e.text for e in [*tune, *test]}) == 2 * len(tune)


@pytest.mark.parametrize("name", POOLS)
def test_a_pool(name: str, data: Path) -> None:
    pool = Maker(data, 3, SCALE).make(name)
    held_out = {e.text for e in pool.corpus.dev}
    query = [e.text for e in pool.query]
    assert len({*texts(pool), *query}) == len(pool.rows) + len(query)
    assert not held_out & {*texts(pool), *query}
    own = {e.text: e.answer for e in pool.corpus.train}
    assert all(own[e.text] == e.answer for e in pool.query)
    for row in pool.rows:
        if row.on_target:
            assert (own[row.example.text] == row.example.answer) is not row.wrong
    origins = [row.origin for row in pool.rows]
    assert len(set(origins)) == 1 or origins != sorted(origins, key=origins.index)  # in no order


def test_it_depends_on_the_seed_alone(data: Path) -> None:
    first, again, other = (Maker(data, seed, SCALE).make("mixed") for seed in (3, 3, 4))
    assert first == again
    assert texts(first) != texts(other)
    assert first.corpus.halves() == other.corpus.halves()


def test_counts(data: Path) -> None:
    mixed = Maker(data, 0, 0.02).make("mixed")
    assert Counter(row.origin for row in mixed.rows) == {"sst2": 6, "cola": 12, "rte": 10, "qnli": 12}
    flips = Maker(data, 0, 0.05).make("flips")
    assert (len(flips.rows), sum(row.wrong for row in flips.rows)) == (50, 15)
    summaries = Maker(data, 0, 0.02).make("summaries")
    own = {e.text: e.answer for e in summaries.corpus.train}
    shuffled = [row for row in summaries.rows if row.origin == "shuffled"]
    assert len(shuffled) == 12
    assert all(own[row.example.text] != row.example.answer for row in shuffled)


def test_what_is_written(data: Path, tmp_path: Path) -> None:
    pool = Maker(data, 0, SCALE).make("length")
    write_pool(tmp_path, pool, 0)
    rows, truth = read_rows(tmp_path / "train.jsonl"), read_rows(tmp_path / "truth.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in truth]
    assert [row["text"] for row in rows] == texts(pool)
    assert [row["on_target"] for row in truth] == [row.on_target for row in pool.rows]
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    assert (meta["rows"], meta["on_target"], meta["query"]) == (20, 6, 10)


@pytest.mark.parametrize("name", NAMES)
def test_a_setting(name: str, data: Path, tmp_path: Path) -> None:
    pool = make_setting(Maker(data, 1, 0.02), name)
    state, size = name.split("-")[1], round(0.02 * int(name.split("-")[2]))
    assert len(pool.rows) == size
    assert any(row.wrong for row in pool.rows) is (state == "flips")
    assert any(not row.on_target for row in pool.rows) is (state == "mix")
    queried = {example.text for example in pool.query}
    assert queried
    assert not queried & set(texts(pool))
    distinct = len(set(texts(pool)))
    assert sum(row.is_copy for row in pool.rows) == size - distinct
    assert (distinct < size) is (state == "copies")
    config = yaml.safe_load(yaml.safe_dump(config_of(tmp_path, pool, "model", 1)))
    assert parse_config({**config, "task": {k: v for k, v in config["task"].items() if k != "query"}})
