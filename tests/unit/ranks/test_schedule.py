import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import ScheduleConfig
from tsqlora_scale.ranks.schedule import Schedule


def test_events_run_from_start_to_end_inclusive() -> None:
    schedule = Schedule.from_config(ScheduleConfig(start=10, end=40, every=15), total_steps=100)
    assert schedule.events == (10, 25, 40)
    assert [step for step in range(101) if schedule.due(step)] == [10, 25, 40]


def test_progress_runs_from_the_first_event_to_the_last() -> None:
    schedule = Schedule.from_config(ScheduleConfig(start=10, end=40, every=15), total_steps=100)
    assert [schedule.progress(step) for step in schedule.events] == [0.0, 0.5, 1.0]
    assert Schedule.from_config(ScheduleConfig(start=10, end=20, every=15), total_steps=100).progress(10) == 1.0


def test_fractions_are_of_the_run() -> None:
    schedule = Schedule.from_config(ScheduleConfig(start=0.25, end=0.75, every=0.25), total_steps=80)
    assert schedule.events == (20, 40, 60)


def test_nothing_happens_before_the_first_or_after_the_last_step() -> None:
    assert Schedule.from_config(ScheduleConfig(start=0, end=100, every=5), total_steps=15).events == (5, 10)


@pytest.mark.parametrize(
    ("start", "end", "every", "total"), [(500, 900, 100, 200), (50, 20, 5, 200), (0, 0, 10, 50), (10, 10, 1, 10)]
)
def test_a_schedule_without_an_event_is_refused_with_its_numbers(start: int, end: int, every: int, total: int) -> None:
    with pytest.raises(UserError) as caught:
        Schedule.from_config(ScheduleConfig(start=start, end=end, every=every), total_steps=total)
    message = str(caught.value)
    for part in (f"schedule.start={start}", f"schedule.end={end}", f"schedule.every={every}", f"{total} optimizer"):
        assert part in message
    assert "allocation.policy=fixed" in message


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 20), st.integers(1, 60))
def test_events_are_the_steps_that_the_definition_names(start: int, end: int, every: int, total: int) -> None:
    expected = [s for s in range(1, total) if start <= s <= end and (s - start) % every == 0]
    cfg = ScheduleConfig(start=start, end=end, every=every)
    if expected:
        assert list(Schedule.from_config(cfg, total).events) == expected
    else:
        with pytest.raises(UserError):
            Schedule.from_config(cfg, total)
