"""A comparison's file: mistakes are one line, before anything runs; the presets are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.comparison.fakes import TREE, comparison, write_comparison
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.comparison.comparison_file import read_comparison
from tsqlora_scale.comparison.trials import TrialPlan
from tsqlora_scale.config.rank_sections import AllocationConfig

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
PRESETS = sorted((CONFIGS / "compare").glob("*.yaml"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"a": {"lrss": [1e-3]}}}, ["'arms.a.lrss'", "did you mean 'lrs'"]),
        ({"arms": {"a": {"train.lr": 0.1}}, "lrs": [0.1], "baseline": None}, ["'arms.a'", "train.lr", "'lrs'"]),
        ({"arms": {"a": {"train.epochs": 2}}, "budget": {"steps": 3}, "baseline": None}, ["train.epochs", "'budget'"]),
        ({"arms": {"a": {"model.name_or_path": "x"}}, "baseline": None}, ["model.name_or_path", "a task brings"]),
        ({"arms": {"a": {"task.label": "x"}}, "baseline": None}, ["task.label", "a task brings its data"]),
        ({"arms": {"a": {"run.seed": 1}}, "baseline": None}, ["run.seed", "comparison's"]),
        ({"arms": {"a b": {}}, "baseline": None}, ["a b"]),
        ({"arms": {"a": {"by_task": {"x": {"train.lr": 1}}}}, "baseline": None}, ["by_task", "'x'", "words"]),
        ({"arms": {"a": {"by_task": {"words": {"lr": 1}}}}, "baseline": None}, ["by_task.words", "section.key"]),
        ({"arms": {"a": {"variants": ["r2"]}}, "baseline": None}, ["'r2'", "there are none"]),
        (
            {"arms": {"a": {"by_variant": {"r2": {"adapter.r": 3}}}}, "baseline": None},
            ["by_variant", "'r2'", "there are"],
        ),
        (
            {"arms": {"a": {}, "a-b": {}}, "variants": {"b-c": {}, "c": {}}, "baseline": None},
            ["'a-b-c'", "rename"],
        ),
        ({"arms": {}}, ["arms"]),
        ({"baseline": "x"}, ["'baseline: x'", "lora, tsqlora"]),
        ({"seeds": [1, 1]}, ["seeds"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [100], "lrs": [1.0, 2.0]}, ["seed 100", "tuning.seeds"]),
        ({"budget": {"steps": 1, "seconds": 2}}, ["budget", "exactly one"]),
        ({"budget": {"steps": 0}}, ["budget.steps=0"]),
        ({"lrs": [-1.0]}, ["lrs"]),
        ({"common": {"epochs": 1}}, ["common", "'epochs'", "section.key"]),
        ({"common": {"run.name": "x"}}, ["'common' sets 'run.name'"]),
        ({"armz": {}}, ["'armz'", "did you mean 'arms'"]),
    ],
)
def test_a_mistake_is_one_line(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_comparison(write_comparison(tmp_path, **changes))
    assert [word for word in [*words, "fake.yaml"] if word not in str(caught.value)] == []


def test_a_wrong_key_of_every_arm_is_said_before_the_first_run(tmp_path: Path) -> None:
    arms = {"a": {"adapter.rr": 1}, "b": {"adapter.method": "nonsense"}, "c": {"adapter.method": "lora"}}
    with pytest.raises(UserError) as caught:
        comparison(tmp_path, arms=arms, baseline="c")
    said = str(caught.value)
    assert [
        word
        for word in ("a on words", "adapter.rr", "b on words", "'nonsense'", "nothing has been run")
        if word not in said
    ] == []
    assert "c on words" not in said
    assert not (tmp_path / "out").exists()


def test_a_task_without_held_out_rows_cannot_be_compared_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="held-out"):
        comparison(tmp_path, common={"task.dataset.dev_file": None})


def test_small_takes_the_place_of_what_it_names(tmp_path: Path) -> None:
    small = {
        "variants": {"r2": {"adapter.r": 2}},
        "arms": {"lora": None, "tsqlora": {"adapter.alpha": 4.0, "train.weight_decay": None}},
        "baseline": None,
    }
    arms = {**TREE["arms"], "tsqlora": {"train.weight_decay": 0.1, "variants": ["r4"], "by_task": {"words": {}}}}
    variants = {"r2": {"adapter.r": 2}, "r4": {"adapter.r": 4}}
    published = {"lora-r2": {"words": 1.0}}
    path = write_comparison(tmp_path, arms=arms, variants=variants, published=published, small=small)
    assert list(read_comparison(path).methods) == ["lora-r2", "lora-r4", "tsqlora-r4"]
    found = read_comparison(path, small=True)
    assert list(found.methods) == ["tsqlora-r2"]
    assert found.arms["tsqlora"].changes == {"adapter.alpha": 4.0}
    assert found.published == {}
    with pytest.raises(UserError, match="no section 'small'"):
        read_comparison(write_comparison(tmp_path), small=True)


def test_there_are_presets() -> None:
    assert [path.stem for path in PRESETS] == ["loratrf_table1", "ranks", *(f"tsqlora_table{n}" for n in (2, 3, 4, 5))]


@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets(path: Path, small: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    found = read_comparison(path, small=small)
    names = list(found.variants)[:1]  # the others differ in ranks alone
    trials = TrialPlan(
        found if small else found.model_copy(update={"variants": {n: found.variants[n] for n in names}}), tmp_path
    )
    trials.check(leave_out=True)
    reasons = {reason for cell, reason in trials.refused.items() if "adapter.method=" not in reason}
    assert reasons == set()  # methods are theirs who add them
    assert {cell.method for cell in trials.cells} - {cell.method for cell in trials.refused}
    named = set(found.published) - {"alpagasus", "less", "lima"}
    assert named <= set(found.methods)
    assert {task for told in found.published.values() for task in told} <= {*found.tasks, "parameters", "mean"}
    if small:
        assert "Stand-ins" in found.stand_ins
        assert {Path(task.config).name for task in found.tasks.values()} == {"quickstart.yaml"}
        runs = sum(
            len(found.seeds) + (len(found.tuning.seeds) * len(rates) if len(rates) > 1 else 0)
            for cell in trials.cells
            if (rates := trials.rates(cell))
        )
        assert runs <= (100 if path.stem == "ranks" else 45)  # a study with five seeds, not a look
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["title"]


def test_a_variant_of_an_arm_can_have_values_of_its_own(tmp_path: Path) -> None:
    variants = {"r2": {"adapter.r": 2}, "r6": {"adapter.r": 6}}
    adalora = {"adapter.method": "adalora", "by_variant": {"r2": {"adapter.r": 3}}}
    arms = {"lora": {"adapter.method": "lora"}, "adalora": adalora}
    plan = comparison(tmp_path, arms=arms, variants=variants, baseline="lora").trials
    assert {cell.method: plan.config(plan.probe(cell)).adapter.r for cell in plan.cells} == {
        "lora-r2": 2, "lora-r6": 6, "adalora-r2": 3, "adalora-r6": 6,
    }  # fmt: skip


@pytest.mark.parametrize("small", [False, True])
def test_loratrf_adapts_its_papers_layers(small: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever layers the tasks' files name."""
    monkeypatch.chdir(CONFIGS.parent)
    plan = TrialPlan(read_comparison(CONFIGS / "compare" / "loratrf_table1.yaml", small=small), tmp_path)
    layers = {(cell.method, str(plan.config(plan.probe(cell)).adapter.target_modules)) for cell in plan.cells}
    assert layers == {(name, "loratrf" if name == "loratrf" else "auto") for name in plan.comparison.arms}


@pytest.mark.parametrize(("key", "value"), [("train.keep", "best"), ("train.patience", 2)])
@pytest.mark.parametrize("place", ["arm", "common"])
def test_nothing_is_chosen_by_the_half_that_is_reported(place: str, key: str, value: Any, tmp_path: Path) -> None:
    chooses = {"train.eval_every": 2, key: value}
    lora = {"adapter.method": "lora"}
    changes: dict[str, Any] = {"arms": {"lora": lora | chooses}}
    if place == "common":
        changes = {"arms": {"lora": lora}, "common": chooses}
    said = rf"lora on words: {key}={value} chooses .*; set {key}: .* nothing has been run"
    with pytest.raises(UserError, match=said):
        comparison(tmp_path, lrs=[1e-3, 2e-3], **changes)
    comparison(tmp_path, **changes)  # without rates to choose from there are no halves


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", ["tsqlora_table2", "tsqlora_table4", "loratrf_table1"])
def test_adalora_ends_with_the_rank_of_the_others(name: str, small: bool) -> None:
    """``adapter.r`` is what it starts with."""
    comparison = read_comparison(CONFIGS / "compare" / f"{name}.yaml", small=small)
    arm, variants = comparison.arms["adalora"], comparison.variants or {"": {}}
    for variant, changes in variants.items():
        rank = {**comparison.common, **changes}["adapter.r"]
        start = {**changes, **arm.changes, **arm.by_variant.get(variant, {})}["adapter.r"]
        assert AllocationConfig().adalora_target(start) == rank, variant
