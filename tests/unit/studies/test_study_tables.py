"""Tables of a study from its lines: every arm, paired, and into a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies.tables import put_into, report

#: arm -> value of ``tune`` and ``test`` at steps 25 and 50 of every run, and seconds of its choice
VALUES = {
    "uniform+q": ((0.5, 0.6), 0.0),
    "query": ((0.65, 0.6), 0.0),
    "oracle+q": ((0.7, 0.85), 0.0),
    "ours": ((0.7, 0.8), 5.0),
}


def write_results(folder: Path, seeds: tuple[int, ...] = (100, 0, 1), *, lean: bool = False) -> Path:
    """``lean``: the tuning seed's runs have ``tune`` alone, the others ``test`` alone."""
    lines = []
    for arm, (values, chosen_in) in VALUES.items():
        for seed in seeds if arm != "query" else seeds[:3]:
            curve = {
                str(step): {"tune": {"accuracy": v}, "test": {"accuracy": v + 0.01 * (seed % 100)}}
                for step, v in zip((25, 50), values, strict=True)
            }
            for sets in curve.values() if lean else ():
                del sets["test" if seed == 100 else "tune"]
            line = {"study": "query", "pool": "mixed", "seed": seed, "arm": arm, "lr": 1e-3, "metric": "accuracy"}
            line |= {"curve": curve, "seconds": {"training": 50.0, "scoring": chosen_in}, "extra_seconds": 0.0}
            kept = (
                {"rows": 300, "share": 0.9, "auc": 0.95} if arm == "ours" else dict.fromkeys(("rows", "share", "auc"))
            )
            lines.append(json.dumps({**line, **kept, "error": None}))
    for pool in ("mixed", "clean"):
        failed = {"study": "query", "pool": pool, "seed": 0, "arm": "rds", "lr": 1e-3, "error": "UserError: no"}
        lines.append(json.dumps(failed))
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plan = {
        "study": "query",
        "steps": 50,
        "tuning_seeds": [100],
        "left_out": [{"arm": "less", "pool": "mixed", "reason": "unknown"}],
    }
    (folder / "study.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder / "results.jsonl"


def cells(text: str, arm: str) -> list[str]:
    line = [line for line in text.splitlines() if line.startswith(f"| {arm} |")][-1]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table(tmp_path: Path) -> None:
    study, text = report(write_results(tmp_path))
    assert study == "query"
    assert "**mixed** (accuracy; seeds 0, 1)" in text
    heads = ["arm", "lr, steps", "test", "best", "less uniform+q", "less query"]
    assert cells(text, "arm")[:6] == heads
    ours = cells(text, "ours")
    assert ours[:6] == ["ours", "0.001, 50", "0.805", "0.805", "+0.200 (+0.200 to +0.200)", "+0.150 (+0.150 to +0.150)"]
    assert ours[6:8] == ["0.75 (0.75 to 0.75)", "0.75 (0.75 to 0.75)"]
    assert ours[8:] == ["+0.160 (+0.160 to +0.160)", "5.0 s, 5", "300 (90 %)", "0.95"]
    assert cells(text, "query")[1] == "0.001, 25"
    assert cells(text, "uniform+q")[4] == "-"
    assert "Not run: less (mixed): unknown." in text
    assert "Failed: rds (mixed, clean): UserError: no." in text


def test_lean_runs_have_no_best_step_of_their_own(tmp_path: Path) -> None:
    whole, lean = tmp_path / "whole", tmp_path / "lean"
    whole.mkdir()
    lean.mkdir()
    wanted, found = (report(write_results(folder, lean=folder == lean))[1] for folder in (whole, lean))
    for arm in VALUES:
        expected = cells(wanted, arm)
        expected[3] = "-"  # best
        expected[7] = "-"  # of the way, best
        assert cells(found, arm) == expected


def test_an_arm_of_too_few_seeds_is_named_and_the_others_are_paired(tmp_path: Path) -> None:
    results = write_results(tmp_path, (100, 0, 1, 2, 3, 4, 5))
    _, text = report(results)
    assert "seeds 0, 1, 2, 3, 4, 5)" in text
    assert "Too few seeds yet: query." in text


def test_into_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study query -->\nold\n<!-- end of study query -->\nafter\n", encoding="utf-8")
    put_into(page, "query", "| a |")
    put_into(page, "query", "| b |")
    assert page.read_text(encoding="utf-8") == (
        "before\n<!-- study query -->\n\n| b |\n<!-- end of study query -->\nafter\n"
    )
    with pytest.raises(SystemExit):
        put_into(page, "noise", "| a |")
