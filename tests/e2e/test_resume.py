"""A run that was cut short and resumed leaves the same folder as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.runs import go, read_lines, result_of, run_tree
from tests.steps import Killed, killed_in_step
from tsqlora_scale import training as loop
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.quality.draws.batch_sampler import BatchSampler
from tsqlora_scale.quality.scores.score_parts import Parts, PassPart
from tsqlora_scale.report import record
from tsqlora_scale.run import build, checkpoint, preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.lr_schedule import learning_rate
from tsqlora_scale.run.preflight import check_run_dir
from tsqlora_scale.run.resume import MAY_CHANGE, same_method
from tsqlora_scale.run.training_run import Run


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A record without its times."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_lines(path)]


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """The samples of each step that ran last, by step."""
    drawn: dict[int, list[int]] = {}
    draw = BatchSampler.draw

    def spy(sampler: BatchSampler, step: int) -> np.ndarray:
        rows = draw(sampler, step)
        drawn[step] = rows.tolist()
        return rows

    monkeypatch.setattr(BatchSampler, "draw", spy)
    return drawn


def test_a_killed_run_resumes_as_if_nothing_had_happened(
    tmp_path: Path, models_dir: Path, draws: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 8, two steps after the newest checkpoint, while a line and a checkpoint were being written."""
    changes: dict[str, Any] = {"checkpoint_every": 3, "checkpoint_keep": 1, "eval_every": 4}
    whole = run_tree("llama", tmp_path, models_dir, "whole", train=changes)
    go(whole)
    expected_draws = dict(draws)

    killed = run_tree("llama", tmp_path, models_dir, "killed", train=changes)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed_in_step(7))
        with pytest.raises(Killed):
            go(killed)
    folder, reference = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    (folder / "checkpoints" / "step-00000009.partial").mkdir()
    draws.clear()
    go(killed, resume="auto")

    assert min(draws) == 6, "resumed from the newest checkpoint"
    assert draws == {step: drawn for step, drawn in expected_draws.items() if step >= 6}
    for name in ("metrics.jsonl", "ranks.jsonl"):
        assert lines_of(folder / name) == lines_of(reference / name)
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, reference)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    best = result_of(folder)["best"]
    assert best == result_of(reference)["best"]
    kept = {checkpoint.name for checkpoint in (folder / "checkpoints").iterdir()}
    assert kept == {"step-00000013", Path(best["checkpoint"]).name}, "the newest and the best, nothing half written"


@pytest.mark.parametrize("number", [1, 3, 4], ids=["early", "late", "at the end"])
def test_a_run_killed_while_it_scores(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """48 samples in shards of 12: four parts in the first pass."""
    changes: dict[str, dict[str, Any]] = {"scoring": {"shard_size": 12, "keep_sketches": True}}
    whole = run_tree("bert", tmp_path, models_dir, "whole", **changes)
    go(whole)
    killed = run_tree("bert", tmp_path, models_dir, "killed", **changes)
    append, written = Parts.append, []

    def dies(parts: Parts, rows: PassPart) -> None:
        append(parts, rows)
        written.append(len(rows.indices))
        if len(written) == number:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "append", dies)
        with pytest.raises(Killed):
            go(killed)
    measured: list[int] = []
    monkeypatch.setattr(Parts, "append", lambda parts, rows: (measured.append(len(rows.indices)), append(parts, rows)))
    run = go(killed, resume="auto")
    folder, reference = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole"
    assert measured[: 4 - number] == [12] * (4 - number), "only what was not there"
    for name in ("metrics.jsonl", "ranks.jsonl"):
        assert lines_of(folder / name) == lines_of(reference / name)
    for scores in sorted((reference / "scores").rglob("*.parquet")):
        assert (folder / scores.relative_to(reference)).read_bytes() == scores.read_bytes()
    assert run.step == 13
    assert sorted(path.name for path in (folder / "score-parts").iterdir()) == ["pass-002"]


def test_resuming_a_finished_run_adds_nothing(
    tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"eval_every": 5})
    go(tree)
    run_dir = tmp_path / "runs" / "run"
    before = lines_of(run_dir / "metrics.jsonl")
    assert "finished" not in caplog.text
    go(tree, resume="auto")
    assert lines_of(run_dir / "metrics.jsonl") == before
    assert "the run is finished: all of its 13 steps are done" in caplog.text
    assert result_of(run_dir)["lengths"] == []


def test_a_run_killed_in_its_last_evaluation_has_its_steps(
    tmp_path: Path, models_dir: Path, draws: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may last longer than a job has left."""
    go(run_tree("bert", tmp_path, models_dir, "whole"))
    killed = run_tree("bert", tmp_path, models_dir, "killed")

    def evaluate(run: Run) -> dict[str, float]:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "final_metrics", evaluate)
        with pytest.raises(Killed):
            go(killed)
    draws.clear()
    run = go(killed, resume="auto")
    assert draws == {}, "no step is taken again"
    whole, resumed = (result_of(tmp_path / "runs" / name) for name in ("whole", "killed"))
    assert resumed["metrics"] == whole["metrics"]
    assert run.step == run.plan.total_steps


def test_a_run_that_goes_on_with_other_code_says_so(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", adapter={"method": "lora"}, train={"max_steps": 3})
    go(tree)
    before = result_of(tmp_path / "runs" / "run")["code"]
    assert before["earlier"] == []
    for digest in ("e" * 16, "f" * 16):
        monkeypatch.setattr(record, "SOURCE", digest)
        go(tree, resume="auto")
    expected = before | {"source": "f" * 16, "earlier": [before["source"], "e" * 16]}
    assert result_of(tmp_path / "runs" / "run")["code"] == expected


def test_a_longer_run_is_the_run_of_that_length(tmp_path: Path, models_dir: Path) -> None:
    """Where nothing is a share of the length: extended at its end, and once more on the way there."""
    whole = run_tree("bert", tmp_path, models_dir, "whole", train={"max_steps": 20})
    go(whole)
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"max_steps": 9})
    go(tree)
    for steps in (13, 20):
        tree["train"]["max_steps"] = steps
        go(tree, resume="auto")
    folder, reference = tmp_path / "runs" / "run", tmp_path / "runs" / "whole"
    steps = [line for line in lines_of(folder / "metrics.jsonl") if "loss" in line]
    assert steps == [line for line in lines_of(reference / "metrics.jsonl") if "loss" in line]
    assert lines_of(folder / "ranks.jsonl") == lines_of(reference / "ranks.jsonl")
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, reference)]
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    assert [line["step"] for line in lines_of(folder / "metrics.jsonl") if "eval" in line] == [0, 9, 13, 20]
    lengths = [{"step": 9, "before": 9, "after": 13}, {"step": 13, "before": 13, "after": 20}]
    assert result_of(folder)["lengths"] == lengths


def test_what_follows_from_the_length_is_taken_anew(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes: dict[str, Any] = {"max_steps": 10, "lr_schedule": "linear", "lr_warmup": 0.2, "checkpoint_every": 2}
    schedule = {"start": 0.4, "end": 0.8, "every": 0.2}
    tree = run_tree("bert", tmp_path, models_dir, "run", train=changes, schedule=schedule)
    go(tree)
    folder = tmp_path / "runs" / "run"
    assert [line["step"] for line in lines_of(folder / "ranks.jsonl")] == [4, 6, 8]
    del tree["train"]["max_steps"]
    tree["train"]["epochs"] = 20 * 12 / 36  # of three quarters of 48 samples
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed_in_step(14))
        with pytest.raises(Killed):
            go(tree, resume="auto")
    assert not (folder / "result.json").exists(), "it told of a run that this one is not any more"
    (line,) = [record.message for record in caplog.records if "goes on from" in record.message]
    assert line == (
        "the run of 10 steps goes on from step 10 to step 20; train.lr_schedule=linear is restated for that length: "
        "learning rate 0.00125 -> 0.00625 here, warm-up of 4 steps; events of the schedule still come after steps "
        "12, 16"
    )
    caplog.clear()
    go(yaml.safe_load((folder / "config.yaml").read_text()), resume="auto")
    assert "goes on from" not in caplog.text, "the folder's config is the one in force"
    assert [line["step"] for line in lines_of(folder / "ranks.jsonl")] == [4, 6, 8, 12, 16]
    config = parse_config(tree)
    rates = [line["lr"] for line in lines_of(folder / "metrics.jsonl") if "loss" in line]
    assert rates == [learning_rate(config.train, step, 10 if step < 10 else 20) for step in range(20)]
    assert result_of(folder)["lengths"] == [{"step": 10, "before": 10, "after": 20}]


def test_a_shorter_run(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to the step reached, not below it; a pool whose turn is past is scored at once."""
    tree = run_tree("bert", tmp_path, models_dir, "run", scoring={"warmup_steps": 0.6}, train={"checkpoint_every": 3})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed_in_step(7))
        with pytest.raises(Killed):
            go(tree)
    tree["train"]["max_steps"] = 5
    with pytest.raises(UserError, match=r"step-00000006: has done 6 steps, .* now makes 5; give 6 or more"):
        go(tree, resume="auto")
    tree["train"]["max_steps"] = 8
    run = go(tree, resume="auto")
    assert run.step == 8
    assert run.selector.table is not None
    assert result_of(tmp_path / "runs" / "run")["lengths"] == [{"step": 6, "before": 13, "after": 8}]


def test_an_older_checkpoint_can_be_named(tmp_path: Path, models_dir: Path, draws: dict[int, list[int]]) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 4, "checkpoint_keep": 9})
    go(tree)
    run_dir = tmp_path / "runs" / "run"
    before = lines_of(run_dir / "metrics.jsonl")
    draws.clear()
    go(tree, resume=str(run_dir / "checkpoints" / "step-00000004"))
    assert sorted(draws) == list(range(4, 13))
    assert lines_of(run_dir / "metrics.jsonl") == before


def test_a_checkpoint_continues_in_another_folder(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 4, "checkpoint_keep": 9})
    go(tree)
    checkpoint = str(tmp_path / "runs" / "run" / "checkpoints" / "step-00000004")
    tree["run"]["name"] = "other"
    config = parse_config(tree)
    check_run_dir(config, overwrite=False, resume=checkpoint)
    go(tree, resume=checkpoint)
    first, other = tmp_path / "runs" / "run", tmp_path / "runs" / "other"
    lines = [line for line in lines_of(first / "metrics.jsonl") if line["step"] > 4]
    assert lines_of(other / "metrics.jsonl") == lines
    assert (other / "config.yaml").exists()
    assert (other / result_of(other)["best"]["checkpoint"]).is_dir()
    with pytest.raises(UserError, match="already holds a run"):
        check_run_dir(config, overwrite=False, resume=checkpoint)
    check_run_dir(config, overwrite=False, resume="auto")


def test_a_run_that_went_back_is_not_resumed_from_the_future_it_left(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 2, "checkpoint_keep": 9})
    go(tree)
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed_in_step(7))
        with pytest.raises(Killed):
            go(tree, resume=str(checkpoints / "step-00000004"))
    assert [folder.name[-2:] for folder in sorted(checkpoints.iterdir())] == ["02", "04", "06"]
    assert not (checkpoints.parent / "result.json").exists(), "it is no finished run any more"


def test_what_leads_on_goes_first(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run that is cut short as it begins would go on from what was given up, without its record."""
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 2, "checkpoint_keep": 9})
    go(tree)
    folder = tmp_path / "runs" / "run"
    before = read_lines(folder / "metrics.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(build, "drop_after", fails)
        with pytest.raises(Killed):
            go(tree, resume=str(folder / "checkpoints" / "step-00000004"))
    assert read_lines(folder / "metrics.jsonl") == before
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fails)
        with pytest.raises(Killed):
            record.RunRecord(folder, writes=True).prepare("")
    assert not (folder / "checkpoints").exists()


def fails(*_: Any, **__: Any) -> None:
    raise Killed


def test_every_other_key_must_be_the_same(tmp_path: Path, models_dir: Path) -> None:
    config: Config = parse_config(run_tree("bert", tmp_path, models_dir, "run"))
    same_method(config, config.model_dump(mode="json"), tmp_path)
    for section, values in config.model_dump(mode="json").items():
        for key in values:
            saved = config.model_dump(mode="json")
            saved[section][key] = "something else"
            if f"{section}.{key}" in MAY_CHANGE:
                same_method(config, saved, tmp_path)
            else:
                with pytest.raises(UserError, match=rf"{section}\.{key}='something else'"):
                    same_method(config, saved, tmp_path)


@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_the_size_of_a_checkpoint(tmp_path: Path, models_dir: Path, kind: str) -> None:
    """Three float32 values for each that is trained, nothing of the base, and little else."""
    run = go(run_tree(kind, tmp_path, models_dir, "run"))
    (folder,) = [path for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir() if path.name.endswith("13")]
    trained = sum(4 * param.numel() for param in run.engine.module.parameters() if param.requires_grad)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(sizes.values()) <= 3.2 * trained + 5_000_000
    found = load_file(folder / "parameters.safetensors")
    assert sum(4 * tensor.numel() for tensor in found.values()) == 3 * trained
    headers = 200 * len(found)
    assert sizes["parameters.safetensors"] <= 3 * trained + headers
    assert sum(sizes.values()) - sizes["parameters.safetensors"] <= 100_000, "48 samples"


def test_a_checkpoint_is_verified_once(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run")
    go(tree)
    read: list[str] = []
    digest = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: (read.append(path.name), digest(path))[1])
    build_run(preflight.check(parse_config(tree)), resume="auto")
    assert sorted(read) == sorted(checkpoint.FILES)
    read.clear()
    build_run(preflight.check(parse_config(tree)), resume=str(tmp_path / "runs/run/checkpoints/step-00000013"))
    assert sorted(read) == sorted(checkpoint.FILES)


@pytest.mark.parametrize("method", ["lora", "tsqlora"])
def test_other_data_of_the_same_size_is_refused(tmp_path: Path, models_dir: Path, method: str) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", adapter={"method": method})
    go(tree)
    file = Path(tree["task"]["dataset"]["path"]) / "train.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match=r"step-00000013: was written with other training data .* start a new run"):
        build_run(preflight.check(parse_config(tree)), resume="auto")


def test_the_docs_have_the_table_of_what_may_differ() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md").read_text()
    rows = "".join(f"| `{key}` | {change} |\n" for key, change in MAY_CHANGE.items())
    assert f"|---|---|\n{rows}\n" in page
