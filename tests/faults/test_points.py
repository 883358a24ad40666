"""Points are named by functions, and reach every name that a function has."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.faults.killer import Killer, Point, after, before, replace, within
from tests.faults.points import FIRST_LIFE, POINTS, SECOND_LIFE, WITH_A_PROXY
from tsqlora_scale.run.checkpoint import write_checkpoint
from tsqlora_scale.run.training_run import Run


def shelve(book: str) -> str:
    return f"{book} shelved"


class Shelf:
    def take(self) -> str:
        return "taken"


@pytest.fixture
def other_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that knows :func:`shelve` by a name of its own."""
    module = ModuleType("a_module_of_this_test")
    module.__dict__["put_away"] = shelve
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_names_come_from_the_functions() -> None:
    assert before(write_checkpoint).name == "checkpoint.write_checkpoint: before"
    assert after(Run.evaluate).name == "training_run.Run.evaluate: after"
    with pytest.raises(AssertionError, match="evaluate"):
        within(Run.evaluate)


def test_every_point_is_declared_and_has_a_name_of_its_own() -> None:
    assert {*FIRST_LIFE, *SECOND_LIFE, *(point for point, _ in WITH_A_PROXY)} <= POINTS
    assert len({point.name for point in POINTS}) == len(POINTS)
    with pytest.raises(AssertionError, match="two points of one name"):
        Killer([Point(shelve, "before"), Point(lambda: 0, "before"), Point(lambda: 1, "before")], None, Path("/"))


def test_crossings_are_counted_under_every_name_of_a_function(
    other_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    this, take = sys.modules[__name__], Shelf.take
    monkeypatch.setattr(this, "shelve", shelve)  # put back at the end
    monkeypatch.setattr(Shelf, "take", take)
    killer = Killer([before(shelve), after(shelve), after(take)], None, Path("/"))
    killer.install()
    assert (this.shelve("one"), other_module.put_away("two")) == ("one shelved", "two shelved")
    assert Shelf().take() == "taken"
    names = {f"test_points.{name}" for name in ("shelve: before", "shelve: after", "Shelf.take: after")}
    assert dict(killer.counts) == dict.fromkeys(names, 2) | {"test_points.Shelf.take: after": 1}
    with pytest.raises(AssertionError):  # no longer what is there
        replace(take, lambda shelf: "nothing")
    replace(Shelf.take, lambda shelf: "replaced")
    assert Shelf().take() == "replaced"
