"""Data files that are wrong."""

from __future__ import annotations

import gzip
import io
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_input.place import Case, Place, training_file

HEAD = "text\tlabel\n"
TSV = HEAD + "a good film\tyes\na bad film\tno\n" * 8
CSV = TSV.replace("\t", ",")
JSONL = '{"text": "a good film", "label": "yes"}\n{"text": "a bad film", "label": "no"}\n' * 8
REGRESSION = {"type": "regression", "labels": None, "metrics": ["pearson"]}
SUMMARIES = {"type": "seq2seq", "source": "text", "target": "label", "metrics": ["rouge1"], "text": []}


def written(table: pa.Table) -> bytes:
    """A parquet file."""
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def parquet(**columns: Any) -> bytes:
    """A parquet file of these columns."""
    return written(pa.table(columns))


SAME_NAMES = written(pa.Table.from_arrays([pa.array([x]) for x in ("a", "b", "no")], ["text", "text", "label"]))
NOT_UTF_8 = parquet(text=pa.array([b"\xff", b"a"], pa.binary()).view(pa.string()), label=["no", "yes"])
OWN_CLASSES = written(
    pa.table({"text": ["a", "b"], "label": [0, 1]}).replace_schema_metadata(
        {"huggingface": '{"info": {"features": {"label": {"names": ["No", "Yes"], "_type": "ClassLabel"}}}}'}
    )
)
PANDAS_TSV = HEAD + 'a "good" film\tno\n"a ""bad"" film"\tyes\n'
MANY_LABELS = HEAD + "".join(f"a\tl{i}\n" for i in range(99))


def parquet_case(name: str, columns: dict[str, Any], *words: str, **task: Any) -> Case:
    """A parquet file of these columns."""
    return training_file(name, "x.parquet", parquet(**columns), *words, **task)


def _dataset(name: str, /, *words: str, **dataset: Any) -> Case:
    """Keys of ``task.dataset`` changed."""

    def make(place: Place) -> None:
        place.tree["task"]["dataset"] |= dataset

    return Case(name, words, make)


def _folder_for_a_file(place: Place) -> None:
    (place.data / "folder.jsonl").mkdir()
    place.tree["task"]["dataset"]["train_file"] = "folder.jsonl"


def _unreadable(place: Place) -> None:
    """A file whose first byte cannot be read, by nobody."""
    (place.data / "x.tsv").symlink_to("/proc/self/mem")
    place.tree["task"]["dataset"]["train_file"] = "x.tsv"


def _loop(place: Place) -> None:
    (place.data / "x.tsv").symlink_to(place.data / "x.tsv")
    place.tree["task"]["dataset"]["train_file"] = "x.tsv"


def _fifo(place: Place) -> None:
    os.mkfifo(place.data / "x.tsv")
    place.tree["task"]["dataset"]["train_file"] = "x.tsv"


def _name_of_two_lines(place: Place) -> None:
    place.train_file("a\n\x1b[31mb.tsv", HEAD)


def _dev(place: Place) -> None:
    (place.data / "dev.jsonl").write_text('{"text": "a film", "label": "perhaps"}\n')


def _dev_empty(place: Place) -> None:
    (place.data / "dev.jsonl").write_text("")


def _dev_without_column(place: Place) -> None:
    (place.data / "dev.jsonl").write_text('{"text": "a film"}\n')


TEXT_FILES = [
    training_file("empty tsv", "x.tsv", "", "x.tsv", "empty", "header"),
    training_file("empty csv", "x.csv", "", "x.csv", "empty", "header"),
    training_file("empty jsonl", "x.jsonl", "\n\n", "x.jsonl", "empty", "at least one row"),
    training_file("empty array", "x.json", "[]", "x.json", "empty", "at least one row"),
    training_file("empty parquet", "x.parquet", "", "x.parquet", "cannot be read as parquet"),
    training_file("header only tsv", "x.tsv", HEAD, "x.tsv", "no rows"),
    training_file("header only csv", "x.csv", "text,label\n", "x.csv", "no rows"),
    training_file("Latin-1 tsv", "x.tsv", (TSV + "caf\xe9\tno\n").encode("latin-1"), "x.tsv, line 18", "0xe9", "UTF-8"),
    training_file("Latin-1 csv", "x.csv", "text,label\ncaf\xe9,no\n".encode("latin-1"), "x.csv, line 2", "UTF-8"),
    training_file("Latin-1 jsonl", "x.jsonl", '{"text": "caf\xe9"}'.encode("latin-1"), "x.jsonl, line 1", "UTF-8"),
    training_file("UTF-16", "x.tsv", TSV.encode("utf-16"), "x.tsv, line 1", "not UTF-8"),
    training_file("UTF-16 without a mark", "x.tsv", TSV.encode("utf-16-le"), "x.tsv, line 1", "NUL", "UTF-8"),
    training_file("NUL in a tsv", "x.tsv", TSV + "a\0b\tno\n", "x.tsv, line 18", "NUL"),
    training_file("NUL in a csv", "x.csv", CSV + "a\0b,no\n", "x.csv, line 18", "NUL"),
    training_file("NUL in a jsonl", "x.jsonl", JSONL + '{"text": "a\0b"}', "x.jsonl, line 17", "NUL"),
    training_file("ends of an old Mac", "x.tsv", TSV.replace("\n", "\r"), "x.tsv", "line end"),
    training_file(
        "a carriage return in a csv", "x.csv", CSV + "a\rb,no\n", "x.csv, line 18", "line end", "quote the field"
    ),
    training_file("ragged tsv", "x.tsv", TSV + "a film\tno\tmore\n", "x.tsv, row 17", "3 fields", "header has 2"),
    training_file("ragged csv", "x.csv", CSV + "a film\n", "x.csv, row 17", "1 fields", "header has 2"),
    training_file("a comma in a csv", "x.csv", CSV + "good, bad,no\n", "x.csv, row 17", "3 fields"),
    training_file("a tsv called csv", "x.csv", TSV.replace("good", "good, so good,"), "x.csv", "text'", "separator"),
    training_file("a csv called tsv", "x.tsv", CSV, "task.text[0]='text'", "no such column", "text,label"),
    training_file("jsonl called tsv", "x.tsv", JSONL, "task.text[0]='text'", "no such column"),
    training_file("tsv called jsonl", "x.jsonl", TSV, "x.jsonl, row 1", "not valid JSON", "one object a line"),
    training_file("tsv called parquet", "x.parquet", TSV, "x.parquet", "cannot be read as parquet", "another format"),
    training_file("tsv called gz", "x.tsv.gz", TSV, "x.tsv.gz", "cannot be read as tsv", "another format"),
    training_file("gz cut short", "x.tsv.gz", gzip.compress(os.urandom(4000))[:2000], "x.tsv.gz", "x.tsv.gz"),
    training_file("unknown format", "x.xlsx", b"PK", "x.xlsx", "unknown format", "csv, tsv, json"),
    training_file("no format", "x", TSV, "unknown format", "csv, tsv, json"),
    training_file("a quote that is not closed", "x.csv", CSV + '"a film,no\n', "x.csv, line", "quote"),
    training_file(
        "quotes as pandas writes them", "x.tsv", PANDAS_TSV, "x.tsv, row 2", "quoted", "task.dataset.quoting=double"
    ),
    training_file("a header in quotes", "x.tsv", TSV.replace("text", '"text"'), "header", "task.dataset.quoting"),
    training_file("column twice in a tsv", "x.tsv", "text\ttext\tlabel\na\tb\tno\n", "x.tsv", "'text' is there twice"),
    training_file("column twice in a csv", "x.csv", "text,label,label\na,no,no\n", "x.csv", "'label' is there twice"),
    training_file(
        "column twice in a jsonl",
        "x.jsonl",
        '{"text": "a", "text": "b", "label": "no"}',
        "x.jsonl, row 1",
        "key 'text' twice",
    ),
    training_file("no such column", "x.tsv", TSV.replace("text", "sentence"), "task.text[0]='text'", "sentence"),
    training_file(
        "no label column", "x.tsv", TSV.replace("label", "lable"), "task.label='label'", "did you mean 'lable'"
    ),
    training_file("JSON cut short", "x.jsonl", JSONL + '{"text": "a go', "x.jsonl, row 17", "not valid JSON"),
    training_file("an array cut short", "x.json", '[{"text": "a", "label": "no"},', "x.json", "not valid JSON"),
    training_file(
        "an object in many lines", "x.json", '{\n"text": "a",\n"label": "no"\n}', "x.json, row 1", "one object a line"
    ),
    training_file(
        "an object of columns",
        "x.json",
        '{"text": ["a", "b"], "label": ["no", "yes"]}',
        "x.json, row 1",
        "'text' holds a list",
    ),
    training_file("a list of lists", "x.json", '[["a", "no"]]', "x.json, row 1", "not an object"),
    training_file("a list of texts", "x.json", '["a", "b"]', "x.json, row 1", "'a' is not an object"),
    training_file("a number a line", "x.jsonl", "1\n2\n", "x.jsonl, row 1", "not an object"),
    training_file("objects without keys", "x.jsonl", "{}\n{}\n", "x.jsonl", "no columns"),
    training_file(
        "a nested text",
        "x.jsonl",
        JSONL + '{"text": {"a": 1}, "label": "no"}',
        "x.jsonl, row 17",
        "'text' holds an object",
    ),
    training_file("a nested label", "x.jsonl", JSONL + '{"text": "a", "label": ["no"]}', "x.jsonl, row 17", "label"),
    training_file(
        "several labels of a text, found in the data",
        "x.jsonl",
        "".join(f'{{"text": "a", "label": [{i % 2}]}}\n' for i in range(16)),
        "x.jsonl, row 1",
        "'label' holds a list",
        "text or a number",
        labels=None,
    ),
    training_file("deep JSON", "x.jsonl", JSONL + '{"text": ' + "[" * 10**5, "x.jsonl, row 17", "nested"),
    training_file(
        "a number of many digits",
        "x.jsonl",
        JSONL + '{"text": ' + "9" * 5000 + "}",
        "x.jsonl, row 17",
        "not valid JSON",
    ),
    training_file(
        "half a surrogate pair",
        "x.jsonl",
        JSONL + '{"text": "\\ud800", "label": "no"}',
        "x.jsonl, row 17",
        "not valid text",
    ),
    training_file(
        "half a surrogate pair in a column's name",
        "x.jsonl",
        '{"\\ud800": 1, "text": "a", "label": "no"}',
        "x.jsonl",
        "not valid text",
    ),
    training_file("a name of many lines", "x.csv", '"te\nxt",label\na,no\n', "task.text[0]='text'", "te\\nxt"),
    Case("a file's name of two lines", ("a\\n\\x1b[31mb.tsv", "no rows"), _name_of_two_lines),
]

CELLS = [
    training_file("an empty text", "x.tsv", TSV + "\tno\n", "x.tsv, row 17", "'text' is empty", "drop_empty"),
    training_file("a blank text", "x.tsv", TSV + " \u3000\tno\n", "x.tsv, row 17", "'text' is empty"),
    training_file("a missing text", "x.jsonl", JSONL + '{"label": "no"}', "x.jsonl, row 17", "'text' is empty"),
    training_file("null for a text", "x.jsonl", JSONL + '{"text": null, "label": "no"}', "x.jsonl, row 17", "empty"),
    training_file("NaN for a text", "x.jsonl", JSONL + '{"text": NaN, "label": "no"}', "x.jsonl, row 17", "empty"),
    training_file("only empty texts", "x.tsv", HEAD + "\tno\n \tyes\n", "x.tsv", "row 1", "empty"),
    training_file("an empty label", "x.tsv", TSV + "a film\t\n", "x.tsv, row 17", "'label' is empty"),
    training_file("a missing label", "x.jsonl", JSONL + '{"text": "a"}', "x.jsonl, row 17", "'label' is empty"),
    training_file("NaN for a label", "x.jsonl", JSONL + '{"text": "a", "label": NaN}', "x.jsonl, row 17", "empty"),
    training_file("an unknown label", "x.tsv", TSV + "a film\tperhaps\n", "x.tsv, row 17", "'perhaps'", "task.labels"),
    training_file("a label of another case", "x.tsv", TSV + "a film\tNo\n", "x.tsv, row 17", "'No'", "task.labels"),
    training_file("a label out of range", "x.tsv", HEAD + "a\t0\nb\t1\nc\t2\n", "x.tsv, row 3", "'2'", labels=2),
    training_file("a negative label", "x.tsv", HEAD + "a\t0\nb\t-1\n", "x.tsv, row 2", "'-1'", "0 to 1", labels=2),
    training_file("a float for a label", "x.tsv", HEAD + "a\t0\nb\t0.5\n", "x.tsv, row 2", "'0.5'", labels=2),
    training_file("names where numbers are declared", "x.tsv", TSV, "x.tsv, row 1", "'yes'", "task.labels=2", labels=2),
    training_file(
        "more labels than declared", "x.tsv", MANY_LABELS, "x.tsv, row 3", "'l2'", "99 distinct", labels=["l0", "l1"]
    ),
    training_file("a label of 10 MB", "x.tsv", TSV + f"a film\t{'x' * 10**7}\n", "x.tsv, row 17", "task.labels"),
    training_file(
        "a text for a number", "x.tsv", HEAD + "a\t1\nb\tfine\n", "x.tsv, row 2", "'fine'", "number", **REGRESSION
    ),
    training_file(
        "an infinite number", "x.tsv", HEAD + "a\t1\nb\tinf\n", "x.tsv, row 2", "'inf'", "finite", **REGRESSION
    ),
    training_file(
        "a number too large", "x.tsv", HEAD + "a\t1\nb\t1e39\n", "x.tsv, row 2", "'1e39'", "finite", **REGRESSION
    ),
    training_file(
        "NaN for a number", "x.tsv", HEAD + "a\t1\nb\tnan\n", "x.tsv, row 2", "'nan'", "finite", **REGRESSION
    ),
    training_file(
        "Infinity in JSON", "x.jsonl", '{"text": "a", "label": Infinity}', "x.jsonl, row 1", "finite", **REGRESSION
    ),
    training_file("an empty number", "x.tsv", HEAD + "a\t1\nb\t\n", "x.tsv, row 2", "'label' is empty", **REGRESSION),
    training_file("an empty target", "x.tsv", TSV + "a film\t\n", "x.tsv, row 17", "'label' is empty", **SUMMARIES),
    training_file("a nested target", "x.jsonl", '{"text": "a", "label": ["b"]}', "x.jsonl, row 1", "list", **SUMMARIES),
]

PARQUET = [
    training_file(
        "parquet cut short",
        "x.parquet",
        parquet(text=["a"] * 50, label=["no"] * 50)[:-20],
        "x.parquet",
        "cannot be read",
    ),
    training_file(
        "parquet damaged inside",
        "x.parquet",
        b"PAR1" + b"\xff" * 60 + parquet(text=["a"], label=["no"])[64:],
        "x.parquet",
    ),
    parquet_case(
        "parquet without rows",
        {"text": pa.array([], pa.string()), "label": pa.array([], pa.string())},
        "x.parquet",
        "no rows",
    ),
    training_file("parquet without columns", "x.parquet", parquet(), "x.parquet"),
    parquet_case(
        "bytes for text",
        {"text": [b"a", b"b"], "label": ["no", "yes"]},
        "x.parquet",
        "'text' holds binary",
        "must hold text",
    ),
    parquet_case(
        "dates for text",
        {"text": pa.array([1, 2], pa.timestamp("s")), "label": ["no", "yes"]},
        "x.parquet",
        "'text' holds timestamp",
        "must hold text",
    ),
    parquet_case(
        "maps for text",
        {"text": pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())), "label": ["no", "yes"]},
        "x.parquet",
        "'text' holds map",
        "must hold text",
    ),
    parquet_case(
        "structs for labels",
        {"text": ["a", "b"], "label": [{"a": 1}, {"a": 2}]},
        "x.parquet",
        "'label' holds struct",
        "text or a number",
    ),
    training_file(
        "own classes of another case", "x.parquet", OWN_CLASSES, "x.parquet", "'No', 'Yes'", "write them as the data"
    ),
    parquet_case(
        "lists for text",
        {"text": [["a"], ["b"]], "label": ["no", "yes"]},
        "x.parquet",
        "'text' holds",
        "must hold text",
    ),
    parquet_case("nothing for text", {"text": pa.nulls(2), "label": ["no", "yes"]}, "x.parquet", "text"),
    parquet_case(
        "bytes for labels",
        {"text": ["a", "b"], "label": [b"no", b"yes"]},
        "x.parquet",
        "'label' holds binary",
        "text or a number",
    ),
    parquet_case(
        "dates for labels",
        {"text": ["a", "b"], "label": pa.array([1, 2], pa.timestamp("s"))},
        "x.parquet",
        "'label' holds timestamp",
        "text or a number",
    ),
    parquet_case(
        "lists for labels",
        {"text": ["a", "b"], "label": [[1], [2]]},
        "x.parquet",
        "'label' holds list",
        "text or a number",
    ),
    parquet_case("NaN for labels", {"text": ["a", "b"], "label": [0.0, float("nan")]}, "x.parquet, row 2", "nan"),
    parquet_case("null for labels", {"text": ["a", "b"], "label": [0, None]}, "x.parquet, row 2", "'label' is empty"),
    parquet_case("broken numbers for labels", {"text": ["a", "b"], "label": [0.0, 0.5]}, "x.parquet, row 2", "0.5"),
    parquet_case(
        "infinite targets",
        {"text": ["a", "b"], "label": [0.0, float("inf")]},
        "x.parquet, row 2",
        "inf",
        "finite",
        **REGRESSION,
    ),
    parquet_case(
        "dates for targets",
        {"text": ["a", "b"], "label": pa.array([1, 2], pa.date32())},
        "x.parquet",
        "'label' holds date32",
        **REGRESSION,
    ),
    training_file("text that is not UTF-8", "x.parquet", NOT_UTF_8, "x.parquet", "UTF"),
    training_file("columns of one name", "x.parquet", SAME_NAMES, "x.parquet", "'text' is there twice"),
]

IDS = [
    training_file(
        "an id twice",
        "x.tsv",
        "id\ttext\tlabel\n7\ta\tno\n8\tb\tno\n7\tc\tyes\n",
        "x.tsv, rows 1 and 3",
        "'7'",
        "unique",
    ),
    training_file(
        "an id of 10 MB twice", "x.tsv", "id\ttext\tlabel\n" + f"{'7' * 10**7}\ta\tno\n" * 2, "x.tsv, rows 1 and 2"
    ),
    training_file("no id", "x.tsv", "id\ttext\tlabel\n7\ta\tno\n\tb\tno\n", "x.tsv, row 2", "'id' is empty"),
    training_file(
        "ids that are lists",
        "x.parquet",
        parquet(id=[[1], [2]], text=["a", "b"], label=["no", "yes"]),
        "task.dataset.id_column",
        "plain",
    ),
    training_file(
        "ids that are bytes",
        "x.parquet",
        parquet(id=[b"\xff", b"b"], text=["a", "b"], label=["no", "yes"]),
        "task.dataset.id_column",
    ),
    training_file(
        "a column of the name of ours",
        "x.tsv",
        "sample_id\ttext\tlabel\n7\ta\tno\n",
        "sample_id",
        "task.dataset.id_column",
    ),
]
for number, case in enumerate(IDS[:-1]):
    IDS[number] = Case(
        case.name, case.words, lambda p, make=case.make: (make(p), p.tree["task"]["dataset"].update(id_column="id"))
    )  # type: ignore[misc]

ONE_CLASS = HEAD + "a\tno\nb\tno\n"
WEIGHTS = "text\tlabel\tw\na\tno\t1\nb\tyes\t-1\n"


def _excluding(name: str, content: str, *words: str) -> Case:
    """A file of ids to leave out."""

    def make(place: Place) -> None:
        (place.folder / "out.txt").write_text(content)
        place.tree["task"]["dataset"]["exclude"] = "out.txt"

    return Case(name, words, make)


def _weighted(place: Place) -> None:
    place.train_file("x.tsv", WEIGHTS)
    place.tree["task"]["dataset"]["weight"] = "w"


def _broken_part(place: Place) -> None:
    (place.data / "p-1.tsv").write_text(TSV)
    (place.data / "p-2.tsv").write_text(HEAD + "a film\tno\na film\tperhaps\n")
    place.tree["task"]["dataset"]["train_file"] = "p-*.tsv"


def _several_dev_sets(place: Place) -> None:
    place.tree["task"]["dataset"]["dev_file"] = {"one": "dev.jsonl", "two": "dve.jsonl"}


LEFT_TO_THE_DATA = [
    training_file("one class", "x.tsv", ONE_CLASS, "task.label='label'", "holds 1 class", "two", labels=None),
    training_file("texts for classes", "x.tsv", MANY_LABELS, "task.label", "99 different values", labels=None),
    _excluding("an id that is nobody's", "3\nx\n", "task.dataset.exclude='out.txt'", "'x'", "task.dataset.id_column"),
    _excluding("no ids to leave out", "\n", "task.dataset.exclude='out.txt'", "no ids"),
    _excluding("nothing is left", "\n".join(map(str, range(48))), "task.dataset.exclude='out.txt'", "leaves no row"),
    Case("a negative weight", ("x.tsv, row 2", "'-1'", "task.dataset.weight"), _weighted),
    Case("an unknown label in a part", ("p-2.tsv, row 2", "'perhaps'"), _broken_part),
    Case("no such set among several", ("task.dataset.dev_file.two='dve.jsonl'", "'dev.jsonl'"), _several_dev_sets),
]

PLACES = [
    Case("a folder in the place of a file", ("task.dataset.train_file='folder.jsonl'", "folder"), _folder_for_a_file),
    Case("a file that cannot be read", ("x.tsv", "cannot be read"), _unreadable),
    Case("a link that leads to itself", ("task.dataset.train_file='x.tsv'",), _loop),
    Case("a pipe in the place of a file", ("task.dataset.train_file='x.tsv'",), _fifo),
    _dataset("a pattern that nothing is like", "train_file='*.tsv'", "matches no file", train_file="*.tsv"),
    _dataset("a file twice", "names 'data-classification/dev.jsonl' twice", train_file=["dev.jsonl", "dev.json*"]),
    _dataset("no files", "'train_file' names no file", train_file=[]),
    _dataset("no data folder", "task.dataset.path='./nowhere'", "no such folder", path="./nowhere"),
    _dataset("a file in the place of the data folder", "task.dataset.path", "no such folder", path="config.yaml"),
    _dataset(
        "no such training file",
        "task.dataset.train_file='trian.jsonl'",
        "did you mean 'train.jsonl'",
        train_file="trian.jsonl",
    ),
    _dataset(
        "no such development file",
        "task.dataset.dev_file='dve.jsonl'",
        "did you mean 'dev.jsonl'",
        dev_file="dve.jsonl",
    ),
    _dataset("a file's name that no disk takes", "task.dataset.train_file", train_file="x" * 5000 + ".tsv"),
    _dataset("a folder's name that no disk takes", "task.dataset.path", path="x" * 5000),
    _dataset(
        "a dataset that is nowhere",
        "task.dataset.name='no/such'",
        path=None,
        train_file=None,
        dev_file=None,
        name="no/such",
    ),
    _dataset("an id column that is not there", "task.dataset.id_column='key'", "no such column", id_column="key"),
    Case("an unknown label in the development file", ("dev.jsonl, row 1", "'perhaps'"), _dev),
    Case("an empty development file", ("dev.jsonl", "empty"), _dev_empty),
    Case("a development file without labels", ("task.label='label'", "dev.jsonl"), _dev_without_column),
]

CASES = [*TEXT_FILES, *CELLS, *PARQUET, *IDS, *LEFT_TO_THE_DATA, *PLACES]
