"""The order of a study's runs: whole comparisons first, and nothing before what it needs."""

from __future__ import annotations

from benchmarks.studies.fair import Trial, TrialKey
from benchmarks.studies.jobs import Job, Queue

RATES = (1e-3, 2e-3)


def a_queue(arms: tuple[str, ...] = ("uniform", "query"), pools: tuple[str, ...] = ("mixed", "clean")) -> Queue:
    return Queue("query", dict.fromkeys(pools, arms), RATES, [100, 101], [0, 1], 50, {})


def finished(job: Job) -> Trial:
    """A run that is the better the larger its rate, and has kept seven rows where it chooses."""
    rows = {name: {"accuracy": job.key.lr} for name in ("tune", "test")}
    kept = 7 if job.key.arm == "ours" else None
    return Trial(job.key, {25: rows, 50: rows}, "accuracy", {"training": 1.0}, rows=kept)


def run_all(queue: Queue) -> list[Job]:
    order = []
    while (job := queue.next()) is not None:
        order.append(job)
        queue.trials[job.key] = finished(job)
    return order


def test_tuning_first_seeds_outermost_and_the_chosen_rate_alone() -> None:
    queue = a_queue()
    keys = [job.key for job in run_all(queue)]
    assert [key.seed for key in keys] == [100] * 8 + [101] * 8 + [0] * 4 + [1] * 4
    assert [(key.pool, key.lr, key.arm) for key in keys[:4]] == [
        ("mixed", 1e-3, "uniform"),
        ("mixed", 1e-3, "query"),
        ("mixed", 2e-3, "uniform"),
        ("mixed", 2e-3, "query"),
    ]
    assert {key.lr for key in keys[16:]} == {2e-3}
    assert queue.unfinished() == 0


def test_without_tuning_there_is_one_rate_for_all() -> None:
    queue = Queue("query", {"mixed": ("uniform", "query")}, [1e-3], [], [0, 1], 50, {})
    assert [(job.key.seed, job.key.lr) for job in run_all(queue)] == [(0, 1e-3)] * 2 + [(1, 1e-3)] * 2
    assert queue.unfinished() == 0


def test_what_is_finished_is_not_run_again() -> None:
    queue, other = a_queue(), a_queue()
    order = run_all(queue)
    other.trials = {key: queue.trials[key] for key in list(queue.trials)[:19]}
    assert other.unfinished() == 5
    assert run_all(other) == order[19:]


def test_a_running_tuning_run_holds_back_its_own_arm_alone() -> None:
    queue = a_queue(pools=("mixed",))
    held = queue.next()
    assert held is not None
    queue.running.add(held.key)
    arms = [(job.key.seed, job.key.arm) for job in run_all(queue)]
    assert (0, "query") in arms
    assert (0, "uniform") not in arms
    queue.running.clear()
    queue.failed.add(held.key)
    assert [(job.key.seed, job.key.arm, job.key.lr) for job in run_all(queue)] == [
        (0, "uniform", 2e-3),
        (1, "uniform", 2e-3),
    ]


def test_a_size_is_that_of_the_choice_on_the_same_pool_and_seed() -> None:
    queue = a_queue(arms=("random+q", "ours"), pools=("mixed",))
    order = run_all(queue)
    keys = [job.key for job in order]
    for job in order:
        if job.key.arm == "random+q":
            assert job.size == 7
            ours = [key for key in keys if (key.arm, key.seed) == ("ours", job.key.seed)]
            assert keys.index(job.key) > min(map(keys.index, ours))
    assert len(order) == 12


def test_no_size_where_the_choice_failed() -> None:
    queue = a_queue(arms=("ours", "random+q"), pools=("mixed",))
    queue.failed |= {TrialKey("query", "mixed", seed, "ours", rate) for seed in (100, 101) for rate in RATES}
    assert run_all(queue) == []
