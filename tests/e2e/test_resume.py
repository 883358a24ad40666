"""A run that was cut short and resumed leaves the same folder as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.runs import go, read_lines, result_of, run_tree
from tests.steps import Killed, killed_in_step
from tsqlora_scale import training as loop
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.quality.draws.batch_sampler import BatchSampler
from tsqlora_scale.quality.scores.score_parts import Parts, PassPart
from tsqlora_scale.run import checkpoint, preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.preflight import check_run_dir
from tsqlora_scale.run.resume import same_method


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
    assert sorted(path.name for path in (folder / "scores" / "parts").iterdir()) == ["pass-002"]


def test_resuming_a_finished_run_adds_nothing(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"eval_every": 5})
    go(tree)
    run_dir = tmp_path / "runs" / "run"
    before = lines_of(run_dir / "metrics.jsonl")
    go(tree, resume="auto")
    assert lines_of(run_dir / "metrics.jsonl") == before


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


#: What may differ between a run and its continuation: places, and how the same batches are computed and kept.
FREE = {
    "run.output_dir", "run.name", "train.micro_batch_size", "train.eval_batch_size", "train.checkpoint_every",
    "train.checkpoint_keep", "train.eval_every", "train.max_nonfinite", "scoring.keep_sketches",
    "run.timeout_minutes",
}  # fmt: skip


def test_every_other_key_must_be_the_same(tmp_path: Path, models_dir: Path) -> None:
    config: Config = parse_config(run_tree("bert", tmp_path, models_dir, "run"))
    same_method(config, config.model_dump(mode="json"), tmp_path)
    for section, values in config.model_dump(mode="json").items():
        for key in values:
            saved = config.model_dump(mode="json")
            saved[section][key] = "something else"
            if f"{section}.{key}" in FREE:
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
