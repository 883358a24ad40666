"""Plain text first, then the task: one command, one resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import losses_of, result_of, run_tree, write_config
from tests.steps import Killed, killed_in_step
from tests.tiny import masked_bert, tiny_model
from tsqlora_scale import training as loop
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.plan import fitting_micro_batch


@pytest.fixture(scope="module")
def masked_model(models_dir: Path) -> Path:
    return masked_bert(models_dir)


def tree_with_pretraining(tmp_path: Path, models: Path, model: Path, name: str, **pretrain: Any) -> dict[str, Any]:
    train = {"max_steps": 3, "micro_batch_size": 12, "checkpoint_every": 2, "checkpoint_keep": 9}
    tree = run_tree("bert", tmp_path, models, name, train=train, adapter={"r": 4, "alpha": 8, "method": "lora"})
    tree = {key: tree[key] for key in ("run", "task", "adapter", "train")}
    pretraining = {"objective": "mlm", "max_steps": 4, "batch_size": 8, **pretrain}
    return tree | {"model": {"name_or_path": str(model)}, "pretrain": pretraining}


def train(tmp_path: Path, tree: dict[str, Any], *options: str) -> int:
    return cli.main(["train", "--config", str(write_config(tmp_path / f"{tree['run']['name']}.yaml", tree)), *options])


@pytest.mark.slow
def test_the_adapter_goes_on_into_the_task(tmp_path: Path, models_dir: Path, masked_model: Path) -> None:
    """As if it were started from the pretraining's adapter by hand; and killed in either, it ends the same."""
    tree = tree_with_pretraining(tmp_path, models_dir, masked_model, "run")
    assert train(tmp_path, tree) == 0
    runs = tmp_path / "runs"
    found = result_of(runs / "run")["pretraining"]
    assert found["objective"] == "mlm" and found["steps"] == 4 and found["texts"] == 44
    assert found["metrics_before"]["loss"] != found["metrics"]["loss"]
    assert len(losses_of(runs / "run-pretrain")) == 4 and len(losses_of(runs / "run")) == 3

    by_hand = tree_with_pretraining(tmp_path, models_dir, masked_model, "by-hand")
    del by_hand["pretrain"]
    by_hand["adapter"]["init_from"] = str(runs / "run-pretrain")
    assert train(tmp_path, by_hand) == 0
    assert losses_of(runs / "by-hand") == losses_of(runs / "run")
    fresh = by_hand | {"run": tree["run"] | {"name": "fresh"}}
    fresh["adapter"] = tree["adapter"]
    assert train(tmp_path, fresh) == 0
    assert losses_of(runs / "fresh")[0] != losses_of(runs / "run")[0]

    killed = tree_with_pretraining(tmp_path, models_dir, masked_model, "killed")
    # behind a checkpoint of the pretraining; and before the first of the run itself
    for step, written in ((3, "killed-pretrain"), (1, "killed")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "optimizer_step", killed_in_step(step))
            with pytest.raises(Killed):
                train(tmp_path, killed, "--resume", "auto")
        assert (runs / written).exists()
    assert train(tmp_path, killed, "--resume", "auto") == 0
    for end in ("", "-pretrain"):
        assert losses_of(runs / f"killed{end}") == losses_of(runs / f"run{end}")
    assert result_of(runs / "killed")["pretraining"]["metrics"] == found["metrics"]


def test_the_next_token_of_a_file_before_a_causal_task(tmp_path: Path, models_dir: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"line": "the {word} was good and the film"}}\n' for word in ["plot", "actor"] * 6))
    tree = run_tree("llama", tmp_path, models_dir, "run", train={"max_steps": 2}, adapter={"r": 4, "method": "lora"})
    tree = {key: tree[key] for key in ("run", "model", "task", "adapter", "train")}
    tree["pretrain"] = {"objective": "causal", "file": str(corpus), "text": "line", "max_steps": 2}
    assert train(tmp_path, tree) == 0
    found, own = (result_of(tmp_path / "runs" / name) for name in ("run", "run-pretrain"))
    assert found["pretraining"]["texts"] == 11 * 3
    assert found["pretraining"]["seconds"] == own["wall_seconds"], "also of processes before the last one"
    assert found["pretraining"]["code"] == [found["code"]["source"]] and found["code"]["earlier"] == []


def test_no_more_samples_at_once_than_the_task_takes(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("llama", tmp_path, models_dir, "run", train={"max_steps": 2}, adapter={"r": 4, "method": "lora"})
    tree = {key: tree[key] for key in ("run", "model", "task", "adapter", "train")}
    tree["pretrain"] = {"objective": "causal", "max_steps": 2, "batch_size": 8}
    checked = preflight.check(parse_config(tree))
    assert tree["train"]["micro_batch_size"] == 6
    assert checked.pretraining is not None and checked.pretraining.plan.micro_batch_size == 4


@pytest.mark.parametrize(
    ("batch", "most", "ranks", "expected"),
    [(8, 6, 1, 4), (24, 8, 2, 6), (8, 12, 1, 8), (7, 4, 1, 1), (8, None, 2, None), (9, 2, 2, None), (1, 1, 2, None)],
)
def test_micro_batches_that_fit(batch: int, most: int | None, ranks: int, expected: int | None) -> None:
    assert fitting_micro_batch(batch, most, ranks) == expected


@pytest.mark.parametrize("method", ["lora", "houlsby", "full"])
def test_spans_before_texts_to_be_written(tmp_path: Path, models_dir: Path, method: str) -> None:
    """The task begins with what was learned from the spans, of every type of adapter."""
    tree = run_tree("t5", tmp_path, models_dir, "run", train={"max_steps": 2}, adapter={"method": method})
    tree = {key: tree[key] for key in ("run", "model", "task", "adapter", "train")}
    tree["pretrain"] = {"objective": "span", "max_steps": 3, "batch_size": 8}
    assert train(tmp_path, tree) == 0
    runs = tmp_path / "runs"
    found = result_of(runs / "run")["pretraining"]
    assert (found["objective"], found["steps"]) == ("span", 3)
    assert found["metrics_before"]["loss"] != found["metrics"]["loss"]
    by_hand = {key: tree[key] for key in ("model", "task", "train")} | {
        "run": tree["run"] | {"name": "by-hand"},
        "adapter": tree["adapter"] | {"init_from": str(runs / "run-pretrain")},
    }
    assert train(tmp_path, by_hand) == 0
    assert losses_of(runs / "by-hand") == losses_of(runs / "run")


@pytest.mark.parametrize(
    ("kind", "objective", "part"),
    [
        ("bert", "span", "has no causal form|has no seq2seq form|needs an encoder-decoder"),
        ("t5", "mlm", "has no"),
    ],
)
def test_models_that_cannot(tmp_path: Path, models_dir: Path, kind: str, objective: str, part: str) -> None:
    tree = run_tree(kind, tmp_path, models_dir, "run", pretrain={"objective": objective, "max_steps": 2})
    with pytest.raises(UserError, match=part) as caught:
        preflight.check(parse_config(tree))
    assert "pretrain.objective" in str(caught.value)


def test_a_base_without_a_masked_head_is_no_start(tmp_path: Path, models_dir: Path) -> None:
    tree = tree_with_pretraining(tmp_path, models_dir, tiny_model("bert", models_dir), "run")
    checked = preflight.check(parse_config(tree))
    assert checked.pretraining is not None
    with pytest.raises(UserError, match="a random one is no start"):
        build_run(checked.pretraining)


@pytest.mark.parametrize(("warmup", "expected"), [(500, 30), (12, 12), (0, 0), (0.1, 0.1)])
@pytest.mark.parametrize("steps", [100, 1000])
def test_the_rate_reaches_its_highest(warmup: float, expected: float, steps: int, tmp_path: Path) -> None:
    """Whatever the run's own length is, which may change while the pretraining goes on."""
    train = {"lr_warmup": warmup, "max_steps": steps}
    tree = run_tree("bert", tmp_path, tmp_path, "run", train=train, adapter={"method": "lora"})
    tree = {key: tree[key] for key in ("run", "task", "adapter", "train", "model")}
    config = parse_config(tree | {"pretrain": {"objective": "mlm", "max_steps": 300}})
    assert config.of_pretraining().train.lr_warmup == expected


def test_keys_that_pretrain_nothing() -> None:
    from tests.unit.config_trees import message
    from tests.unit.config_trees import tree as minimal

    assert "there is no 'objective'" in message(minimal(pretrain__file="a.jsonl"))
    assert "is not set; name the file" in message(minimal(pretrain={"objective": "mlm", "text": "line"}))
