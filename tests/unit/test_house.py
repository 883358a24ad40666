"""What keeps the house in order: sizes, names, and who may know what.

Every rule is a function of a source; the last tests show that each finds what it is there to find.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tsqlora_scale"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
#: Locals that read as riddles.
RIDDLES = {"of", "said", "room", "saved", "some", "there", "worth"}
MODULE_LINES, FUNCTION_LINES, ROOT_MODULES = 400, 60, 5


def code_length(node: FUNCTION) -> int:
    """Lines of a function without its docstring and decorators."""
    first = node.body[0]
    docstring = 0
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        docstring = (first.end_lineno or 0) - first.lineno + 1
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def long_parts(source: str) -> Iterator[str]:
    """A module of too many lines, and functions of too many."""
    if len(source.splitlines()) > MODULE_LINES:
        yield f"{len(source.splitlines())} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, FUNCTION) and code_length(node) > FUNCTION_LINES:
            yield f"{node.name}, {code_length(node)} lines"


def riddles(source: str) -> Iterator[str]:
    """Locals, arguments and functions whose names say nothing."""
    for node in ast.walk(ast.parse(source)):
        names = [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
        names += [node.arg] if isinstance(node, ast.arg) else []
        names += [node.name] if isinstance(node, FUNCTION) else []
        yield from (name for name in names if name in RIDDLES)


def texts_by_locale(source: str) -> Iterator[str]:
    """Text files that are read or written in whatever encoding the machine's locale names."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(option.arg == "encoding" for option in node.keywords):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        values = [item.value for item in [*node.args, *[option.value for option in node.keywords]] if is_text(item)]
        modes = [value for value in values if set(value) <= set("rwaxtb+")]
        owner = ast.unparse(node.func).removesuffix(f".{name}")
        opens = name == "open" and owner not in ("os", "self.parts") and not any("b" in mode for mode in modes)
        if opens or name in ("read_text", "write_text"):
            yield ast.unparse(node)


def is_text(node: ast.expr) -> TypeGuard[ast.Constant]:
    """Whether it is a string."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def outside_texts(source: str) -> Iterator[str]:
    """Words for a text that is not in the repository."""
    yield from re.findall(r"\bMETHOD\b", source)


def engine_matters(source: str) -> Iterator[str]:
    """What only ``engine/`` may ask for or touch."""
    yield from re.findall(r"\bds_[a-z]\w*|is_deepspeed\w*|DistributedType|FSDPModule|DTensor", source)


def exits(source: str) -> Iterator[str]:
    """Calls that end the process, and imports that could hide one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "os._exit", "exit", "quit"):
            yield ast.unparse(node.func)
        elif isinstance(node, ast.ImportFrom) and node.module in ("sys", "os"):
            yield from (alias.name for alias in node.names if alias.name in ("exit", "_exit"))


def imports_of_tests(source: str, module: str) -> Iterator[str]:
    """Test modules that a test imports, or that a program within it does.

    Args:
        module: dotted name of the test that the source is of.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            imported = [".".join([*parents, node.module or "", alias.name]) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            imported = re.findall(r"(?m)^\s*(?:from|import)\s+(tests\b.*)$", node.value)
        for name in imported:
            if re.match(r"tests\b", name) and re.search(r"\b(test_\w+|conftest)\b", name):
                yield name


def policies_put_in_by_hand(source: str) -> Iterator[str]:
    """Assignments to an object's ``policy`` or ``selector``, to such a class or to anything of it, in programs too."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (ast.unparse(t) for t in targets if isinstance(t, ast.Attribute) and _of_policy(ast.unparse(t)))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("setattr", "object"):
            if _of_policy(target := _patched(node.args)):
                yield target
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from filter(_of_policy, re.findall(r"(?m)^\s*([\w.]+\.\w+) = ", node.value))


def _patched(arguments: list[ast.expr]) -> str:
    """What ``setattr(owner, "name", …)`` or ``setattr("dotted.name", …)`` changes."""
    if isinstance(arguments[0], ast.Constant):
        return str(arguments[0].value)
    return ".".join(str(one.value) if isinstance(one, ast.Constant) else ast.unparse(one) for one in arguments[:2])


def _of_policy(target: str) -> bool:
    """Whether the last or the last but one part of a dotted name is a policy or a selector, object or class.

    ``self.policy = …`` is an object's own affair.
    """
    if target.startswith("self."):
        return False
    return any(re.fullmatch(r"_?(policy|selector)|\w*(Policy|Selector)", part) for part in target.split(".")[-2:])


def sources(paths: list[Path]) -> list[tuple[str, str]]:
    """Paths from the root and contents, this test aside."""
    return [(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths if path != Path(__file__)]


def test_modules_and_functions_are_short() -> None:
    assert [f"{path}: {part}" for path, source in sources(MODULES) for part in long_parts(source)] == []


def test_no_two_modules_or_classes_share_a_name() -> None:
    modules = Counter(path.stem for path in MODULES if path.stem != "__init__")
    classes = Counter(
        node.name
        for _, source in sources(MODULES)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in [*modules.items(), *classes.items()] if count > 1] == []


def test_few_modules_lie_at_the_root() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_MODULES


def test_names_are_no_riddles() -> None:
    assert [path for path in MODULES if path.stem in RIDDLES] == []
    assert [f"{path}: {name}" for path, source in sources(MODULES) for name in riddles(source)] == []


def test_text_files_are_utf_8() -> None:
    paths = [*MODULES, *BENCHMARKS, *sorted((ROOT / "launch").glob("*.py")), *sorted((ROOT / "docs").glob("*.py"))]
    assert [f"{path}: {call}" for path, source in sources(paths) for call in texts_by_locale(source)] == []


def test_nothing_cites_a_text_outside_of_the_repository() -> None:
    assert [path for path, source in sources(MODULES) if list(outside_texts(source))] == []


def test_only_the_engine_knows_its_library() -> None:
    found = [f"{path}: {name}" for path, source in sources(MODULES) for name in engine_matters(source)]
    assert [line for line in found if not line.startswith("tsqlora_scale/engine/")] == []


def test_only_commands_end_the_process() -> None:
    found = [f"{path}: {name}" for path, source in sources(MODULES) for name in exits(source)]
    may = ("tsqlora_scale/commands/", "tsqlora_scale/common/failures.py")
    assert [line for line in found if not line.startswith(may)] == []


def test_no_test_module_imports_another() -> None:
    found = []
    for path, source in sources(TESTS):
        module = path.removesuffix(".py").replace("/", ".")
        found += [f"{path}: {name}" for name in imports_of_tests(source, module)]
    assert found == []


def test_policies_and_selectors_are_chosen_by_the_config() -> None:
    """No test and no benchmark puts one in by hand."""
    found = [
        f"{path}: {name}" for path, source in sources(TESTS + BENCHMARKS) for name in policies_put_in_by_hand(source)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (long_parts, "x = 1\n" * 401),
        (long_parts, "def f():\n" + "    x = 1\n" * 60),
        (riddles, "said = 1"),
        (riddles, "def f(room): pass"),
        (texts_by_locale, "path.read_text()"),
        (texts_by_locale, "path.write_text(text)"),
        (texts_by_locale, "with open(path) as file: pass"),
        (texts_by_locale, 'path.open("a")'),
        (texts_by_locale, 'gzip.open(path, mode="rt")'),
        (outside_texts, '"""As METHOD 3 says."""'),
        (engine_matters, "shape = parameter.ds_shape"),
        (engine_matters, "if is_deepspeed_zero3_enabled(): pass"),
        (engine_matters, "if engine.is_deepspeed: pass"),
        (exits, "sys.exit(2)"),
        (exits, "from os import _exit"),
        (policies_put_in_by_hand, "run.policy = Mine()"),
        (policies_put_in_by_hand, "build.TsqLoraPolicy = lambda config: Mine()"),
        (policies_put_in_by_hand, "TsqLoraPolicy.plan = mine"),
        (policies_put_in_by_hand, 'monkeypatch.setattr(QualitySelector, "score", mine)'),
        (policies_put_in_by_hand, 'patch.setattr("tsqlora_scale.ranks.policies.tsqlora.TsqLoraPolicy.plan", mine)'),
        (policies_put_in_by_hand, 'PROGRAM = """\nimport build\nbuild.TsqLoraPolicy = Mine\n"""'),
    ],
)  # fmt: skip
def test_a_rule_finds_what_it_is_there_to_find(rule: object, source: str) -> None:
    assert callable(rule)
    assert list(rule(source))


@pytest.mark.parametrize(
    "source",
    [
        "import tests.unit.test_other",
        "from tests.unit.test_other import tree",
        "from tests.unit import (\n    helper,\n    test_other,\n)",
        "from . import test_other",
        "from .test_other import tree",
        "from ..e2e.test_other import tree",
        "from tests.conftest import folder",
        'PROGRAM = f"""\nimport sys\nfrom tests.unit.test_other import tree\n"""',
    ],
)
def test_an_import_of_a_test_is_found(source: str) -> None:
    assert list(imports_of_tests(source, "tests.unit.test_this"))


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (long_parts, "def f():\n    '''" + "long\n" * 70 + "'''\n" + "    x = 1\n" * 50),
        (texts_by_locale, 'path.open("rb")\nos.open(path, flags)\npath.read_text(encoding="utf-8")\npath.read_bytes()'),
        (engine_matters, "ids_of = 1"),
        (exits, "system.exit_code(2)"),
        (policies_put_in_by_hand, "self.policy = policy\npolicy = make()\nassert run.policy == 1"),
        (policies_put_in_by_hand, 'monkeypatch.setattr(BatchSampler, "draw", mine)'),
    ],
)
def test_a_rule_leaves_the_rest_alone(rule: object, source: str) -> None:
    assert callable(rule)
    assert not list(rule(source))
