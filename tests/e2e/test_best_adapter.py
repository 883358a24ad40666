"""What ``adapter/`` holds, what else can be taken for an adapter, and when training ends early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import go, losses_of, read_lines, result_of, run_tree, write_config
from tests.steps import Killed, killed_in_step
from tsqlora_scale import api
from tsqlora_scale import training as loop
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import load_config, parse_config
from tsqlora_scale.report.result_table import print_result
from tsqlora_scale.run.checkpoint import read_checkpoint
from tsqlora_scale.run.trained_adapter import adapter_folder
from tsqlora_scale.run.training_run import Run

WEIGHTS = "adapter_model.safetensors"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def given_metrics(values: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy after steps, as if the development set said so."""
    evaluate = Run.evaluate

    def pretend(run: Run) -> dict[str, float]:
        with monkeypatch.context() as patch:
            patch.setattr(
                "tsqlora_scale.run.training_run.evaluate_all", lambda *_, **__: {"accuracy": values[run.step]}
            )
            return evaluate(run)

    monkeypatch.setattr(Run, "evaluate", pretend)


@pytest.fixture
def best_at_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first rank event, which is after step 4; worse from then on."""
    given_metrics({0: 0.1, 3: 0.9, 6: 0.5, 9: 0.4, 12: 0.8, 13: 0.7}, monkeypatch)


@pytest.mark.usefixtures("best_at_3")
def test_the_best_is_kept_with_its_ranks(tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "last", train={"eval_every": 3})
    last = go(tree)
    tree["run"]["name"] = "best"
    tree["train"]["keep"] = "best"
    go(tree)
    folders = {name: tmp_path / "runs" / name for name in ("last", "best")}
    found = {name: result_of(folder) for name, folder in folders.items()}
    assert losses_of(folders["best"]) == losses_of(folders["last"])
    assert found["last"]["metrics"] == found["last"]["metrics_last"] == {"accuracy": 0.7}
    assert found["best"]["metrics"] == {"accuracy": 0.9}
    assert found["best"]["metrics_last"] == {"accuracy": 0.7}
    assert {name: (one["kept"]["which"], one["kept"]["step"]) for name, one in found.items()} == {
        "last": ("last", 13),
        "best": ("best", 3),
    }
    assert set(found["best"]["kept"]["ranks"].values()) == {4}, "those of step 3"
    assert found["best"]["ranks_end"] == found["last"]["kept"]["ranks"] != found["best"]["kept"]["ranks"]
    state, tree_then = read_checkpoint(folders["best"] / "checkpoints" / "step-00000003")
    assert set(tree_then["ranks"].values()) == {4}
    kept = tensors(folders["best"] / "adapter")
    assert sorted(value.flatten()[0].item() for value in kept.values()) == sorted(
        entry.value.flatten()[0].item() for entry in state.params.values()
    )
    assert not same(kept, tensors(folders["last"] / "adapter"))
    files = [sorted(path.name for path in (folder / "adapter").iterdir()) for folder in folders.values()]
    assert files[0] == files[1]
    assert "12 of rank 4;" in (folders["best"] / "adapter" / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    print_result(found["best"])
    table = " ".join(capsys.readouterr().out.split())
    assert "accuracy of the last step │ 0.7000" in table
    assert "(the best evaluation, 3)" in table
    assert last.best is not None


def test_an_evaluation_on_start_changes_nothing_of_the_run(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {}
    for name, train in (("with", {}), ("without", {"eval_on_start": False})):
        go(run_tree("bert", tmp_path, models_dir, name, adapter={"dropout": 0.1}, train={"eval_every": 5, **train}))
        folders[name] = tmp_path / "runs" / name
    evaluated = {
        name: [line["step"] for line in read_lines(folder / "metrics.jsonl") if "eval" in line]
        for name, folder in folders.items()
    }
    assert evaluated == {"with": [0, 5, 10, 13], "without": [5, 10, 13]}
    assert losses_of(folders["with"]) == losses_of(folders["without"])
    assert same(*(tensors(folder / "adapter") for folder in folders.values()))
    found = result_of(folders["without"])
    assert found["metrics"] == result_of(folders["with"])["metrics"]
    assert found["metrics_before"] == {}
    print_result(found)
    assert f"accuracy │ {found['metrics']['accuracy']:.4f}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("changes", [{}, {"adapter": {"method": "dora", "r": 2}}, {"adapter": {"method": "rslora"}}])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_checkpoint_is_the_adapter_of_its_step(
    tmp_path: Path, models_dir: Path, kind: str, changes: dict[str, Any]
) -> None:
    """What PEFT writes and what is made of the checkpoint of the same step are the same files."""
    go(run_tree(kind, tmp_path, models_dir, "run", **changes))
    folder = tmp_path / "runs" / "run"
    with adapter_folder(folder / "checkpoints" / "step-00000013") as made:
        assert same(tensors(made), tensors(folder / "adapter"))
        files = [json.loads((one / "adapter_config.json").read_text()) for one in (made, folder / "adapter")]
        assert files[0] == files[1]
    assert not made.exists()


@pytest.mark.usefixtures("best_at_3")
def test_what_takes_an_adapter_takes_a_run_and_a_checkpoint(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"eval_every": 3, "keep": "best"})
    go(tree)
    monkeypatch.undo()
    folder = tmp_path / "runs" / "run"
    config = parse_config(tree)
    of_run = api.evaluate(config, folder)
    assert of_run == api.evaluate(config, folder / "adapter")
    assert of_run == api.evaluate(config, folder / "checkpoints" / "step-00000003")
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(folder)]) == 0
    assert capsys.readouterr().out == f"accuracy: {of_run['accuracy']:.6f}\n"
    assert cli.main(["evaluate", "--adapter", str(folder / "checkpoints" / "step-00000013")]) == 0
    for number, option in enumerate((["--run", str(folder)], ["--adapter", str(folder / "checkpoints/step-00000003")])):
        out = tmp_path / f"out-{number}"
        assert cli.main(["export", *option, "--format", "padded", "--out", str(out)]) == 0
        assert same(tensors(out), tensors(folder / "adapter"))
    merged = tmp_path / "merged"
    assert cli.main(["export", "--run", str(folder), "--format", "merged", "--out", str(merged)]) == 0
    assert (merged / "model.safetensors").is_file()
    tree["run"]["name"] = "scored"
    assert api.score(parse_config(tree), adapter=folder / "checkpoints" / "step-00000003").summary


def test_what_is_no_adapter_yet(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 3})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed_in_step(4))
        with pytest.raises(Killed):
            go(tree)
    folder = tmp_path / "runs" / "run"
    with pytest.raises(UserError, match=r"run is not over; give a checkpoint of it .*step-00000003"):
        api.evaluate(parse_config(tree), folder)
    checkpoint = folder / "checkpoints" / "step-00000003"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"step": 4}))
    with pytest.raises(UserError, match=r"state\.json.* is missing or damaged"):
        api.evaluate(parse_config(tree), checkpoint)


@pytest.mark.parametrize("place", ["nowhere", "empty", "config.yaml"])
def test_a_run_without_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """A config that lies near it by chance is not taken."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("train: {}")
    (tmp_path / "empty").mkdir()
    assert cli.main(["evaluate", "--run", place]) == 2
    assert f"--run {place!r} belongs to no run folder with a config.yaml; give --config FILE" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint_every", [None, 3])
def test_patience(
    tmp_path: Path,
    models_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    checkpoint_every: int | None,
) -> None:
    given_metrics({0: 0.1, 2: 0.5, 4: 0.6, 6: 0.6, 8: float("nan"), 10: 0.9, 12: 0.2, 13: 0.3}, monkeypatch)
    changes = {"eval_every": 2, "patience": 2, "keep": "best", "checkpoint_every": checkpoint_every}
    tree = run_tree("bert", tmp_path, models_dir, "run", train=changes)
    with monkeypatch.context() as patch:  # between the two evaluations that bring nothing better
        patch.setattr(loop, "optimizer_step", killed_in_step(7))
        with pytest.raises(Killed):
            go(tree)
    assert go(tree, resume="auto").step == 8
    folder = tmp_path / "runs" / "run"
    found = result_of(folder)
    assert found["stopped_early"] == {"step": 8, "patience": 2}
    assert (found["steps"], found["kept"]["step"], found["metrics"]) == (8, 4, {"accuracy": 0.6})
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval" in line] == [0, 2, 4, 6, 8]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))

    before = (folder / "metrics.jsonl").read_text()
    assert go(tree, resume="auto").step == 8
    assert "ended after step 8, as 2 evaluations brought nothing better" in caplog.text
    assert (folder / "metrics.jsonl").read_text() == before
    tree["train"]["patience"] = 3
    assert go(tree, resume="auto").step == 13
    found = result_of(folder)
    assert (found["stopped_early"], found["kept"]["step"], found["metrics"]) == (None, 10, {"accuracy": 0.9})
    assert load_config(folder / "config.yaml").train.patience == 3, "training from it repeats the run"
    assert found["metrics_last"] == {"accuracy": 0.3}


@pytest.mark.usefixtures("best_at_3")
def test_a_best_that_could_not_be_kept(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said, and the last step is there."""
    write = "tsqlora_scale.run.run_checkpoints.write_checkpoint"
    from tsqlora_scale.run.checkpoint import write_checkpoint

    def full(folder: Path, *arguments: Any) -> None:
        if folder.name == "step-00000003":
            raise OSError(28, "No space left on device")
        write_checkpoint(folder, *arguments)

    monkeypatch.setattr(write, full)
    go(run_tree("bert", tmp_path, models_dir, "run", train={"eval_every": 3, "keep": "best"}))
    found = result_of(tmp_path / "runs" / "run")
    assert (found["kept"]["which"], found["kept"]["step"], found["metrics"]) == ("last", 13, {"accuracy": 0.7})
    assert "adapter/ holds the last step" in caplog.text


def test_a_best_that_a_later_one_has_replaced_before_the_run_went_back(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run ends with the last step, and says so."""
    train = {"eval_every": 3, "checkpoint_every": 3, "checkpoint_keep": 2, "keep": "best", "max_steps": 9}
    tree = run_tree("bert", tmp_path, models_dir, "run", train=train)
    run_dir = tmp_path / "runs" / "run"
    with monkeypatch.context() as patch:
        given_metrics({0: 0.1, 3: 0.8, 6: 0.5, 9: 0.9}, patch)
        go(tree)
    assert result_of(run_dir)["kept"]["which"] == "best"
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000006", "step-00000009"]
    with monkeypatch.context() as patch:
        given_metrics({9: 0.4}, patch)
        go(tree, resume=str(run_dir / "checkpoints" / "step-00000006"))
    found = result_of(run_dir)
    assert (found["kept"]["which"], found["kept"]["step"], found["metrics"]) == ("last", 9, {"accuracy": 0.4})
    assert found["best"]["step"] == 3 and found["best"]["checkpoint"] is None
    assert "adapter/ holds the last step" in caplog.text


@pytest.mark.parametrize("change", [{"keep": "best"}, {"patience": 2}])
def test_what_needs_evaluations(tmp_path: Path, models_dir: Path, change: dict[str, Any]) -> None:
    key = next(iter(change))
    with pytest.raises(UserError, match=rf"train\.{key}.*no evaluations while it trains; set 'train\.eval_every'"):
        parse_config(run_tree("bert", tmp_path, models_dir, "run", train=change))
    config = parse_config(run_tree("bert", tmp_path, models_dir, "run", train={**change, "eval_every": 2}))
    write_config(tmp_path / "config.yaml", {})
    parse_config(config.for_scoring().model_dump(mode="json"))


@pytest.mark.parametrize(("last", "patience", "end"), [(0.7, 3, 12), (0.4, 3, 8), (0.4, 2, 6)])
def test_a_run_that_is_made_longer_counts_as_one_that_was_that_long(
    last: float, patience: int, end: int, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The evaluation at the end counts for ``train.patience``, once."""
    given_metrics({0: 0.1, 2: 0.6, 4: 0.5, 6: last, 8: 0.3, 10: 0.2, 12: 0.1, 13: 0.1}, monkeypatch)
    ends = {}
    for name, lengths in (("whole", [13]), ("longer", [6, 6, 13])):
        train = {"eval_every": 2, "patience": patience, "eval_on_start": False}
        tree = run_tree("bert", tmp_path, models_dir, name, train=train)
        del tree["scoring"], tree["schedule"]
        tree |= {"allocation": {"policy": "fixed"}, "sampling": {"selector": "full", "keep_fraction": 1.0}}
        for place, steps in enumerate(lengths):
            tree["train"]["max_steps"] = steps
            go(tree, resume="auto" if place else None)
        ends[name] = result_of(tmp_path / "runs" / name)["stopped_early"]
    assert ends["longer"] == ends["whole"] == {"step": end, "patience": patience}
    # which has ended: with more steps it is not said to go on, until patience is larger, too
    caplog.clear()
    tree["train"]["max_steps"] = 14
    assert go(tree, resume="auto").step == end
    assert "goes on" not in caplog.text
    monkeypatch.setattr(Run, "evaluate", lambda _: {"accuracy": 0.1})
    tree["train"]["patience"] = 9
    assert go(tree, resume="auto").step == 14
    assert result_of(tmp_path / "runs" / "longer")["lengths"][-1] == {"step": end, "before": 13, "after": 14}
