"""Selectors that do not fit the task, and files of scores and lists that are wrong."""

from __future__ import annotations

from typing import Any

from tests.bad_input.place import Case, Place, settings

ROWS = 48


def _file(name: str, content: str | bytes, *words: str, file: str = "scores.csv", **sampling: Any) -> Case:
    """``sampling.file`` of these contents."""

    def make(place: Place) -> None:
        path = place.folder / file
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        place.set(sampling={"selector": "file", "file": file, "keep_fraction": 0.5} | sampling)

    return Case(name, words, make)


def _scores(**changed: str | None) -> str:
    """A score for every sample; ``row_3="x"`` changes that of the fourth, None leaves it out."""
    cells = {str(row): "0.5" for row in range(ROWS)} | {
        name.removeprefix("row_"): cell for name, cell in changed.items()
    }
    return "id,score\n" + "".join(f"{row},{cell}\n" for row, cell in cells.items() if cell is not None)


FITS = [
    settings(
        "less without a query", "'sampling.selector: less'", "'task.query'", "not set", sampling={"selector": "less"}
    ),
    settings("a query's selector without one", "'sampling.selector: rds'", "name a file", sampling={"selector": "rds"}),
    settings(
        "errors of texts",
        "'sampling.selector: el2n'",
        "classes",
        "'seq2seq'",
        "choose another",
        sampling={"selector": "el2n"},
        task={"type": "seq2seq", "source": "text", "target": "label", "metrics": ["rouge1"]},
    ),
    settings(
        "a choice of an unknown size",
        "'selector: k_center'",
        "'keep_fraction'",
        "number",
        sampling={"selector": "k_center", "keep_fraction": "auto"},
    ),
    settings(
        "rounds of an unknown size",
        "'selector: rs2'",
        "'keep_fraction'",
        sampling={"selector": "rs2", "keep_fraction": "auto"},
    ),
    settings(
        "gradients of DoRA",
        "'sampling.selector: grad_norm'",
        "dora",
        adapter={"type": "dora"},
        sampling={"selector": "grad_norm"},
        allocation={"policy": "fixed"},
    ),
    settings(
        "a proxy for another selector",
        "'scoring.proxy_model'",
        "'grad_norm'",
        "null",
        scoring={"proxy_model": "x", "refresh": "none"},
        sampling={"selector": "grad_norm"},
    ),
    settings("weights twice", "'use: weight'", "'unbiased: true'", sampling={"use": "weight", "unbiased": True}),
    settings(
        "weights of a choice that has none",
        "'sampling.use: weight'",
        "'sampling.selector: el2n' has none",
        sampling={"selector": "el2n", "keep_fraction": 0.5, "use": "weight"},
    ),
    settings(
        "weights of even draws by a query",
        "'sampling.use: weight'",
        "'sampling.selector: query' with 'soft: false' has none",
        task={"query": "query.jsonl"},
        sampling={"selector": "query", "soft": False, "use": "weight"},
    ),
    settings("an unknown use", "sampling.use='both'", "'draw' or 'weight'", sampling={"use": "both"}),
    settings(
        "moments before any step",
        "'sampling.less_gradients: adam'",
        "'scoring.warmup_steps: 0'",
        "less_gradients: plain",
        task={"query": "query.jsonl"},
        sampling={"selector": "less", "keep_fraction": 0.5, "less_gradients": "adam"},
        scoring={"warmup_steps": 0},
    ),
    settings("an unknown form of less", "sampling.less='min'", "round_robin", sampling={"less": "min"}),
    settings("a selector of no file", "'selector: file'", "not set", sampling={"selector": "file"}),
    settings("a file for nobody", "'file' is read by 'selector: file' alone", "'quality'", sampling={"file": "x.csv"}),
    settings(
        "a share for what skips by itself",
        "'selector: infobatch'",
        "'keep_fraction' is 0.5",
        "auto",
        sampling={"selector": "infobatch", "keep_fraction": 0.5},
    ),
    settings("an unknown selector", "'lass' is none of", "'less'", "FILE.py:NAME", sampling={"selector": "lass"}),
    settings(
        "no such file of scores",
        "sampling.file='x.csv'",
        "no such file",
        sampling={"selector": "file", "file": "x.csv"},
    ),
    settings(
        "epochs over a list",
        "'train.epochs'",
        "'sampling.keep_fraction: auto'",
        train={"max_steps": None, "epochs": 1.0},
        sampling={"selector": "file", "file": "x.csv", "keep_fraction": "auto"},
    ),
]
CONTENTS = [
    _file(
        "a score is missing",
        _scores(row_7=None, row_9=None),
        "sampling.file='scores.csv'",
        "2 of the pool's 48",
        "('7', '9')",
        "task.dataset.exclude",
    ),
    _file("a score is a word", _scores(row_3="good"), "scores.csv, row 4", "score 'good'", "finite number"),
    _file("a score is not finite", _scores(row_3="nan"), "scores.csv, row 4", "nan", "finite number"),
    _file("a score is empty", _scores(row_0=""), "scores.csv, row 1", "finite number"),
    _file("an id twice", _scores() + "5,1\n", "scores.csv, row 49", "5", "twice"),
    _file("an empty id", _scores() + " ,1\n", "scores.csv, row 49", "id is empty"),
    _file("scores without ids", "score\n1\n", "scores.csv", "no column 'sample_id' or 'id'"),
    _file(
        "scores of no size",
        _scores(),
        "sampling.file='scores.csv'",
        "has scores",
        "keep_fraction",
        keep_fraction="auto",
    ),
    _file("a share of a list", "1\n2\n", "sampling.keep_fraction=0.5", "'list.txt'", "auto", file="list.txt"),
    _file(
        "shares of labels in a list",
        "1\n2\n",
        "sampling.stratify=true",
        "'list.txt' lists what S is",
        "leave sampling.stratify at auto",
        file="list.txt",
        keep_fraction="auto",
        stratify=True,
    ),
    _file(
        "a list of unknown samples",
        "1\nx\ny\n",
        "sampling.file='list.txt'",
        "2 of its 3 ids",
        "('x', 'y')",
        file="list.txt",
        keep_fraction="auto",
    ),
    _file("an empty list", "\n \n", "sampling.file='list.txt'", "no ids", file="list.txt", keep_fraction="auto"),
    _file("a list that is not UTF-8", b"\xff\n", "list.txt", "not UTF-8", file="list.txt", keep_fraction="auto"),
    _file("scores in an unknown format", "x", "scores.doc", "unknown format", file="scores.doc"),
    _file("scores that are no parquet", "x", "scores.parquet", "parquet", file="scores.parquet"),
]

CASES = [*FITS, *CONTENTS]
