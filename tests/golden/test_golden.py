"""Losses, ranks, scores and adapters are what they were, on every engine: on the same machine to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.making import GOLDEN_ENGINES, KINDS, PINNED, machine, make

Made = dict[str, dict[str, dict[str, Any]]]
ENGINE_PARAMS = [
    pytest.param(engine, marks=[] if engine == "plain" else [pytest.mark.slow, pytest.mark.distributed])
    for engine in GOLDEN_ENGINES
]
DIGESTS = ("scores", "adapter", "metrics_lines", "ranks_lines", "losses")

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Any:
    """A function: engine -> the runs' summaries. An engine runs once."""
    done: Made = {}

    def runs(engine: str) -> dict[str, dict[str, Any]]:
        if engine not in done:
            done[engine] = make(engine, tmp_path_factory.mktemp(engine), models_dir)
        return done[engine]

    return runs


@pytest.fixture(scope="module")
def pinned() -> dict[str, Any]:
    return json.loads(PINNED.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINE_PARAMS)
def test_the_numbers(engine: str, kind: str, made: Any, pinned: dict[str, Any]) -> None:
    found, expected = made(engine)[kind], pinned["runs"][kind][engine]
    assert found["engine"] == engine.split("-")[0] == expected["engine"]
    assert len(expected["losses"]) == 13 and len(expected["ranks"]) == 2
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["ranks"] == expected["ranks"]
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINE_PARAMS)
def test_the_bits(engine: str, kind: str, made: Any, pinned: dict[str, Any]) -> None:
    here = machine()
    if differs := [
        f"{key} {here[key]!r}, not {value!r}" for key, value in pinned["machine"].items() if here[key] != value
    ]:
        pytest.skip(f"the pinned bits are those of another machine: here is {', '.join(differs)}")
    found, expected = made(engine)[kind], pinned["runs"][kind][engine]
    assert {name: found[name] for name in DIGESTS} == {name: expected[name] for name in DIGESTS}
