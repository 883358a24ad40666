"""Comparisons of made-up runs: what is run and in which order, what is chosen on what, what tables say."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.comparison.fakes import FakeLaunch, accuracy_of, comparison, result_of, write_comparison
from tsqlora_scale.common.errors import Stopped, UserError
from tsqlora_scale.comparison.comparison_run import ComparisonRun
from tsqlora_scale.comparison.processes import Launch, share_of_devices
from tsqlora_scale.comparison.trial_queue import Shard
from tsqlora_scale.comparison.trials import same_config
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.run.run_lock import FolderLock


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeLaunch:
    monkeypatch.setattr("tsqlora_scale.comparison.crew.LOOK", 0.01)
    return FakeLaunch(scratch=tmp_path / "scratch")


def test_seeds_are_outermost_and_nothing_is_run_twice(
    launch: FakeLaunch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = comparison(tmp_path)
    assert found.plan()[0] == "to run: lora on words, seed 0"
    found.run(launch)
    assert launch.started == [f"{arm}/seed{seed}" for seed in range(3) for arm in ("lora", "tsqlora")]
    assert "[6/6] tsqlora on words, seed 2: accuracy 0.8870" in capsys.readouterr().err
    runs = tmp_path / "out" / "runs" / "words"
    assert not (runs / "lora" / "seed0" / "checkpoints").exists()  # a finished run has no use for them
    shutil.rmtree(runs / "lora" / "seed1")
    launch.started.clear()
    shutil.rmtree(launch.scratch)
    again = comparison(tmp_path)
    again.run(launch)
    assert launch.started == ["lora/seed1"]
    assert again.report().missing == []


def test_the_rate_is_chosen_on_what_is_not_reported(launch: FakeLaunch, tmp_path: Path) -> None:
    found = comparison(tmp_path, lrs=[1e-3, 2e-3, 4e-3], seeds=[0, 1], tuning={"seeds": [7, 8]}, budget={"steps": 5})
    assert found.plan()[-1] == "and 4 runs that follow from these"
    found.run(launch)
    assert len(launch.started) == 2 * (3 * 2 + 2)
    assert launch.started[-4:] == [
        "lora/lr0.002-seed0",
        "tsqlora/lr0.002-seed0",
        "lora/lr0.002-seed1",
        "tsqlora/lr0.002-seed1",
    ]
    for path in (tmp_path / "out" / "runs").rglob("config.yaml"):
        half = "tuning" if path.parent.name.startswith("tuning-") else "report"
        assert f"dev_half: {half}" in path.read_text(encoding="utf-8")
    assert "| 0.002 | 5 |" in found.report().text
    rates = [trial.lr for trial in found.queue.known() if trial.purpose == "report"]
    assert set(rates) == {2e-3}


def test_a_rate_that_lacks_a_run_is_no_candidate(launch: FakeLaunch, tmp_path: Path) -> None:
    def results(config: Config) -> dict[str, Any] | None:
        fails = config.train.lr == 2e-3 and config.run.seed == 101
        return None if fails else result_of(config, accuracy_of(config))

    changes: dict[str, Any] = {"lrs": [1e-3, 2e-3], "arms": {"lora": {"adapter.method": "lora"}}}
    found = comparison(tmp_path, **changes)
    found.run(replace(launch, results=results))
    elsewhere = comparison(tmp_path, **changes)
    for result in (found.report(), elsewhere.report()):  # another process knows, too
        assert "| 0.001 |" in result.text
        assert list(result.failed) == ["lora on words, lr 0.002, seed 101, tuning"]
        assert result.missing == []
    launch.started.clear()
    elsewhere.run(launch)
    assert launch.started[0] == "lora/tuning-lr0.002-seed101", "what has failed is tried again where runs are made"
    assert "| 0.002 |" in elsewhere.report().text


def test_rates_that_lack_different_seeds_are_both_none(launch: FakeLaunch, tmp_path: Path) -> None:
    """Means over different seeds say nothing of the rates."""

    def results(config: Config) -> dict[str, Any] | None:
        fails = (config.train.lr, config.run.seed) in ((2e-3, 101), (4e-3, 100))
        return None if fails else result_of(config, 0.9 if config.train.lr > 1e-3 else 0.5)

    changes: dict[str, Any] = {"lrs": [1e-3, 2e-3, 4e-3], "tuning": {"seeds": [100, 101]}}
    found = comparison(tmp_path, arms={"lora": {"adapter.method": "lora"}}, **changes)
    found.run(replace(launch, results=results))
    assert {trial.lr for trial in found.queue.known() if trial.purpose == "report"} == {1e-3}


def test_what_a_method_does_must_happen_within_its_length(tmp_path: Path) -> None:
    """Known before anything is run: of a pilot, too."""
    late = {"common": {"schedule.start": 300, "schedule.end": 500, "schedule.every": 50}}
    for budget in ({"steps": 100}, {"seconds": 60}):
        with pytest.raises(UserError) as raised:
            comparison(tmp_path, budget=budget, **late)
        said = str(raised.value)
        assert said.startswith("tsqlora on words: schedule.start=300") and "nothing has been run" in said
        assert ("budget.pilot_steps=20" in said) == ("seconds" in budget)
    comparison(tmp_path, budget={"steps": 400}, **late)
    short = ComparisonRun(tmp_path / "fake.yaml", out=tmp_path / "out", runs=False, overrides=["schedule.start=900"])
    assert short.trials.refused == {}, "tables of what has been run"
    comparison(tmp_path, budget={"seconds": 60, "pilot_steps": 400}, **late)
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named_and_ends_nothing(launch: FakeLaunch, tmp_path: Path) -> None:
    def results(config: Config) -> dict[str, Any] | None:
        return None if config.adapts_ranks and config.run.seed == 1 else result_of(config, accuracy_of(config))

    found = comparison(tmp_path)
    found.run(replace(launch, results=results))
    for report in (found.report(), comparison(tmp_path).report()):  # another process knows, too
        assert report.failed == {"tsqlora on words, seed 1": "adapter.r=8: too much"}
        assert "tsqlora (2 of 3 seeds)" in report.text
        assert "- tsqlora on words, seed 1: adapter.r=8: too much" in report.text
    comparison(tmp_path).run(launch)
    assert launch.started[-1] == "tsqlora/seed1"
    assert comparison(tmp_path).report().failed == {}


def test_arms_that_are_refused_can_be_left_out(launch: FakeLaunch, tmp_path: Path) -> None:
    comparison(tmp_path)
    file = tmp_path / "fake.yaml"
    file.write_text(
        file.read_text(encoding="utf-8").replace("adapter.method: tsqlora", "adapter.method: x"), encoding="utf-8"
    )
    found = ComparisonRun(file, out=tmp_path / "out", leave_out=True)
    found.run(launch)
    report = found.report()
    assert len(launch.started) == 3
    assert list(report.failed) == ["tsqlora on words"] and "'x'" in report.failed["tsqlora on words"]


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ({"labels": None}, {"labels": ["no", "yes"]}),
        ({"prompt_base": None}, {"prompt_base": "masked"}),
        ({"label_words": "auto"}, {"label_words": ["bad", "good"]}),
        ({"demonstrations": 1, "demonstrated": []}, {"demonstrations": 1, "demonstrated": [["fine", "yes"]]}),
    ],
)
def test_what_a_run_fills_in_makes_it_no_other_run(
    tmp_path: Path, asked: dict[str, Any], written: dict[str, Any]
) -> None:
    config = load_config(write_comparison(tmp_path).with_name("words.yaml"))
    ours, theirs = config.with_task(**asked), config.with_task(**written)
    assert same_config(ours, theirs) is None
    differs = same_config(theirs, ours)
    assert differs is not None and differs.startswith(f"task.{next(reversed(written))}="), differs


def test_each_metric_has_its_own_unit(launch: FakeLaunch, tmp_path: Path) -> None:
    """Percents of fractions, losses as they are; of both there is no mean."""

    def results(config: Config) -> dict[str, Any]:
        metrics = {"accuracy": 0.875, "loss": 0.3521, "own": 0.5}
        if "losses" in config.run.output_dir:
            task = result_of(config, 0.9)["task"] | {"decides": "loss", "higher_is_better": False}
            return result_of(config, 0.9, metrics=dict(reversed(metrics.items())) | {"own": 7.0}, task=task)
        return result_of(config, 0.9, metrics=metrics)

    found = comparison(tmp_path, tasks={"words": {}, "losses": {}}, arms={"lora": {"adapter.method": "lora"}})
    found.run(replace(launch, results=results))
    line = next(line for line in found.report().text.splitlines() if line.startswith("| lora |"))
    assert "| 87.50 / 35.21" not in line
    assert sorted(line.split(" | ")[2].split(" / ")) == ["0.35", "50.00", "87.50"]
    assert sorted(line.split(" | ")[3].split(" / ")) == ["0.35", "7.00", "87.50"]
    assert line.endswith("| - |")


def test_tables(launch: FakeLaunch, tmp_path: Path) -> None:
    found = comparison(tmp_path, title="A title", published={"lora": {"words": "1.0/2.0", "parameters": "0.3M"}})
    found.run(launch)
    text = found.report().text
    assert text.startswith("# A title\n")
    assert "| *lora, published* | 0.3M | *1.0/2.0* | - |" in text
    assert "| lora | 8,000 | 87.50 / 77.50 | 87.50 |" in text
    header, rule, lora, tsqlora = [line for line in text.split("## words")[1].splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in (header, rule, lora, tsqlora)}) == 1
    assert "accuracy | f1 (of class yes) | accuracy - lora | p |" in header
    assert "| 0.8750 [0.8650, 0.8850] |" in lora and "| - | - | 0.0005 | 10 | 5.5 |" in lora
    assert "| +0.0210 [+0.0200, +0.0220] | 0.250 |" in tsqlora and tsqlora.endswith("| 512 |")
    with (tmp_path / "out" / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["accuracy"]) for row in rows][:2] == [
        ("lora", "0", "0.885"),
        ("lora", "1", "0.875"),
    ]
    with (tmp_path / "out" / "tables.csv").open(encoding="utf-8") as file:
        summary = list(csv.DictReader(file))
    assert (summary[1]["baseline"], summary[1]["p"], summary[0]["difference"]) == ("lora", "0.25", "")


def test_a_table_never_mixes_codes_or_models(launch: FakeLaunch, tmp_path: Path) -> None:
    def results(config: Config) -> dict[str, Any]:
        code = {"version": "1", "source": "f" * 16 if config.run.seed == 2 else "0" * 16}
        return result_of(config, accuracy_of(config), code=code)

    found = comparison(tmp_path)
    found.run(replace(launch, results=results))
    text = found.report().text
    assert text.count("## words") == 2
    assert text.count("code 1 (00000000)") == text.count("code 1 (ffffffff)") == 1
    assert "lora (2 of 3 seeds)" in text and "lora (1 of 3 seeds)" in text


def test_runs_that_went_on_with_other_code_have_a_table_of_their_own(launch: FakeLaunch, tmp_path: Path) -> None:
    def results(config: Config) -> dict[str, Any]:
        earlier = ["f" * 16] if config.run.seed == 2 else []
        return result_of(config, accuracy_of(config), code={"version": "1", "source": "0" * 16, "earlier": earlier})

    found = comparison(tmp_path)
    found.run(replace(launch, results=results))
    text = found.report().text
    assert text.count("## words") == 2
    assert text.count("code 1 (00000000),") == text.count("code 1 (00000000, begun with ffffffff),") == 1


def test_a_table_never_mixes_data(launch: FakeLaunch, tmp_path: Path) -> None:
    def results(config: Config) -> dict[str, Any]:
        train = ("x" if config.run.seed == 1 and config.adapts_ranks else "a") * 64
        return result_of(config, accuracy_of(config), data={"train": train, "dev": "b" * 64})

    found = comparison(tmp_path)
    found.run(replace(launch, results=results))
    with pytest.raises(UserError, match="tsqlora on words, seed 1 has other training rows than lora on words, seed 0"):
        found.report()


def test_parts_that_every_seed_draws_may_differ_by_seed(launch: FakeLaunch, tmp_path: Path) -> None:
    def results(config: Config) -> dict[str, Any]:
        return result_of(config, accuracy_of(config), data={"train": str(config.run.seed) * 64, "dev": "b" * 64})

    found = comparison(tmp_path, common={"task.dataset.max_train_samples": 10})
    found.run(replace(launch, results=results))
    assert "train of 3 kinds" in found.report().text


def test_variants_may_have_data_of_their_own(launch: FakeLaunch, tmp_path: Path) -> None:
    def results(config: Config) -> dict[str, Any]:
        rows = str(config.task.dataset.max_train_samples)
        return result_of(config, accuracy_of(config), data={"train": rows.ljust(64, "0"), "dev": "b" * 64})

    def mixed(config: Config) -> dict[str, Any]:
        return results(config) | ({"data": {"train": "x" * 64, "dev": "b" * 64}} if config.adapts_ranks else {})

    variants = {f"n{rows}": {"task.dataset.max_train_samples": rows} for rows in (10, 20)}
    found = comparison(tmp_path, variants=variants, seeds=[0])
    found.run(replace(launch, results=results))
    assert "train of 2 kinds" in found.report().text
    other = comparison(tmp_path / "mixed", variants=variants, seeds=[0])
    other.run(replace(launch, scratch=tmp_path / "others", results=mixed))
    with pytest.raises(UserError, match="tsqlora-n10 on words, seed 0 has other training rows than lora-n10 on words"):
        other.report()

    def judged_by_others(config: Config) -> dict[str, Any]:
        few = config.task.dataset.max_train_samples == 10
        return results(config) | {"data": {"train": "x" * 64, "dev": ("a" if few else "b") * 64}}

    judged = comparison(tmp_path / "judged", variants=variants, seeds=[0])
    judged.run(replace(launch, scratch=tmp_path / "third", results=judged_by_others))
    with pytest.raises(UserError, match="lora-n20 on words, seed 0 has other held-out rows than lora-n10 on words"):
        judged.report()


def test_a_run_that_was_begun_with_another_length_is_an_error(launch: FakeLaunch, tmp_path: Path) -> None:
    """Resumed, it would be no run that was so long from the start."""
    begun = comparison(tmp_path, budget={"steps": 5})
    trial = begun.queue.known()[0]
    folder = begun.trials.folder(trial)
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    (folder / "config.yaml").write_text(begun.trials.config(trial).to_yaml(), encoding="utf-8")
    assert begun.plan()[0] == f"to run: {trial}"
    with pytest.raises(UserError, match=r"was begun with train.max_steps=5, and it is now 9; remove that folder"):
        comparison(tmp_path, budget={"steps": 9}).plan()
    lengths = [{"step": 2, "before": 5, "after": 9}]
    finished = comparison(tmp_path / "finished", budget={"steps": 9})
    with pytest.raises(UserError, match=r"was begun with 5 steps and then made longer or shorter; remove that folder"):
        finished.run(replace(launch, results=lambda config: result_of(config, 0.5, lengths=lengths)))


def test_a_finished_run_of_another_config_is_an_error(launch: FakeLaunch, tmp_path: Path) -> None:
    comparison(tmp_path).run(launch)
    with pytest.raises(UserError, match=r"adapter.alpha=16.0, and it is now 4.0; remove that folder"):
        comparison(tmp_path, common={"adapter.alpha": 4.0}).plan()


def test_budgets(launch: FakeLaunch, tmp_path: Path) -> None:
    def steps(**changes: Any) -> list[int | None]:
        found = comparison(tmp_path, **changes)
        return [found.queue.steps(cell) for cell in found.trials.cells]

    halved = {"lora": {"adapter.method": "lora"}, "tsqlora": {"train.batch_size": 16}}
    assert steps(arms=halved) == [None, None]
    assert steps(arms=halved, budget={"steps": 7}) == [7, 7]
    assert steps(arms=halved, budget={"samples": 100}) == [4, 7]
    with pytest.raises(LookupError):
        steps(budget={"seconds": 10})
    found = comparison(tmp_path, budget={"seconds": 10, "pilot_steps": 4}, seeds=[0])
    found.run(launch)
    assert launch.started == ["lora/pilot-seed0", "tsqlora/pilot-seed0", "lora/seed0", "tsqlora/seed0"]
    # (0.5 + 4 * 0.5) / 4 seconds a step; scoring takes 2
    assert [found.queue.steps(cell) for cell in found.trials.cells] == [16, 12]


def test_a_budget_that_is_spent_before_the_first_step(launch: FakeLaunch, tmp_path: Path) -> None:
    """It ends that arm, and no other."""

    def results(config: Config) -> dict[str, Any]:
        more = {"pretraining": {"seconds": 12.0}} if config.adapts_ranks else {}
        return result_of(config, accuracy_of(config), **more)

    found = comparison(tmp_path, budget={"seconds": 10, "pilot_steps": 4}, seeds=[0])
    found.run(replace(launch, results=results))
    report = found.report()
    (reason,) = report.failed.values()
    assert [*report.failed] == ["tsqlora on words"]
    assert re.fullmatch(r"budget.seconds=10 leaves none for training: pretraining 12.0 s.*; raise it", reason)
    assert "| lora |" in report.text


def test_a_budget_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqlora_scale.comparison.comparison_run.mean_tokens", lambda config: 12.5)
    found = comparison(tmp_path, budget={"tokens": 4000})
    assert [found.queue.steps(cell) for cell in found.trials.cells] == [10, 10]


def test_shards_share_the_runs(tmp_path: Path) -> None:
    def names(lrs: Sequence[float], count: int) -> list[list[str]]:
        file = tmp_path / "fake.yaml"
        comparison(tmp_path, lrs=lrs)
        shards = [ComparisonRun(file, out=tmp_path / "out", shard=Shard(n, count)) for n in range(count)]
        assert sum(shard.queue.most() for shard in shards) == ComparisonRun(file, out=tmp_path / "out").queue.most()
        return [[str(trial) for trial in shard.queue.known()] for shard in shards]

    plain = names([], 4)
    assert sorted(name for shard in plain for name in shard) == sorted(
        f"{arm} on words, seed {seed}" for arm in ("lora", "tsqlora") for seed in range(3)
    )
    assert max(map(len, plain)) == 2
    tuned = names([1e-3, 2e-3], 2)  # what waits for one another stays together
    assert [{name.split()[0] for name in shard} for shard in tuned] == [{"lora"}, {"tsqlora"}]
    for text in ("2/2", "a/2", "1", "-1/2"):
        with pytest.raises(UserError, match="--shard"):
            Shard.parse(text)
    assert Shard.parse("1/4") == Shard(1, 4)


def test_two_comparisons_do_not_write_into_one_folder(launch: FakeLaunch, tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "out", what="comparison")
    try:
        with pytest.raises(UserError, match=r"comparison folder .* is being written by another comparison .* --out"):
            comparison(tmp_path).run(launch)
    finally:
        lock.release()
    (tmp_path / "file").write_text("", encoding="utf-8")
    comparison(tmp_path)
    with pytest.raises(UserError, match="--out"):
        ComparisonRun(tmp_path / "fake.yaml", out=tmp_path / "file" / "out").run(launch)


@dataclass(frozen=True)
class SlowLaunch(FakeLaunch):
    """Runs that wait, and end on request as ours do."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        super().command(arguments)
        return ["sh", "-c", "trap 'echo requeue; exit 0' USR1; while :; do sleep 0.02; done"]


@pytest.mark.parametrize(("number", "interrupted"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_request_to_stop_reaches_the_runs(
    number: int, interrupted: bool, launch: FakeLaunch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = SlowLaunch(scratch=tmp_path / "slow", workers=2)
    timer = threading.Thread(target=_when, args=(lambda: len(slow.started) == 2, number))
    timer.start()
    found = comparison(tmp_path)
    with pytest.raises(Stopped, match="0 of 6 runs are finished") as caught:
        found.run(slow)
    timer.join()
    assert caught.value.interrupted == interrupted
    assert capsys.readouterr().err.count("stopped, and goes on") == 2
    assert found.report().failed == {}


def _when(condition: Callable[[], bool], number: int) -> None:
    while not condition():
        time.sleep(0.01)
    time.sleep(0.2)  # its trap is set
    os.kill(os.getpid(), number)


def test_a_run_that_is_killed_says_so(launch: FakeLaunch, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Killed(FakeLaunch):
        def command(self, arguments: Sequence[str]) -> list[str]:
            return ["sh", "-c", "echo some words; kill -9 $$"]

    found = comparison(tmp_path, arms={"lora": {"adapter.method": "lora"}}, seeds=[0])
    found.run(Killed())
    assert found.report().failed == {"lora on words, seed 0": "killed by signal 9 (some words)"}


def test_how_runs_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = Launch().command(["--config", "x"])
    assert command[1].endswith("launch/train.py") and command[2:] == ["--config", "x"]
    file = tmp_path / "zero2.yaml"
    file.write_text("", encoding="utf-8")
    command = Launch(file, 4).command(["--config", "x"])
    assert command[1:7] == ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "4"]
    assert command[-3].endswith("launch/train.py")
    monkeypatch.setattr("tsqlora_scale.comparison.processes.SCRIPT", tmp_path / "none.py")
    assert Launch().command(["x"])[1:] == ["-m", "tsqlora_scale.commands.main", "train", "x"]
    for wrong in (Launch(workers=0), Launch(tmp_path / "none"), Launch(num_processes=2), Launch(file, 0)):
        with pytest.raises(UserError, match="--"):
            wrong.check()


def test_devices_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [share_of_devices("0123", worker, 2) for worker in (0, 1)] == [["0", "1"], ["2", "3"]]
    assert [share_of_devices("01", worker, 3) for worker in (0, 1, 2)] == [["0"], ["1"], ["0"]]
    assert share_of_devices([], 0, 2) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    (tmp_path / "zero2.yaml").touch()
    Launch(tmp_path / "zero2.yaml", 2).check_devices()
    with pytest.raises(UserError, match=r"--num_processes 2: each of 2 workers has 1 of the 2 GPUs"):
        Launch(tmp_path / "zero2.yaml", 2, workers=2).check_devices()
    assert [Launch(workers=2).environment(worker)["CUDA_VISIBLE_DEVICES"] for worker in (0, 1)] == ["4", "6"]


def test_results_of_earlier_releases_are_refused(launch: FakeLaunch, tmp_path: Path) -> None:
    def results(config: Config) -> dict[str, Any]:
        return {key: value for key, value in result_of(config, 0.5).items() if key != "code"}

    found = comparison(tmp_path)
    found.run(replace(launch, results=results))
    with pytest.raises(UserError, match="does not say which code"):
        found.report()
    path = tmp_path / "out" / "runs" / "words" / "lora" / "seed0" / "result.json"
    path.write_text(json.dumps([]), encoding="utf-8")
    with pytest.raises(UserError, match=r"result.json: is no result"):
        comparison(tmp_path).report()
