"""Answers to new rows: those of an evaluation, beside the rows as they were given, in any format and on any ranks."""

from __future__ import annotations

import csv
import datetime
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.distributed.launch import ROOT, run_launched
from tests.runs import go, run_tree
from tests.tiny import WORDS
from tsqlora_scale import Config, UserError, api, predict
from tsqlora_scale.commands import main as cli
from tsqlora_scale.config.load import load_config, parse_config
from tsqlora_scale.run import preflight
from tsqlora_scale.run.adapted_model import load_adapted
from tsqlora_scale.tasks import prediction
from tsqlora_scale.tasks.rows import file_limits

SHORT: dict[str, Any] = {"adapter": {"method": "lora"}, "train": {"max_steps": 3, "lr": 0.05, "eval_batch_size": 3}}


@dataclass
class Finished:
    """A finished run, and the columns that its texts are in."""

    folder: Path
    text: str

    @property
    def config(self) -> Config:
        """Of the run."""
        return load_config(self.folder / "config.yaml")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Callable[..., Finished]:
    """Runs of a kind of model, each trained once."""
    made: dict[str, Finished] = {}

    def run(kind: str, name: str = "", **changes: Any) -> Finished:
        if kind + name not in made:
            tree = run_tree(kind, tmp_path_factory.mktemp("predict"), models_dir, "run", **SHORT)
            for section, values in changes.items():
                tree[section] = {**tree.get(section, {}), **values}
            made[kind + name] = Finished(go(tree).record.folder, "text")
        return made[kind + name]

    return run


def texts(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) for _ in range(count)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluated(run: Finished, rows: list[str], folder: Path, **row: Any) -> list[Any]:
    """What an evaluation of the same rows asks the model for."""
    jsonl(folder / "labelled.jsonl", [{"text": text, **row} for text in rows])
    tree = run.config.model_dump(mode="json")
    tree["task"]["dataset"] |= {"path": str(folder), "train_file": "labelled.jsonl", "dev_file": "labelled.jsonl"}
    described = preflight.check(parse_config(tree))
    model = load_adapted(described, run.folder / "adapter", device=torch.device("cpu"))
    task = described.task
    order = np.argsort(task.lengths("dev"), kind="stable")
    found: dict[int, Any] = {}
    for start in range(0, len(order), 3):
        part = order[start : start + 3]
        found |= zip(part.tolist(), task.predict(model, task.batch(part, split="dev"), synced=False), strict=True)
    return [found[row] for row in range(len(rows))]


def test_classes_and_their_probabilities(runs: Callable[..., Finished], tmp_path: Path) -> None:
    run, sentences = runs("bert"), texts(23)
    rows = [{"id": i * 7, "text": text, "nested": {"a": [1, None]}, "ü": "…"} for i, text in enumerate(sentences)]
    out = tmp_path / "out.jsonl"
    result = predict(jsonl(tmp_path / "new.jsonl", rows), out, run=run.folder)
    assert (result.out, result.rows, result.empty) == (out, 23, 0)
    found = read_jsonl(out)
    names = ["prediction", "probability_no", "probability_yes"]
    assert [{key: row[key] for key in row if key not in names} for row in found] == rows
    assert all(list(row)[-3:] == names for row in found)
    expected = evaluated(run, sentences, tmp_path, label="yes", summary="x")
    assert [row["prediction"] for row in found] == [["no", "yes"][label] for label in expected]
    table = np.array([[row[name] for name in names[1:]] for row in found], np.float32)
    assert np.abs(table.sum(axis=1) - 1).max() < 1e-6
    assert [["no", "yes"][i] for i in table.argmax(axis=1)] == [row["prediction"] for row in found]
    assert len(set(table[:, 0].tolist())) == 23, "rows must differ for their order to be tested"


@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("bart", "", {}),
        ("llama", "", {}),
        ("bert", "nf4", {"model": {"quantization": "nf4"}}),
        ("bert", "bf16", {"model": {"dtype": "bf16"}}),
    ],
)
def test_other_tasks_and_bases(
    kind: str, name: str, changes: dict[str, Any], runs: Callable[..., Finished], tmp_path: Path
) -> None:
    run, sentences = runs(kind, name, **changes), texts(8)
    data = jsonl(tmp_path / "new.jsonl", [{"text": text} for text in sentences])
    predict(data, tmp_path / "out.jsonl", adapter=run.folder / "adapter")
    found = [row["prediction"] for row in read_jsonl(tmp_path / "out.jsonl")]
    expected = evaluated(run, sentences, tmp_path, label="yes", summary="the film")
    assert found == (expected if kind != "bert" else [["no", "yes"][label] for label in expected])
    assert kind == "bert" or read_jsonl(tmp_path / "out.jsonl")[0].keys() == {"text", "prediction"}


def test_numbers(runs: Callable[..., Finished], tmp_path: Path, models_dir: Path) -> None:
    task = {"type": "regression", "labels": None, "metrics": ["mse", "loss"], "label": "score"}
    tree = run_tree("bert", tmp_path / "run", models_dir, "run", **SHORT)
    rows = [{"text": text, "score": len(text) / 10} for text in texts(40)]
    jsonl(tmp_path / "train.jsonl", rows)
    tree["task"] |= task
    tree["task"]["dataset"] = {"path": str(tmp_path), "train_file": "train.jsonl", "dev_file": "train.jsonl"}
    folder = go(tree).record.folder
    for suffix in ("jsonl", "csv", "parquet"):
        predict(tmp_path / "train.jsonl", tmp_path / f"out.{suffix}", run=folder)
    lines = read_jsonl(tmp_path / "out.jsonl")
    assert [{key: row[key] for key in ("text", "score")} for row in lines] == rows
    numbers = np.array([row["prediction"] for row in lines], np.float32)
    assert len(set(numbers.tolist())) > 30
    assert pq.read_table(tmp_path / "out.parquet")["prediction"].to_numpy().tolist() == numbers.tolist()
    with (tmp_path / "out.csv").open(newline="") as file:
        assert [np.float32(row["prediction"]) for row in csv.DictReader(file)] == numbers.tolist()


ODD = ['say "so"', "comma, and", "tab\tinside", "line\nend", "ünïcode 你好", "", "   ", "plain"]


@pytest.mark.parametrize("given", ["csv", "tsv", "jsonl", "json", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("written", ["csv", "tsv", "jsonl", "parquet"])
def test_columns_are_carried_through(given: str, written: str, runs: Callable[..., Finished], tmp_path: Path) -> None:
    import gzip

    cells = [cell for cell in ODD if given != "tsv" or not set(cell) & set("\t\n")]
    rows = [
        {"key": f"0{i}", "text": text, "note": cell}
        for i, (text, cell) in enumerate(zip(texts(8), cells, strict=False))
    ]
    data = tmp_path / f"new.{given}"
    if given == "csv":
        with data.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif given == "tsv":
        data.write_text("".join("\t".join(map(str, line)) + "\n" for line in [rows[0], *(r.values() for r in rows)]))
    elif given == "json":
        data.write_text("\ufeff\n" + json.dumps(rows, indent=1))
    elif given == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), data)
    elif given == "jsonl":
        jsonl(data, rows)
    else:
        data.write_bytes(gzip.compress(b"\n" + jsonl(tmp_path / "plain.jsonl", rows).read_bytes()))
    out = tmp_path / f"out.{written}"
    predict(data, out, run=runs("bert").folder)
    if written == "jsonl":
        found = read_jsonl(out)
    elif written == "parquet":
        found = pq.read_table(out).to_pylist()
    elif written == "csv":
        found = list(csv.DictReader(io.StringIO(out.read_text(), newline="")))
    else:
        header, *lines = [line.split("\t") for line in out.read_text().split("\n")[:-1]]
        found = [dict(zip(header, line, strict=True)) for line in lines]
        rows = [{k: v.replace("\t", " ").replace("\n", " ") for k, v in row.items()} for row in rows]
    assert [{key: row[key] for key in ("key", "text", "note")} for row in found] == rows
    assert {row["prediction"] for row in found} <= {"no", "yes"}
    assert list(found[0]) == ["key", "text", "note", "prediction", "probability_no", "probability_yes"]


def test_parquet_keeps_its_own_types(runs: Callable[..., Finished], tmp_path: Path) -> None:
    columns = {
        "text": pa.array(["a film", "the plot", "dull"]).dictionary_encode(),
        "when": pa.array([datetime.datetime(2020, 1, 2), None, datetime.datetime(1999, 1, 1)]),
        "vector": pa.array([[1.5], [], None]),
        "kind": pa.array([("a", 1), ("b", 2), ("c", 3)], pa.struct([("x", pa.string()), ("y", pa.int8())])),
        "bytes": pa.array([b"\xff", b"", None]),
        "number": pa.array([1, 2, 3], pa.decimal128(5, 2)),
    }
    data = tmp_path / "new.parquet"
    pq.write_table(pa.table(columns), data, row_group_size=2)
    for written in ("parquet", "jsonl", "csv", "tsv"):
        predict(data, tmp_path / f"out.{written}", run=runs("bert").folder)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(list(columns)).equals(pq.read_table(data))
    assert found.column_names[-3:] == ["prediction", "probability_no", "probability_yes"]
    assert found.schema.field("probability_no").type == pa.float32()
    assert [row["vector"] for row in read_jsonl(tmp_path / "out.jsonl")] == [[1.5], [], None]


def test_rows_without_a_text_have_no_answer(
    runs: Callable[..., Finished], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in ("", "a film", "  ", None, "the plot")]
    data = jsonl(tmp_path / "new.jsonl", rows)
    for suffix in ("jsonl", "csv", "parquet"):
        assert predict(data, tmp_path / f"out.{suffix}", run=runs("bert").folder).empty == 3
    assert "3 rows with an empty text have no answer" in caplog.text
    found = read_jsonl(tmp_path / "out.jsonl")
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert [row["prediction"] is None for row in found] == [True, False, True, True, False]
    assert [row["probability_no"] is None for row in found] == [True, False, True, True, False]
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["probability_yes"].null_count == table["prediction"].null_count == 3
    alone = jsonl(tmp_path / "alone.jsonl", rows[:1])
    assert predict(alone, tmp_path / "alone.parquet", run=runs("bert").folder).empty == 1
    assert pq.read_table(tmp_path / "alone.parquet").schema == table.schema


def test_windows_change_nothing(runs: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jsonl(tmp_path / "new.jsonl", [{"text": text if i % 5 else ""} for i, text in enumerate(texts(31))])
    predict(data, tmp_path / "whole.jsonl", run=runs("bert").folder)
    monkeypatch.setattr(prediction, "WINDOW", 7)
    predict(data, tmp_path / "parts.jsonl", run=runs("bert").folder)
    predict(data, tmp_path / "parts.parquet", run=runs("bert").folder)
    whole, parts = read_jsonl(tmp_path / "whole.jsonl"), read_jsonl(tmp_path / "parts.jsonl")
    assert pq.read_table(tmp_path / "parts.parquet")["prediction"].to_pylist() == [row["prediction"] for row in whole]
    for one, other in zip(whole, parts, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["probability_yes"] == pytest.approx(other["probability_yes"], abs=1e-6)


def test_number_of_classes_for_names(runs: Callable[..., Finished], tmp_path: Path) -> None:
    run = runs("bert")
    config = run.config.model_copy(update={"task": run.config.task.model_copy(update={"labels": 2})})
    data = jsonl(tmp_path / "new.jsonl", [{"text": text} for text in texts(5)])
    predict(data, tmp_path / "out.jsonl", adapter=run.folder / "adapter", config=config)
    for row in read_jsonl(tmp_path / "out.jsonl"):
        assert list(row) == ["text", "prediction", "probability_0", "probability_1"]
        assert row["prediction"] == int(row["probability_1"] > row["probability_0"])


def test_classes_in_another_order_are_refused(runs: Callable[..., Finished], tmp_path: Path) -> None:
    """By place they would all be taken for one another."""
    run = runs("bert")
    data = jsonl(tmp_path / "new.jsonl", [{"text": "a film"}])

    def named(labels: list[str]) -> Config:
        return run.config.model_copy(update={"task": run.config.task.model_copy(update={"labels": labels})})

    trained = list(run.config.task.labels)  # type: ignore[arg-type]
    for adapter in (run.folder, run.folder / "adapter", run.folder / "checkpoints" / "step-00000003"):
        with pytest.raises(UserError, match=r"the adapter was trained on .* in this order"):
            predict(data, tmp_path / "out.jsonl", adapter=adapter, config=named(trained[::-1]))
        with pytest.raises(UserError, match=r"in this order; write them so"):
            api.evaluate(named(trained[::-1]), adapter)
    predict(data, tmp_path / "out.jsonl", adapter=run.folder, config=named(["first", "second"]))
    assert read_jsonl(tmp_path / "out.jsonl")[0]["prediction"] in ("first", "second")


def test_a_carriage_return_is_quoted(runs: Callable[..., Finished], tmp_path: Path) -> None:
    rows = [{"text": "a film\rand a plot", "note": "x"}, {"text": "a film", "note": "y\rz"}, {"text": "a", "note": "b"}]
    predict(jsonl(tmp_path / "new.jsonl", rows), tmp_path / "out.csv", run=runs("bert").folder)
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert [(row["text"], row["note"]) for row in csv.DictReader(file)] == [(r["text"], r["note"]) for r in rows]


def test_mistakes(runs: Callable[..., Finished], tmp_path: Path) -> None:
    run = runs("bert").folder
    data = jsonl(tmp_path / "new.jsonl", [{"text": "a film"}])
    out = tmp_path / "out.csv"
    out.write_text("weeks of work")
    with pytest.raises(UserError, match=r"--out .*is there already.*--overwrite"):
        predict(data, out, run=run)
    assert out.read_text() == "weeks of work"
    predict(data, out, run=run, overwrite=True)
    assert out.read_text().startswith("text,prediction,")
    with pytest.raises(UserError, match=r"is --data itself"):
        predict(data, data, run=run, overwrite=True)
    with pytest.raises(UserError, match=r"has a column 'prediction'"):
        predict(out, tmp_path / "again.csv", run=run)
    with pytest.raises(UserError, match=r"--run or --adapter"):
        predict(data, tmp_path / "x.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.jsonl", "out.csv"]


def test_a_write_that_fails_leaves_nothing(
    runs: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jsonl(tmp_path / "new.jsonl", [{"text": text} for text in texts(20)])
    monkeypatch.setattr(prediction, "WINDOW", 7)
    answers: list[Any] = []
    from tsqlora_scale.report import prediction_file

    write = prediction_file._Lines.write

    def full(self: Any, table: pa.Table) -> None:
        answers.append(len(table))
        if len(answers) == 2:
            raise OSError(28, "No space left on device")
        write(self, table)

    monkeypatch.setattr(prediction_file._Lines, "write", full)
    with pytest.raises(UserError, match=r"--out .*cannot be written .*No space left"):
        predict(data, tmp_path / "out.jsonl", run=runs("bert").folder)
    assert [path.name for path in tmp_path.iterdir()] == ["new.jsonl"]


def test_half_a_surrogate_pair_in_a_column_that_nobody_reads(runs: Callable[..., Finished], tmp_path: Path) -> None:
    """An emoji that was cut in two is written as it came."""
    line = '{"text": "a fine film", "note": "cut \\ud83d", "more": "é"}\n{"text": "a dull film", "note": "é"}\n'
    (tmp_path / "new.jsonl").write_text(line, encoding="utf-8")
    predict(tmp_path / "new.jsonl", tmp_path / "out.jsonl", run=runs("bert").folder)
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["note"] for row in rows] == ["cut \ud83d", "é"]
    assert {row["prediction"] for row in rows} <= {"no", "yes"}


@pytest.mark.parametrize("name", ["new.jsonl", "new.json"])
@pytest.mark.parametrize("written", ["csv", "jsonl", "parquet"])
def test_a_key_may_first_appear_late(
    name: str, written: str, runs: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_limits, "CHUNK_ROWS", 2)
    rows = [{"text": text} for text in texts(5)] + [{"text": "a film", "note": "ü"}]
    data = jsonl(tmp_path / name, rows)
    if name.endswith("json"):
        data.write_text(json.dumps(rows), encoding="utf-8")
    out = tmp_path / f"out.{written}"
    predict(data, out, run=runs("bert").folder)
    if written == "jsonl":
        assert [row.get("note") for row in read_jsonl(out)] == [None] * 5 + ["ü"]
        assert "note" not in read_jsonl(out)[0]
        return
    found = pq.read_table(out).to_pylist() if written == "parquet" else list(csv.DictReader(out.open(newline="")))
    assert [row["note"] or None for row in found] == [None] * 5 + ["ü"]
    assert list(found[0])[:3] == ["text", "note", "prediction"]


def test_an_answers_name_may_not_appear_late(
    runs: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_limits, "CHUNK_ROWS", 2)
    data = jsonl(tmp_path / "new.jsonl", [{"text": text} for text in texts(5)] + [{"text": "a", "prediction": "b"}])
    with pytest.raises(UserError, match="has a column 'prediction', the name of an answer's"):
        predict(data, tmp_path / "out.jsonl", run=runs("bert").folder)


def test_the_command(runs: Callable[..., Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs("bert").folder
    data = jsonl(tmp_path / "new.jsonl", [{"text": text} for text in texts(5)])
    config = tmp_path / "elsewhere.yaml"
    config.write_text((run / "config.yaml").read_text())
    forms = [["--run", str(run)], ["--adapter", str(run / "adapter")]]
    forms.append(["--adapter", str(run / "adapter"), "--config", str(config), "train.eval_batch_size=2"])
    for number, arguments in enumerate(forms):
        out = tmp_path / f"{number}.csv"
        assert cli.main(["predict", *arguments, "--data", str(data), "--out", str(out)]) == 0
        printed = capsys.readouterr()
        assert printed.out == f"written: {out} (5 rows)\n"
        assert printed.err.splitlines()[-1] == "predicting: 5/5"
    answers = [[line.split(",")[1] for line in (tmp_path / f"{n}.csv").read_text().splitlines()] for n in range(3)]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp-2", "zero2-2"])
def test_several_ranks(engine: str, runs: Callable[..., Finished], tmp_path: Path) -> None:
    for kind in ("bert", "bart"):
        data = jsonl(tmp_path / "new.jsonl", [{"text": text} for text in texts(19)])
        alone, together = tmp_path / f"alone-{kind}.jsonl", tmp_path / f"together-{kind}.jsonl"
        predict(data, alone, run=runs(kind).folder)
        arguments = ["--run-dir", str(runs(kind).folder), "--data", str(data), "--out", str(together)]
        done = run_launched(engine, ROOT / "launch" / "predict.py", arguments, tmp_path)
        assert done.returncode == 0, done.stdout
        assert together.read_bytes() == alone.read_bytes()


@pytest.mark.slow
@pytest.mark.distributed
def test_zero3_is_refused(runs: Callable[..., Finished], tmp_path: Path) -> None:
    data = jsonl(tmp_path / "new.jsonl", [{"text": "a film"}])
    arguments = ["--run", str(runs("bert").folder), "--data", str(data), "--out", str(tmp_path / "out.csv")]
    done = run_launched("zero3-2", ROOT / "launch" / "predict.py", arguments, tmp_path)
    assert done.returncode != 0
    assert len([line for line in done.stdout.splitlines() if line.startswith("error: ") and "ZeRO-3" in line]) == 1
    assert not (tmp_path / "out.csv").exists()
