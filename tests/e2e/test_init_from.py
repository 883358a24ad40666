"""A new run from a trained adapter: its ranks and values, its head where the task is the same, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import go, result_of, run_tree, write_config
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.checkpoint import read_checkpoint
from tsqlora_scale.run.initial_adapter import _check_ranks
from tsqlora_scale.run.training_run import Run

LABELS_OF_OTHERS = "its labels were others"


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in run.engine.module.named_parameters() if param.requires_grad}


def start(tree: dict[str, Any]) -> Run:
    return build_run(preflight.check(parse_config(tree)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    """A finished run whose layers have different ranks."""
    folder = tmp_path_factory.mktemp("source")
    go(run_tree("bert", folder, models_dir, "first", train={"checkpoint_every": 6, "checkpoint_keep": 9}))
    return folder / "runs" / "first"


@pytest.mark.parametrize(("inside", "step"), [("", 13), ("adapter", 13), ("checkpoints/step-00000006", 6)])
def test_ranks_and_values_are_those_of_the_adapter(
    tmp_path: Path, models_dir: Path, source: Path, inside: str, step: int
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "second", adapter={"init_from": str(source / inside)})
    run = start(tree)
    state, then = read_checkpoint(source / "checkpoints" / f"step-{step:08d}")
    assert run.initial_ranks == then["ranks"]
    assert len(set(then["ranks"].values())) > 1
    values = trained(run)
    assert values.keys() == state.params.keys()
    assert all(torch.equal(value, state.params[name].value) for name, value in values.items())
    assert run.step == 0


def test_such_a_run_trains_and_resumes_without_the_adapter(tmp_path: Path, models_dir: Path, source: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    tree = run_tree("bert", tmp_path, models_dir, "second", adapter={"init_from": str(copy)}, train={"max_steps": 9})
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["train", "--config", str(config)]) == 0
    found = result_of(tmp_path / "runs" / "second")
    assert found["metrics_before"] == result_of(source)["metrics"]
    assert found["ranks_start"] == result_of(source)["ranks_end"]
    shutil.rmtree(copy)
    assert cli.main(["train", "--config", str(config), "--resume", "auto", "train.max_steps=11"]) == 0
    assert result_of(tmp_path / "runs" / "second")["steps"] == 11


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"labels": ["yes", "no"]}, LABELS_OF_OTHERS),
        ({"labels": ["no", "yes", "perhaps"]}, LABELS_OF_OTHERS),
        ({"labels": ["no", "yes"]}, None),
    ],
)
def test_a_head_is_taken_over_by_its_own_task_alone(
    tmp_path: Path,
    models_dir: Path,
    source: Path,
    caplog: pytest.LogCaptureFixture,
    task: dict[str, Any],
    reason: str | None,
) -> None:
    """The same number of classes, in another order, is another head."""
    tree = run_tree("bert", tmp_path, models_dir, "second")
    tree["task"] |= task
    fresh = trained(start(tree))
    caplog.clear()
    tree["adapter"]["init_from"] = str(source)
    values = trained(start(tree))
    state, _ = read_checkpoint(source / "checkpoints" / "step-00000013")
    heads = {name for name in values if ".lora_" not in name}
    assert heads
    for name, value in values.items():
        old = fresh if name in heads and reason else {n: entry.value for n, entry in state.params.items()}
        assert torch.equal(value, old[name]), name
    lines = [record.message for record in caplog.records if "head" in record.message]
    assert lines == ([f"adapter.init_from={str(source)!r}: the head is newly drawn, as {reason}"] if reason else [])


def test_a_head_of_another_shape_in_an_adapter_that_is_no_runs(
    tmp_path: Path, models_dir: Path, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(source / "adapter", tmp_path / "anywhere" / "deep" / "adapter")
    tree = run_tree("bert", tmp_path, models_dir, "second")
    tree["adapter"]["init_from"] = str(tmp_path / "anywhere" / "deep" / "adapter")
    tree["task"]["labels"] = ["no", "yes", "perhaps"]
    start(tree)
    assert "the head is newly drawn, as it has none of that shape" in caplog.text


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_the_other_types(tmp_path: Path, models_dir: Path, kind: str) -> None:
    go(run_tree("llama", tmp_path, models_dir, "first", adapter={"method": kind}, train={"max_steps": 3}))
    folder = tmp_path / "runs" / "first"
    adapter = {"method": kind, "init_from": str(folder)}
    values = trained(start(run_tree("llama", tmp_path, models_dir, "second", adapter=adapter)))
    state, _ = read_checkpoint(folder / "checkpoints" / "step-00000003")
    assert values.keys() == state.params.keys()
    assert all(torch.equal(value, state.params[name].value) for name, value in values.items())


REFUSED: dict[str, tuple[dict[str, dict[str, Any]], str, list[str]]] = {
    "nowhere": ({"adapter": {"init_from": "nowhere"}}, "bert", ["'nowhere'", "no folder"]),
    "another base": ({}, "deberta", ["the model has no layer bert.encoder"]),
    "another scaling": ({"adapter": {"alpha": 32}}, "bert", ["scaled by 2", "make it 8", "set adapter.alpha=8"]),
    "another type": ({"adapter": {"method": "rslora"}}, "bert", ["is a lora adapter", "adapter.type is 'rslora'"]),
    "other layers": (
        {"adapter": {"target_modules": ["query", "value"]}},
        "bert",
        ["bert.encoder.layer.0.attention.output.dense is adapted there", "set adapter.target_modules"],
    ),
    "ranks out of range": ({"allocation": {"r_max": 4}}, "bert", ["has rank", "allocation.r_max=4"]),
}


@pytest.mark.parametrize(("changes", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_before_anything_is_loaded(
    tmp_path: Path, models_dir: Path, source: Path, changes: dict[str, Any], kind: str, words: list[str]
) -> None:
    sections = {name: dict(values) for name, values in changes.items()}
    sections["adapter"] = {"init_from": str(source), **sections.get("adapter", {})}
    tree = run_tree(kind, tmp_path, models_dir, "second", **sections)
    with pytest.raises(UserError) as caught:
        preflight.check(parse_config(tree))
    assert str(caught.value).startswith("adapter.init_from=")
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


GAIN = {"allocation": {"policy": "gain", "budget": "auto", "ceiling": 8.0}}


@pytest.mark.parametrize(
    ("sections", "rank", "scaling", "words"),
    [
        (GAIN, 32, 2.0, None),
        (GAIN, 33, 2.0, "outside of allocation.r_min=1 to allocation.r_max=32"),
        ({}, 17, 2.0, "outside of allocation.r_min=1 to allocation.r_max=16"),
        ({"adapter": {"method": "rslora"}}, 16, 2.0, None),
        ({"adapter": {"method": "rslora"}}, 16, 4.0, "adapter.alpha and its rank make it 2; set adapter.alpha=16"),
    ],
)
def test_bounds_are_the_policys_and_scalings_the_types(
    tmp_path: Path, models_dir: Path, sections: dict[str, Any], rank: int, scaling: float, words: str | None
) -> None:
    """With ``adapter.r`` 4 and ``adapter.alpha`` 8."""
    config = parse_config(run_tree("bert", tmp_path, models_dir, "run", **sections))
    if words is None:
        _check_ranks(config, {"query": rank}, {"query": scaling}, "key")
        return
    with pytest.raises(UserError) as caught:
        _check_ranks(config, {"query": rank}, {"query": scaling}, "key")
    assert words in str(caught.value)


def test_another_base_of_the_same_shapes(tmp_path: Path, models_dir: Path, source: Path) -> None:
    """And the same one in another place."""
    tree = run_tree("bert", tmp_path, models_dir, "second", adapter={"init_from": str(source)})
    first = Path(tree["model"]["name_or_path"])
    for place in (tmp_path / "moved" / first.name, tmp_path / "another"):
        shutil.copytree(first, place)
        tree["model"]["name_or_path"] = str(place)
        if place.name == first.name:
            preflight.check(parse_config(tree))
        else:
            with pytest.raises(UserError, match=r"was trained on .*model\.name_or_path is .*another"):
                preflight.check(parse_config(tree))


@pytest.mark.parametrize("damage", ["description", "weights"])
def test_a_damaged_adapter(tmp_path: Path, models_dir: Path, source: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source / "adapter", copy)
    if damage == "description":
        described = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(described | {"rank_pattern": {}}))
    else:
        weights = copy / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    tree = run_tree("bert", tmp_path, models_dir, "second", adapter={"init_from": str(copy)})
    with pytest.raises(UserError, match=r"adapter\.init_from=.*adapter_model\.safetensors"):
        preflight.check(parse_config(tree))


def test_a_first_pass_with_resume_is_checked_like_any_start(
    tmp_path: Path, models_dir: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = run_tree("deberta", tmp_path, models_dir, "scored", adapter={"init_from": str(source)})
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["score", "--config", str(config), "--resume"]) == 2
    assert "adapter.init_from" in capsys.readouterr().err
