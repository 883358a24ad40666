"""Local files: every format, exactly as written, and every way to be malformed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks.rows import file_limits
from tsqlora_scale.tasks.rows.readers import read_tables
from tsqlora_scale.tasks.rows.wanted import Wanted

Write = Callable[[str, "str | bytes"], Path]
ROWS = [{"text": 'a lone " quote', "label": "1"}, {"text": "NA", "label": "null"}, {"text": "", "label": "été"}]


EVERYTHING = Wanted({}, others=True)


def read(
    path: Path, names: list[str] | None = None, text: tuple[str, ...] = (), **options: Any
) -> list[dict[str, str]]:
    wanted = Wanted({}, {f"task.text[{i}]": name for i, name in enumerate(text)}, others=True)
    return pa.concat_tables(read_tables(path, wanted, column_names=names, **options)).to_pylist()


TSV = "\n".join(["text\tlabel", *(f"{r['text']}\t{r['label']}" for r in ROWS)]) + "\n"
CSV = 'text,label\n"a lone "" quote",1\nNA,null\n"",été\n'
JSONL = "\n".join(json.dumps(row) for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.tsv", TSV),
        ("x.tsv.gz", TSV),
        ("X.TSV", TSV.replace("\n", "\r\n")),
        ("x.csv", CSV),
        ("x.csv.gz", CSV.rstrip("\n")),
        ("x.jsonl", JSONL),
        ("x.jsonl.gz", JSONL.replace("\n", "\n\n")),
        ("x.json", json.dumps(ROWS, indent=2)),
        ("x.json", JSONL),
        ("x.tsv", "\ufeff" + TSV),
        ("x.jsonl", "\ufeff" + JSONL),
    ],
)
def test_text_formats_keep_every_cell(write: Write, name: str, content: str) -> None:
    assert read(write(name, content)) == ROWS


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    rows = [{"text": "", "label": 1, "x": None}, {"text": "NA", "label": 0, "x": 2.5}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == rows


def test_a_lone_quote_swallows_nothing_in_a_tsv(write: Write) -> None:
    lines = [f'"sentence {i}\t{i % 2}' if i % 3 == 0 else f"sentence {i}\t{i % 2}" for i in range(100)]
    rows = read(write("x.tsv", "\n".join(["text\tlabel", *lines])))
    assert [f"{r['text']}\t{r['label']}" for r in rows] == lines


def test_a_lone_quote_is_an_error_in_a_csv(write: Write) -> None:
    swallowed = 'text,label\n"good film,1\nbad film,0\n"fine,1\n'
    with pytest.raises(UserError, match=r"x.csv, line 4: .*double the quote inside, or save the file as tsv"):
        read(write("x.csv", swallowed))
    with pytest.raises(UserError, match=r"x.csv, line 3: unexpected end of data"):
        read(write("x.csv", 'text,label\n"good film,1\nbad film,0\n'))


def test_csv_values_may_hold_separators_and_long_documents(write: Write) -> None:
    document = "word, and\nline\n" * 20_000
    rows = read(write("x.csv", f'text,label\n"{document}",1\nshort,0\n'))
    assert [r["text"] for r in rows] == [document, "short"]


def test_separators_of_unicode_do_not_end_a_line(write: Write) -> None:
    text = "one\u2028two\x85three\x0bfour"
    assert read(write("x.tsv", f"text\tlabel\n{text}\t1\n"))[0]["text"] == text
    assert read(write("x.jsonl", json.dumps({"text": text}, ensure_ascii=False)))[0]["text"] == text


def test_headerless_files(write: Write) -> None:
    path = write("x.tsv", "gj04\t1\t\tOur friends.\nks08\t0\t*\tFriends our.")
    rows = read(path, ["source", "label", "note", "sentence"])
    assert [(r["label"], r["note"], r["sentence"]) for r in rows] == [
        ("1", "", "Our friends."),
        ("0", "*", "Friends our."),
    ]


def test_json_values_become_text(write: Write) -> None:
    rows = '{"a": 1, "b": 2.50, "c": true, "d": null, "e": [1, "é"]}\n{"a": "x", "late": 1}'
    first, second = read(write("x.jsonl", rows))
    assert first == {"a": "1", "b": "2.5", "c": "true", "d": None, "e": '[1, "é"]', "late": None}
    assert second["a"] == "x"
    assert second["late"] == "1"


def test_files_of_many_chunks(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_limits, "CHUNK_ROWS", 7)
    path = write("x.jsonl", "\n".join(json.dumps({"i": i}) for i in range(50)))
    tables = list(read_tables(path, EVERYTHING))
    assert [len(t) for t in tables] == [7] * 7 + [1]
    assert [r["i"] for t in tables for r in t.to_pylist()] == [str(i) for i in range(50)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", "a", r"x.txt: unknown format; use csv, tsv, json"),
        ("x.parquet.gz", "a", r"unknown format"),
        ("x.tsv", "", r"x.tsv: the file is empty; it needs a header"),
        ("x.csv", "\n\n", r"x.csv: the file is empty"),
        ("x.jsonl", " \n", r"x.jsonl: the file is empty"),
        ("x.json", "[]", r"x.json: the file is empty"),
        ("x.tsv", "text\tlabel\n", r"x.tsv: the file holds no rows"),
        ("x.tsv", "a\ta\n1\t2\n", r"x.tsv: the column 'a' is there twice"),
        ("x.tsv", "a\tb\n1\t2\n3\n", r"x.tsv, row 2: 1 fields where the header has 2 \(a, b\); mend"),
        ("x.csv", "a,b\n1,2,3\n", r"x.csv, row 1: 3 fields where the header has 2"),
        ("x.tsv", b"a\tb\n1\t2\n3\tcaf\xe9\n", r"x.tsv, line 3: not UTF-8 text \(byte 0xe9\); save the file as UTF-8"),
        ("x.csv", "a,b\n1,2\n".encode("utf-16"), r"x.csv, line 1: not UTF-8 text"),
        ("x.jsonl", b'{"a": "\xff"}', r"x.jsonl, line 1: not UTF-8"),
        ("x.jsonl", '{"a": 1}\n\n{"a": 2', r"x.jsonl, row 2: not valid JSON"),
        ("x.jsonl", '{"a": 1}\n[1]', r"x.jsonl, row 2: \[1\] is not an object of column names"),
        ("x.json", '[{"a": 1}, 5]', r"x.json, row 2: 5 is not an object"),
        ("x.json", '[{"a": 1},', r"x.json: not valid JSON"),
        ("x.jsonl", '{"a": "\\ud800"}', r"x.jsonl, row 1: not valid text"),
        (
            "x.jsonl",
            '{"a": "x"}\n{"a": ["x"]}',
            r"x.jsonl, row 2: column 'a' holds a list; it must hold text or a number",
        ),
        ("x.jsonl", '{"a\\u0000": 1}', r"x.jsonl: the name of column 'a\\x00' holds a NUL character; rename it"),
        ("x.parquet", "no parquet", r"x.parquet: cannot be read as parquet: "),
    ],
)
def test_malformed_files(write: Write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write(name, content), text=("a",))


def test_wrong_number_of_column_names(write: Write) -> None:
    with pytest.raises(UserError, match=r"row 1: 2 fields where task.dataset.column_names gives 3 \(a, b, c\)"):
        read(write("x.tsv", "1\t2\n"), ["a", "b", "c"])


def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv.gz"
    path.write_bytes(gzip.compress(TSV.encode() * 50)[:60])
    with pytest.raises(UserError, match=r"x.tsv.gz: cannot be read as tsv: "):
        read(path)
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"x.tsv.gz: cannot be read as tsv: "):
        read(path)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n\0")), min_size=1))
def test_any_text_survives_a_tsv(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("tsv") / "x.tsv"
    path.write_bytes("\n".join(["text\tend", *(f"{t}\t." for t in texts)]).encode())
    assert [r["text"] for r in read(path, quoting="none")] == texts


@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.jsonl", "x.jsonl.gz"])
def test_long_lines_are_read_in_bounded_tables(write: Write, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table ends after so many characters, however few rows they are."""
    texts = [letter * 10**6 for letter in "abcdefg"]
    lines = [json.dumps({"text": text}) if "json" in name else text for text in texts]
    path = write(name, "\n".join(lines if "json" in name else ["text", *lines]))
    monkeypatch.setattr(file_limits, "CHUNK_CHARACTERS", 2 * 10**6)
    tables = list(read_tables(path, EVERYTHING))
    assert [len(table) for table in tables] == [2, 2, 2, 1]
    assert [row["text"] for table in tables for row in table.to_pylist()] == texts


def test_a_line_of_10_megabytes(write: Write) -> None:
    text = "word " * 2 * 10**6
    assert read(write("x.tsv", f"text\tlabel\n{text}\t1\n")) == [{"text": text, "label": "1"}]


@pytest.mark.parametrize(
    ("name", "limit"), [("x.tsv", "MOST_IN_A_LINE"), ("x.csv", "MOST_IN_A_LINE"), ("x.jsonl", "MOST_IN_JSON")]
)
def test_a_line_without_an_end(write: Write, name: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a compressed file may hold: it is not read to its end."""
    monkeypatch.setattr(file_limits, limit, 2**20)
    with pytest.raises(UserError, match=rf"{name}.gz, line 1: longer than 1 MiB"):
        read(write(f"{name}.gz", b"x" * (2**20 + 1)))
    if name == "x.csv":
        with pytest.raises(UserError, match=r"line \d+: field larger"):
            read(write(name, '"' + ("x" * 999 + "\n") * 1100))


def test_missing_values_of_other_writers(write: Write) -> None:
    """NaN, as Python's writers spell a missing value in JSON; numbers that are none stay what they are."""
    rows = read(write("x.jsonl", '{"a": NaN, "b": [NaN]}\n{"a": 1, "b": -Infinity}\n'))
    assert rows == [{"a": None, "b": "[null]"}, {"a": "1", "b": "-Infinity"}]


def test_texts_by_number(tmp_path: Path) -> None:
    """As pandas writes categories."""
    column = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    (table,) = read_tables(tmp_path / "x.parquet", EVERYTHING)
    assert table.schema.field("text").type == pa.string()
    assert table["text"].to_pylist() == ["a", "b", "a"]


def test_bytes_that_are_no_text_are_found_while_reading(tmp_path: Path) -> None:
    """In any column that is read; parquet's own reader takes them as they are."""
    column = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": ["a", "b"], "notes": column}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read as parquet: .*Invalid UTF8"):
        read(tmp_path / "x.parquet", text=("text",))
    (table,) = read_tables(tmp_path / "x.parquet", Wanted({"task.text[0]": "text"}))
    assert table.to_pydict() == {"text": ["a", "b"]}


def test_a_column_that_comes_late(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not dropped; one of the first rows is in every row."""
    monkeypatch.setattr(file_limits, "CHUNK_ROWS", 3)
    lines = ['{"a": 1}', '{"a": 2}', '{"a": 3, "b": "x"}', '{"a": 4}', '{"b": "y"}']
    assert [row["b"] for row in read(write("x.jsonl", "\n".join(lines)))] == [None, None, "x", None, "y"]
    lines.append('{"a": 6, "c": "lost"}')
    for name, content in (("x.jsonl", "\n".join(lines)), ("x.json", f"[{','.join(lines)}]")):
        with pytest.raises(UserError, match=rf"{name}, row 6: key 'c' is in none of the first 3 rows"):
            read(write(name, content))


def test_an_array_without_an_end(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many lines, each of them short."""
    monkeypatch.setattr(file_limits, "MOST_IN_JSON", 2**20)
    rows = [{"a": "x" * 1000}] * 1000
    assert len(read(write("x.json", json.dumps(rows, indent=1)))) == 1000
    content = (b"[\n" + b'{"a": "' + b"x" * 1000 + b'"},\n' * 1) + b'{"a": "x"},\n' * 2**17
    with pytest.raises(UserError, match=r"x.json.gz: an array longer than 1 MiB; write one object a line"):
        read(write("x.json.gz", content))


PANDAS = 'text\tlabel\n"a ""good"" film"\tyes\nplain\tno\n"one\ttwo"\tno\n"two\nlines"\tyes\n'


def test_a_tsv_as_pandas_writes_it(write: Write) -> None:
    """It is told apart from one whose quotes are characters, and read as it is meant once the user says so."""
    path = write("x.tsv", PANDAS)
    with pytest.raises(
        UserError, match=r"x.tsv, row 1: the field '\"a \"\"good.*set task.dataset.quoting=double .*or =none"
    ):
        read(path)
    rows = read(path, quoting="double")
    assert [row["text"] for row in rows] == ['a "good" film', "plain", "one\ttwo", "two\nlines"]
    assert read(write("x.tsv", PANDAS[:40]), quoting="none")[0]["text"] == '"a ""good"" film"'


@pytest.mark.parametrize("content", ['"text"\t"label"\n"a"\t"yes"\n', 'text\tlabel\na\tno\n"""all"""\tno\n'])
def test_other_tsv_files_with_quotes(write: Write, content: str) -> None:
    with pytest.raises(UserError, match=r"x.tsv, (the header|row 2): the field .* set task.dataset.quoting=double"):
        read(write("x.tsv", content))


def test_a_quoted_tab_in_a_tsv_is_hinted_at(write: Write) -> None:
    with pytest.raises(UserError, match=r"row 1: 3 fields where the header has 2.*task.dataset.quoting=double"):
        read(write("x.tsv", 'text\tlabel\n"one\ttwo"\tno\n'))


def test_a_csv_without_quoting(write: Write) -> None:
    path = write("x.csv", 'text,label\n"good film,1\n5" disk,0\n')
    with pytest.raises(UserError, match=r"task.dataset.quoting=none"):
        read(path)
    assert [row["text"] for row in read(path, quoting="none")] == ['"good film', '5" disk']


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_columns_without_a_name_that_nobody_reads(write: Write, name: str) -> None:
    """pandas' row numbers, an empty column of a spreadsheet, two notes."""
    content = ",,text,label,note,note\n0,,good,yes,a,b\n1,,bad,no,c,d\n"
    path = write(name, content if name == "x.csv" else content.replace(",", "\t"))
    wanted = Wanted({"task.text[0]": "text", "task.label": "label"})
    (table,) = read_tables(path, wanted)
    assert table.to_pydict() == {"text": ["good", "bad"], "label": ["yes", "no"]}
    with pytest.raises(UserError, match="the column 'note' is there twice"):
        list(read_tables(path, Wanted({"task.text[0]": "note"})))


def test_what_an_unread_column_of_json_holds(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is not in the first rows."""
    monkeypatch.setattr(file_limits, "CHUNK_ROWS", 1)
    path = write("x.jsonl", '{"text": "a", "n": [1]}\n{"text": "b", "late": {"x": "\\ud800"}}\n')
    tables = list(read_tables(path, Wanted({"task.text[0]": "text"})))
    assert [row for table in tables for row in table.to_pylist()] == [{"text": "a"}, {"text": "b"}]


def test_a_column_that_may_be_empty_comes_in_any_row(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind the rows by which the columns are told; one that never comes is named."""
    monkeypatch.setattr(file_limits, "CHUNK_ROWS", 3)
    rows = [{"ask": "a", "say": "b"} for _ in range(5)] + [{"ask": "a", "say": "b", "more": "c"}]
    path = write("x.jsonl", "\n".join(map(json.dumps, rows)))
    required = {"task.source": "ask", "task.target": "say", "task.input": "more"}
    found = pa.concat_tables(read_tables(path, Wanted(required))).to_pylist()
    assert [row["more"] for row in found] == [None] * 5 + ["c"]
    with pytest.raises(UserError, match=r"task\.input='nore': no such column in .*x.jsonl; .* has: ask, say"):
        list(read_tables(path, Wanted(required | {"task.input": "nore"})))
    with pytest.raises(UserError, match=r"task\.target='more': no such column"):
        list(read_tables(path, Wanted({"task.source": "ask", "task.target": "more"})))
