"""Nothing in the package runs what a file says: no pickles, no unsafe YAML, no shell, no code of a model unasked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tsqlora_scale

PACKAGE = Path(tsqlora_scale.__file__).parent
PICKLING = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "_pickle"}
#: Collectives that pickle; between the ranks of one run, which trust each other, in one module.
OBJECT_COLLECTIVES = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
ALLOWED = {"engine/collectives.py"}
#: Pickles that never lie in a file: between a process and the children that it has started, through their pipes.
PIPES = {"tasks/tokens/tokenizing_processes.py"}


def problems(source: str) -> Iterator[str]:
    """What is forbidden in a module's source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in PICKLING)
        elif isinstance(node, ast.Call):
            yield from _of_call(node)
        elif isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in OBJECT_COLLECTIVES:
                yield name
            if name.endswith("Loader") and ("Unsafe" in name or "Full" in name or name == "Loader"):
                yield f"the YAML loader {name}"


def _of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    last = name.rsplit(".", 1)[-1]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in ("eval", "exec", "compile", "__import__"):
        yield f"{name}()"
    if last == "load" and name.startswith("torch.") and given.get("weights_only") != "True":
        yield "torch.load() without weights_only=True"
    if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
        yield f"{name}()"
    if last == "load" and name.split(".")[0] in ("np", "numpy") and "allow_pickle" in given:
        yield "numpy.load(allow_pickle=…)"
    if given.get("shell", "False") != "False" or name in ("os.system", "os.popen"):
        yield "a shell"
    if given.get("trust_remote_code", "False") == "True":
        yield "trust_remote_code=True"
    if last == "from_pretrained" and name.startswith("Auto") and "trust_remote_code" not in given and None not in given:
        yield f"{name}() that does not pass model.trust_remote_code on"


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_forbidden(path: Path) -> None:
    found = list(problems(path.read_text()))
    if path.relative_to(PACKAGE).as_posix() in ALLOWED:
        found = [problem for problem in found if problem not in OBJECT_COLLECTIVES]
    if path.relative_to(PACKAGE).as_posix() in PIPES:
        found = [problem for problem in found if problem != "imports pickle"]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from marshal import loads", "import dill as d", "import torch; torch.load(p)",
        "torch.load(p, weights_only=False)", "yaml.load(t, Loader=yaml.FullLoader)", "yaml.unsafe_load(t)",
        "yaml.parse(t, Loader=yaml.UnsafeLoader)", "eval(x)", "exec(x)", "np.load(p, allow_pickle=True)",
        "subprocess.run(x, shell=True)", "os.system(x)", "f(trust_remote_code=True)", "dist.all_gather_object(a, b)",
        "from torch.distributed import gather_object; gather_object(a)", "AutoConfig.from_pretrained(p)",
    ],
)  # fmt: skip
def test_the_check_sees_it(source: str) -> None:
    assert list(problems(source))
