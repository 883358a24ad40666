"""What the docs say works: commands, Python, configs, links, and the page of config keys."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.warm import warm
from tsqlora_scale.comparison.comparison_file import read_comparison
from tsqlora_scale.config.load import load_config, parse_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("train", "score", "evaluate", "predict", "export", "advise", "plan", "compare")


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: Path
    language: str
    text: str

    @property
    def name(self) -> str:
        """For the test's name."""
        return f"{self.page.stem}-{self.language}-{self.text.strip().splitlines()[0][:30]}"


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        for match in re.finditer(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text()):
            if match[1] == language:
                found.append(Block(page, match[1], match[2]))
    return found


def is_walk_through(block: Block) -> bool:
    return "cat > " in block.text


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder from which the docs' relative paths work."""
    for name in ("launch", "configs", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(text: str, folder: Path) -> str:
    """Run a shell script with this environment's Python; its output."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_there_is_something_to_test() -> None:
    assert len(blocks("bash")) >= 8
    assert len(blocks("python")) >= 2
    assert {block.language for language in ("bash", "python", "yaml") for block in blocks(language)} == {
        "bash", "python", "yaml",
    }  # fmt: skip
    for page in PAGES:
        languages = set(re.findall(r"(?m)^```(\w+)$", page.read_text()))
        assert languages <= {"bash", "python", "yaml"}, page


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in blocks("bash") if is_walk_through(b)], ids=lambda block: block.name)
def test_walk_throughs(block: Block, place: Path) -> None:
    said = run(block.text, place)
    assert re.search(r"a wonderful, funny film\W+good", said)
    assert re.search(r"dull and badly written\W+bad", said)


COMMANDS = [
    pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block.text.count("--dry-run") > 1 else [])
    for block in blocks("bash")
    if not is_walk_through(block)
]


@pytest.mark.parametrize("block", COMMANDS)
def test_commands(block: Block, place: Path) -> None:
    """Each is known to this test, and is checked as far as it can be here; dry runs are run."""
    lines = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
    commands = [shlex.split(line, comments=True) for line in lines]
    commands = [words for words in commands if words]
    assert commands
    for words in commands:
        if words[0] == "make":
            assert re.search(rf"(?m)^{words[1]}:", (ROOT / "Makefile").read_text())
        elif words[:2] == ["pip", "install"]:
            check_installation(words)
        elif words[:3] == ["python3", "-m", "venv"]:
            continue
        elif words[1].startswith("benchmarks/"):
            assert {word for word in words if word.startswith("--")} <= options_of_benchmark(words[1]), words
        else:
            check_launch(words, place)


def check_installation(words: list[str]) -> None:
    optional = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert words[-2:] == ["-c", "constraints.txt"]
    wanted = words[-3]
    extras = re.fullmatch(r"\.\[(.*)\]", wanted)
    if extras is None:
        assert wanted in pins
    else:
        assert set(extras[1].split(",")) <= set(re.findall(r"(?m)^(\w+) = \[", optional))


def check_launch(words: list[str], place: Path) -> None:
    """``[accelerate launch …|torchrun …|python] launch/NAME.py …``."""
    script = next(place for place, word in enumerate(words) if word.startswith("launch/"))
    launcher, name, arguments = words[:script], Path(words[script]).stem, words[script + 1 :]
    assert name in SCRIPTS, words
    assert launcher[0] in ("python", "torchrun") or launcher[:2] == ["accelerate", "launch"], words
    for word, value in zip(launcher, [*launcher[1:], ""], strict=True):
        if word == "--config_file":
            assert (ROOT / value).is_file()
    known = options_of(name)
    assert {word for word in arguments if word.startswith("--")} <= known, words
    if "--config" in arguments:
        config = arguments[arguments.index("--config") + 1]
        if config.startswith("runs/quickstart/"):  # what the quickstart has left
            config = "configs/quickstart.yaml"
        overrides = [w for w in arguments if re.match(r"\w+\.[\w.]+=", w)]
        if name == "compare":
            read_comparison(ROOT / config, small="--small" in arguments)
        else:
            load_config(ROOT / config, overrides)
        if "--dry-run" in arguments:
            done = warm().run([str(place / words[script]), *arguments], cwd=place, timeout=500)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            assert {"compare": "to run: "}.get(name, "steps: ") in done.stdout


@functools.cache
def options_of(name: str) -> set[str]:
    """Options of a command, from the parser's own help."""
    code = f"from tsqlora_scale.commands.main import main; main([{name!r}, '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    return set(re.findall(r"--[\w-]+", done.stdout))


@functools.cache
def options_of_benchmark(script: str) -> set[str]:
    """The same of a benchmark."""
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False, cwd=ROOT)
    return set(re.findall(r"--[\w-]+", done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.name)
def test_python(block: Block, place: Path) -> None:
    """In a fresh process, as in a notebook."""
    (place / "block.py").write_text(block.text)
    said = run(f"{sys.executable} block.py", place)
    assert "accuracy" in said


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.name)
def test_configs(block: Block) -> None:
    """Fragments, to which the sections that every config needs are added."""
    needed = {"model": {"name_or_path": "somewhere"}, "train": {"max_steps": 1}}
    parse_config(needed | yaml.safe_load(block.text))


def test_the_page_of_config_keys_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("make_config_reference", ROOT / "docs" / "make_config_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == (ROOT / "docs" / "config.md").read_text(), "run make docs"
    silent = [line.split("`")[1] for line in module.page().splitlines() if re.fullmatch(r"\| `.*\| +\|", line)]
    assert not silent, "a line `#:` above the field says what the key does"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_places_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:tsqlora_scale|tests|benchmarks|configs|launch|examples|docs)/[\w./-]*\w)`", text):
        assert (ROOT / target).exists(), target
    rooms = "quality|ranks|engine|tasks|model|run|report|common|config"
    for target in re.findall(rf"`((?:{rooms})/[\w./]*\.py)`", text):
        assert (ROOT / "tsqlora_scale" / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
