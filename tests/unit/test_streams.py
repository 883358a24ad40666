"""No command dies of printing: not of characters that the output lacks, not of a reader that has left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT
from tests.runs import run_tree, write_config

TABLES = """
import sys
from tsqlora_scale.common.streams import take_whatever_is_printed
take_whatever_is_printed()
take_whatever_is_printed()
from tsqlora_scale.report.score_tables import print_scores
entry = {"sample_id": "имя", "text": "фильм 映画 größe " * 9, "answer": "да", "quality": 1, "convergence": 1, "loss": 1}
print_scores({
    "scored": 1, "pool": 1, "warm-up steps": 0, "quantiles": [0.5], "distribution": {"loss": [1.0]},
    "best": [entry] * 2000,
}, "runs/имя/scores")
print("stderr: имя", file=sys.stderr)
"""
#: A machine without UTF-8 anywhere.
NO_UTF_8 = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNDEFAULTENCODING": "0", **variables}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", None])
def test_characters_that_the_output_lacks_are_escaped(encoding: str | None) -> None:
    variables = NO_UTF_8 if encoding is None else {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-"],
        input=TABLES.encode(),
        env=environment(**variables),
        capture_output=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    said = done.stdout.decode(encoding or "ascii")
    name = "имя" if encoding == "utf-8" else r"\u0438\u043c\u044f"
    assert f"scores: runs/{name}/scores" in "".join(said.splitlines())
    assert f"stderr: {name}" in done.stderr.decode(encoding or "ascii")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("closes", ["stdout", "stderr"])
def test_a_reader_that_has_left_ends_nothing(closes: str, unbuffered: str) -> None:
    program = TABLES.replace('print("stderr: имя", file=sys.stderr)', "print('x' * 10**6, file=sys.stderr, flush=True)")
    program += "print('to the end', flush=True); print('to the end', file=sys.stderr)"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(PYTHONUNBUFFERED=unbuffered),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        closed, other = process.stdout, process.stderr
        if closes == "stderr":
            closed, other = other, closed
        closed.close()
        said = other.read().decode()
        assert process.wait(60) == 0, said[-1000:]
    assert said.rstrip().endswith("to the end")
    assert "BrokenPipe" not in said


def test_a_dry_run_where_nothing_is_utf_8(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", run={"name": "run", "output_dir": str(tmp_path / "ящик")})
    tree["task"]["labels"] = ["нет", "да"]
    for path in (tmp_path / "data-classification").iterdir():
        text = path.read_text(encoding="utf-8").replace('"no"', '"нет"').replace('"yes"', '"да"')
        path.write_text(text, encoding="utf-8")
    config = write_config(tmp_path / "config.yaml", tree)
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(config), "--dry-run"]
    done = subprocess.run(
        command, env=environment(**NO_UTF_8), capture_output=True, text=True, encoding="ascii", check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "steps: 13" in done.stdout
    again = [*command, "task.labels=[ж]"]
    done = subprocess.run(
        again, env=environment(**NO_UTF_8), capture_output=True, text=True, encoding="ascii", check=False, timeout=200
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")


@pytest.mark.slow
def test_scoring_where_nothing_is_utf_8(tmp_path: Path, models_dir: Path) -> None:
    """The whole pass, its tables and its files."""
    tree = run_tree("bert", tmp_path, models_dir, "run")
    path = tmp_path / "data-classification" / "train.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("film", "фильм"), encoding="utf-8")
    config = write_config(tmp_path / "config.yaml", tree)
    command = [sys.executable, str(ROOT / "launch" / "score.py"), "--config", str(config)]
    done = subprocess.run(
        command, env=environment(**NO_UTF_8), capture_output=True, text=True, encoding="ascii", check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert r"\u0444" in done.stdout
