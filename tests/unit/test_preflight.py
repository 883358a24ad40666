"""The plan that follows from a config, and mistakes that only the data or the model's files show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import run_tree
from tests.tiny import tiny_model
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.describe import load_descriptions
from tsqlora_scale.run import preflight
from tsqlora_scale.run.plan import plan_run


def config_of(tmp_path: Path, models_dir: Path, **sections: dict[str, Any]) -> Config:
    return parse_config(run_tree("bert", tmp_path, models_dir, "run", **sections))


@given(micro=st.sampled_from([None, 1, 2, 3, 4, 6, 12]), world=st.integers(1, 14))
def test_a_step_is_the_global_batch_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, micro: int | None, world: int
) -> None:
    models = tmp_path_factory.getbasetemp() / "plan-models"
    models.mkdir(exist_ok=True)
    config = config_of(models, models, train={"micro_batch_size": micro})
    try:
        plan = plan_run(config, 48, world)
    except UserError as error:
        assert world > 12 or 12 % (min(micro or 12, 12 // world) * world)
        assert "train.batch_size=12" in str(error)  # noqa: PT017
    else:
        assert plan.micro_batch_size * plan.accumulation * plan.world_size == 12
        assert (plan.scoring_step, plan.schedule.events if plan.schedule else ()) == (2, (4, 8))


@pytest.mark.parametrize(
    ("sections", "epochs", "subset", "steps"),
    [
        ({}, 4, 36, 12),
        ({}, 1.5, 36, 5),
        ({"sampling": {"selector": "full"}, "scoring": {"enabled": False}}, 2, 48, 8),
        ({"adapter": {"method": "lora"}}, 2, 48, 8),
        ({"sampling": {"keep_fraction": 0.01}, "scoring": {"refresh": "none"}}, 36, 1, 3),
    ],
)
def test_epochs(
    tmp_path: Path, models_dir: Path, sections: dict[str, Any], epochs: float, subset: int, steps: int
) -> None:
    changes = {"sensitivity": {"enabled": False}, "train": {"max_steps": None, "epochs": epochs}}
    plan = plan_run(config_of(tmp_path, models_dir, **changes, **sections), 48, 1)
    assert (plan.subset_size, plan.total_steps) == (subset, steps)


def test_what_needs_a_development_file(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"eval_every": 4})
    del tree["task"]["dataset"]["dev_file"]
    with pytest.raises(UserError, match=r"'train.eval_every' is 4"):
        parse_config(tree)


def test_a_scoring_length_that_leaves_no_prompt(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("llama", tmp_path, models_dir, "run", scoring={"max_length": 2})
    tree["task"]["prefix"] = "summarize: "
    with pytest.raises(UserError, match=r"scoring\.max_length=2: .*prompt"):
        preflight.check(parse_config(tree))


@pytest.mark.parametrize("world", [1, 5])
def test_evaluation_asks_nothing_of_the_training_batch_and_data(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(preflight, "check_adapter_fits", lambda *_: None)
    config = config_of(tmp_path, models_dir)
    if world == 5:
        with pytest.raises(UserError, match=r"train\.batch_size"):
            preflight.check(config)
    (tmp_path / "data-classification" / "train.jsonl").unlink()
    described = preflight.check_evaluation(config, "adapter")
    assert len(described.task.train) == 0
    assert len(described.task.batch([0, 1], split="dev").targets) == 2


@pytest.mark.parametrize(("source", "key"), [("file", "dev_file"), ("hub", "dev_split")])
def test_evaluation_needs_a_held_out_set(tmp_path: Path, models_dir: Path, source: str, key: str) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run")
    tree["task"]["dataset"] = dataset_without_dev(tmp_path, tree, source)
    with pytest.raises(UserError, match=rf"task\.dataset\.{key} is not set, and evaluation needs it"):
        preflight.check_evaluation(parse_config(tree), "adapter")


def dataset_without_dev(folder: Path, tree: dict[str, Any], source: str) -> dict[str, Any]:
    """The pool alone, as a file or as a dataset in the hub's layout."""
    if source == "file":
        return {"path": tree["task"]["dataset"]["path"], "train_file": "train.jsonl"}
    hub = folder / "hub"
    hub.mkdir()
    shutil.copy(folder / "data-classification" / "train.jsonl", hub / "train.jsonl")
    return {"name": str(hub), "dev_split": None}


@pytest.mark.parametrize("source", ["file", "hub"])
def test_evaluation_steps_need_a_held_out_set(tmp_path: Path, models_dir: Path, source: str) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"eval_every": 5})
    tree["task"]["dataset"] = dataset_without_dev(tmp_path, tree, source)
    with pytest.raises(UserError, match=r"'train\.eval_every' is 5.*'task\.dataset\.dev_file', or 'dev_split'"):
        preflight.check(parse_config(tree))
    tree["train"]["eval_every"] = None
    assert preflight.check(parse_config(tree)).task.dev is None
    if source == "hub":
        tree["task"]["dataset"]["dev_split"] = "validation"
        with pytest.raises(UserError, match=r"split 'validation'.*dev_split"):
            preflight.check(parse_config(tree))


def test_a_model_without_the_tasks_form(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bart", tmp_path, models_dir, "run")
    tree["model"]["name_or_path"] = str(tiny_model("bert", models_dir))
    with pytest.raises(UserError, match=r"model\.name_or_path=.*bert model.*no seq2seq form.*task\.type"):
        preflight.check(parse_config(tree))


@pytest.mark.parametrize("damage", ["empty folder", "broken config", "unknown type"])
def test_a_model_folder_that_is_none(tmp_path: Path, models_dir: Path, damage: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if damage != "empty folder":
        (folder / "config.json").write_text("{" if damage == "broken config" else '{"model_type": "nosuch"}')
    config = config_of(tmp_path, models_dir, model={"name_or_path": str(folder)})
    with pytest.raises(UserError, match=r"model\.name_or_path=.*cannot be loaded") as caught:
        preflight.check(config)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_pad(tmp_path: Path, models_dir: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model("bert", models_dir).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file = folder / "tokenizer_config.json"
    settings_of = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in settings_of.items() if k not in ("pad_token", "eos_token")}))
    config = config_of(tmp_path, models_dir, model={"name_or_path": str(folder)})
    with pytest.raises(UserError, match="neither a padding nor an end token"):
        preflight.check(config)


def test_a_run_folder_that_is_a_file(tmp_path: Path, models_dir: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    config = config_of(tmp_path, models_dir, run={"output_dir": str(tmp_path / "taken")})
    with pytest.raises(UserError, match=r"run\.output_dir=.*cannot be written to"):
        preflight.check_run_dir(config, overwrite=False, resume=None)


@pytest.mark.parametrize("family", ["bert", "deberta", "bart", "t5", "llama"])
def test_one_dropout_for_the_whole_base(tmp_path: Path, models_dir: Path, family: str) -> None:
    """Every dropout of the built model has it, modules and functional ones; layer dropout is left alone."""
    from tsqlora_scale.model.base_model import skeleton
    from tsqlora_scale.tasks import auto_class_of

    config = parse_config(run_tree(family, tmp_path, models_dir, "run", model={"dropout": 0.25}))
    described, _ = load_descriptions(config, str(config.model.name_or_path))
    bare = skeleton(auto_class_of(config.task), described, trust_remote_code=False)
    modules = [part.p for part in bare.modules() if isinstance(part, torch.nn.Dropout)]
    functional = [value for part in bare.modules() for name, value in vars(part).items() if name.endswith("dropout")]
    found = [value for value in [*modules, *functional] if isinstance(value, float)]
    assert found
    assert set(found) == {0.25}
    assert getattr(described, "encoder_layerdrop", 0.0) == 0.0


def test_a_models_own_code_runs_only_when_asked_for(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("bert", models_dir), folder)
    described = json.loads((folder / "config.json").read_text())
    own = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "code_of_its_own.Config"}}
    (folder / "config.json").write_text(json.dumps(described | own))
    (folder / "code_of_its_own.py").write_text("raise RuntimeError('its code was run')")
    tree = run_tree("bert", tmp_path, models_dir, "run", model={"name_or_path": str(folder)})
    with pytest.raises(UserError, match=r"code of its own, which runs only with model\.trust_remote_code=true"):
        preflight.check(parse_config(tree))
    assert not (tmp_path / "modules").exists()
    tree["model"]["trust_remote_code"] = True
    with pytest.raises(UserError, match="its code was run"):
        preflight.check(parse_config(tree))
