"""The packaged extract, and the script that makes it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.tasks.cases import CLASSES, NUMBERS
from tsqlora_scale.config import locations
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks import Data, load_data

LOCATION = "package:tsqlora_scale/data/movie_snippets"


@pytest.fixture(scope="module")
def data() -> Data:
    files = {"path": LOCATION, "train_file": "train.tsv.gz", "dev_file": "dev.tsv.gz", "id_column": "id"}
    return load_data(
        TaskConfig.model_validate(CLASSES | {"labels": ["negative", "positive"], "dataset": files}), seed=0
    )


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "make_movie_snippets.py"
    spec = importlib.util.spec_from_file_location("make_movie_snippets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_sizes_and_balance(data: Data) -> None:
    assert data.dev is not None
    assert (len(data.train), len(data.dev)) == (6000, 1000)
    assert (sum(data.train["label"]), sum(data.dev["label"])) == (2988, 479)


@pytest.mark.parametrize("column", ["mean", "std"])
def test_labels_are_the_sign_of_clear_ratings(data: Data, column: str) -> None:
    files = {"path": LOCATION, "train_file": "train.tsv.gz", "dev_file": "dev.tsv.gz", "id_column": "id"}
    numbers = load_data(TaskConfig.model_validate(NUMBERS | {"label": column, "dataset": files}), seed=0)
    assert data.dev is not None
    assert numbers.dev is not None
    for split, other in ((data.train, numbers.train), (data.dev, numbers.dev)):
        values = other[column][:]
        if column == "std":
            assert all(0 <= value < 4 for value in values)
        else:
            assert all(abs(value) > 0.5 for value in values)
            assert [int(value > 0) for value in values] == split["label"][:]


def test_no_sentence_is_in_both_splits(data: Data) -> None:
    assert data.dev is not None
    train, dev = ({t.casefold() for t in split["text"]} for split in (data.train, data.dev))
    assert (len(train), len(dev)) == (6000, 1000)
    assert not train & dev
    assert not set(data.train["sample_id"]) & set(data.dev["sample_id"])


def test_it_is_small_and_names_its_source() -> None:
    folder = Path(locations.resolve(LOCATION, key="k"))
    assert sum(p.stat().st_size for p in folder.iterdir()) < 700_000
    assert "Copyright (c) 2014 cjhutto" in (folder / "LICENSE.txt").read_text()
    assert "Hutto" in (folder / "README.md").read_text()


def test_the_script_is_deterministic(script: ModuleType, tmp_path: Path) -> None:
    original = tmp_path / "original"
    original.mkdir()
    rows = [(str(i), (i % 9 - 4) / 1.0, f"sentence  {i}") for i in range(60)]
    rows += [("60", 3.0, "SENTENCE 3"), ("61", 0.5, "unclear")]  # an equal text, a rating at the border
    (original / "movieReviewSnippets_GroundTruth.txt").write_bytes(
        "\r\n".join(f"{i}\t{mean}\t{text}" for i, mean, text in rows).encode()
    )
    (original / "movieReviewSnippets_anonDataRatings.txt").write_bytes(
        "\r\n".join(f"{i}\t{mean:.9f}\t1.5\t[1, 2]" for i, mean, _ in rows).encode()
    )
    (original / "LICENSE.txt").write_bytes(b"MIT\r\n")
    for out in ("first", "second"):
        script.write_extract(original, tmp_path / out, train_rows=30, dev_rows=10)
    for name in ("train.tsv.gz", "dev.tsv.gz", "LICENSE.txt"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    snippets = script.read_original(original)
    train, dev = script.split(snippets, 30, 10)
    assert not {s.id for s in train} & {s.id for s in dev}
    assert not {"4", "60", "61"} & {s.id for s in (*train, *dev)}
    assert train[0].text.startswith("sentence ")
    assert script.split(snippets[::-1], 30, 10)[1][0].order == dev[0].order
