"""Ranks by what they are worth, a size that the run finds, and ranks taken from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.runs import go, losses_of, ranks_of, read_lines, result_of, run_tree, write_config
from tests.steps import Killed, killed_in_step
from tsqlora_scale import training as loop
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.rank_file import read_rank_file

EVEN = {"selector": "full", "keep_fraction": 1.0}


def tree_of(folder: Path, models: Path, name: str, kind: str = "bert", **allocation: Any) -> dict[str, Any]:
    tree = run_tree(kind, folder, models, name, allocation=allocation, train={"checkpoint_every": 3})
    del tree["scoring"]
    return tree | {"sampling": EVEN}


def test_a_run_finds_its_size_and_the_next_one_takes_it(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tree_of(tmp_path, models_dir, "whole", policy="gain", budget="auto", tolerance=0.3, ceiling=2.0)
    folder = go(whole).record.folder
    events = ranks_of(folder)
    start = result_of(folder)["ranks_start"]
    assert len(events) == 2 and events[0] != dict.fromkeys(events[0], 4)
    assert all(0 < sum(ranks.values()) <= 2 * sum(start.values()) for ranks in events)
    for line in read_lines(folder / "ranks.jsonl"):
        curve = line["curve"]
        assert curve[-1][0] == sum(line["ranks"].values())
        assert [left for _, left in curve] == sorted((left for _, left in curve), reverse=True)

    killed = tree_of(tmp_path, models_dir, "killed", policy="gain", budget="auto", tolerance=0.3, ceiling=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed_in_step(7))
        with pytest.raises(Killed):
            go(killed)
    again = go(killed, resume="auto").record.folder
    assert (losses_of(again), ranks_of(again)) == (losses_of(folder), events)

    # what was found serves the next run: from its result, its adapter, or by hand
    found = result_of(folder)["ranks_end"]
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump(found))
    for place in (folder, folder / "result.json", folder / "adapter", tmp_path / "ranks.yaml"):
        run = build_run(
            preflight.check(parse_config(tree_of(tmp_path, models_dir, "next", policy="file", file=str(place))))
        )
        ranks = {
            name.removeprefix("base_model.model."): rank for name, rank in current_ranks(run.engine.module).items()
        }
        assert ranks == found, place
    loop.train_to_the_end(run)
    assert result_of(run.record.folder)["ranks_end"] == found
    assert losses_of(run.record.folder)[-1] < losses_of(run.record.folder)[0]
    values = load_file(run.record.folder / "adapter" / "adapter_model.safetensors")
    assert all(bool(value.any()) for name, value in values.items() if ".lora_" in name), "no factor stayed zero"


@pytest.mark.parametrize("place", ["", "adapter", "result.json"])
def test_ranks_of_a_run_are_those_of_the_adapter_that_it_kept(tmp_path: Path, place: str) -> None:
    """Of the best evaluation, they may differ from those at the end; an older run does not say."""
    (tmp_path / "adapter").mkdir()
    result: dict[str, Any] = {"ranks_end": {"query": 2}, "kept": {"which": "best", "ranks": {"query": 4}}}
    for expected in (4, 2):
        (tmp_path / "result.json").write_text(json.dumps(result))
        assert read_rank_file(tmp_path / place, key="key") == ({"query": expected}, None)
        result["kept"].pop("ranks", None)


def test_names_ends_of_names_and_ranks_of_0(tmp_path: Path, models_dir: Path) -> None:
    (tmp_path / "ranks.json").write_text(json.dumps({"layer.0.attention.self.query": 7, "query": 0, "(key|value)": 2}))
    tree = tree_of(tmp_path, models_dir, "run", policy="file", file=str(tmp_path / "ranks.json"))
    run = go(tree)
    ranks = result_of(run.record.folder)["ranks_end"]
    for name, rank in ranks.items():
        expected = {"key": 2, "value": 2, "query": 0}.get(name.rpartition(".")[2], 4)
        assert rank == (7 if name.endswith("layer.0.attention.self.query") else expected), name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{qurey: 4}", "'qurey' is no layer that is adapted"),
        ("{(query|key): 2, key: 3, qurey: 4}", "'qurey' is no layer that is adapted"),
        ("{query: many}", "'query' has 'many', which is no rank"),
        ("{query: -1}", "'query' has -1"),
        ("{query: true}", "'query' has True"),
        ("{query: 4000}", "can have more than"),
        ("{'.*': 0}", "leaves every layer without a rank"),
        ("{'(': 4}", "is no pattern"),
        ("[1, 2]", "holds no ranks"),
        ("{", "cannot be read"),
        ("{}", "holds no ranks"),
    ],
)
def test_files_that_hold_no_ranks(tmp_path: Path, models_dir: Path, text: str, words: str) -> None:
    (tmp_path / "ranks.yaml").write_text(text)
    tree = tree_of(tmp_path, models_dir, "run", policy="file", file=str(tmp_path / "ranks.yaml"))
    with pytest.raises(UserError, match=r"allocation\.file=") as caught:
        preflight.check(parse_config(tree))
    assert words in str(caught.value)


def test_no_rank_beside_a_magnitude(tmp_path: Path, models_dir: Path) -> None:
    """DoRA's, which would get no gradient."""
    (tmp_path / "ranks.yaml").write_text("{query: 0}")
    tree = tree_of(tmp_path, models_dir, "run", policy="file", file=str(tmp_path / "ranks.yaml"))
    tree["adapter"] |= {"method": "dora"}
    with pytest.raises(UserError, match=r"query rank 0, and adapter\.type='dora' trains a magnitude"):
        preflight.check(parse_config(tree))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"allocation": {"budget": "auto"}}, "'budget: auto' needs 'policy: gain'"),
        ({"allocation": {"policy": "file"}}, "needs 'file'"),
        ({"allocation": {"file": "x"}}, "is read by 'policy: file' alone"),
        ({"allocation": {"policy": "gain"}, "sensitivity": {"estimator": "adapter"}}, "does not see"),
        ({"allocation": {"policy": "gain"}, "sensitivity": {"window": 1}}, "alternate steps"),
        ({"allocation": {"policy": "file", "file": "x"}, "adapter": {"init_from": "y"}}, "both give the layers"),
    ],
)
def test_keys_that_contradict_one_another(tmp_path: Path, models_dir: Path, sections: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(run_tree("bert", tmp_path, models_dir, "run", **sections))
    assert words in str(caught.value)


def test_such_a_run_goes_on_without_the_file(tmp_path: Path, models_dir: Path) -> None:
    """Its checkpoints have the ranks."""
    (tmp_path / "ranks.yaml").write_text("{query: 2}")
    tree = tree_of(tmp_path, models_dir, "run", policy="file", file=str(tmp_path / "ranks.yaml"))
    tree["train"]["max_steps"] = 4
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["train", "--config", str(config)]) == 0
    (tmp_path / "ranks.yaml").unlink()
    assert cli.main(["train", "--config", str(config), "--resume", "auto", "train.max_steps=6"]) == 0
    assert result_of(tmp_path / "runs" / "run")["steps"] == 6
