"""What keeps the house in order: sizes, names, and who may know what."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tsqlora_scale"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
#: Locals that read as riddles.
RIDDLES = {"of", "said", "room", "saved", "some", "there", "worth"}


def trees() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in MODULES]


def code_length(node: FUNCTION) -> int:
    """Lines of a function without its docstring."""
    body = node.body
    has_docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    docstring = (body[0].end_lineno or 0) - body[0].lineno + 1 if has_docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def test_modules_and_functions_are_short() -> None:
    long = [str(path) for path in MODULES if len(path.read_text().splitlines()) > 400]
    for path, tree in trees():
        long += [
            f"{path.name}: {node.name}"
            for node in ast.walk(tree)
            if isinstance(node, FUNCTION) and code_length(node) > 60
        ]
    assert not long


def test_no_two_modules_or_classes_share_a_name() -> None:
    modules = Counter(path.stem for path in MODULES if path.stem != "__init__")
    classes = Counter(node.name for _, tree in trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in (modules + classes).items() if count > 1] == []


def test_few_modules_lie_at_the_root() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 5


def test_names_are_no_riddles() -> None:
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            names = [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
            names += [node.arg] if isinstance(node, ast.arg) else []
            names += [node.name] if isinstance(node, FUNCTION) else []
            found += [f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}" for name in names if name in RIDDLES]
        found += [str(path)] if path.stem in RIDDLES else []
    assert not found


@pytest.mark.parametrize(
    ("pattern", "where", "but"),
    [
        (r"\bMETHOD\b", "", "nothing"),  # a text outside of the repository
        (r"\bds_[a-z]\w*|is_deepspeed\w*\b(?!\()|DistributedType", "", "engine"),
        (r"\bsys\.exit\(|os\._exit\(", "", "commands"),
    ],
)
def test_who_may_know_what(pattern: str, where: str, but: str) -> None:
    allowed = {PACKAGE / "common" / "failures.py"} if but == "commands" else set()
    found = [
        f"{path.relative_to(PACKAGE)}: {match[0]}"
        for path in MODULES
        if path not in allowed and path.relative_to(PACKAGE).parts[0] != but
        for match in re.finditer(pattern, path.read_text())
    ]
    assert not found


def test_no_test_module_imports_another() -> None:
    found = []
    for path in TESTS:
        for match in re.finditer(r"(?m)^\s*(?:from|import) (tests\.[\w.]+)(?: import (.*))?", path.read_text()):
            parts = [*match[1].split("."), *re.findall(r"\w+", match[2] or "")]
            if any(part.startswith("test_") or part == "conftest" for part in parts[1:]):
                found.append(f"{path}: {match[0].strip()}")
    assert not found


def test_policies_and_selectors_are_chosen_by_the_config() -> None:
    """No test and no benchmark puts one in by hand."""
    pattern = re.compile(
        r"(?m)^\s*[\w.]+\.(policy|selector)\s*=[^=]|setattr\([^)]*(Policy|Selector)\b[^)]*\"(plan|__init__)\""
    )
    found = [
        f"{path}: {match[0]}"
        for path in [*TESTS, *sorted((ROOT / "benchmarks").glob("*.py"))]
        for match in pattern.finditer(path.read_text())
    ]
    assert not found
