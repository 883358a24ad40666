"""Runs on several data sets: each has its share of the draws, through scores, S and a resumed run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoTokenizer

from tests.mixed import mixed_tree
from tests.runs import go, losses_of, result_of, run_tree
from tests.tiny import WORDS, tiny_model
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.report.result_table import print_result


@pytest.mark.parametrize("selector", ["full", "quality"])
def test_shares_hold_and_go_on(
    selector: str, tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = mixed_tree(tmp_path, models_dir, "run", selector=selector)
    tree["train"]["max_steps"] = 60
    run, folder = go(tree), tmp_path / "runs" / "run"
    result = result_of(folder)
    by_set = result["draws_by_set"]
    assert {name: (each["pool"], each["asked"]) for name, each in by_set.items()} == {
        "many": (36, 0.5),
        "few": (12, 0.5),
    }
    assert sum(each["drawn"] for each in by_set.values()) == 60 * 12
    assert abs(by_set["many"]["share"] - 0.5) < 0.09  # 5 standard deviations
    weights = run.selector._sampler.weights
    assert weights is not None
    of_few = run.task.sets.numbers[run.selector._sampler.indices] == 1
    np.testing.assert_allclose(weights[of_few].sum(), weights[~of_few].sum())
    assert set(result["metrics"]) == {"many/accuracy", "few/accuracy"}
    print_result(result)
    assert "samples of few" in capsys.readouterr().out
    assert "few" in (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    if selector == "quality":
        table, ids = ScoreTable.read(folder / "scores")
        assert ids[35:37] == ["many/35", "few/0"]
        kept = [int(np.count_nonzero(table.selected[:36])), int(np.count_nonzero(table.selected[36:]))]
        assert sum(kept) == 36 and 8 <= kept[1] <= 10, "every set keeps its share of S"
        path = run.write_scores(with_texts=True)
        assert pq.read_table(path)["data_set"].to_pylist() == ["many"] * 36 + ["few"] * 12

    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > 50:
            shutil.rmtree(checkpoint)
    losses = losses_of(folder)
    again = go(tree, resume="auto")
    assert losses_of(folder) == losses
    assert again.draws.by_set() == run.draws.by_set() == by_set
    tree["task"]["mixture"][0]["weight"] = 2.0
    with pytest.raises(UserError, match="task"):
        go(tree, resume="auto")
    assert yaml.safe_load((folder / "config.yaml").read_text())["task"]["mixture"][1]["name"] == "few"


TEMPLATE = (
    "{% for m in messages %}<mask> {{ 'actor' if m.role == 'user' else 'director' }} {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<mask> director {% endif %}"
)


def test_instructions_beside_conversations(tmp_path: Path, models_dir: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama", models_dir), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    rng = random.Random(0)
    turns = [
        [{"from": "human", "value": " ".join(rng.choices(WORDS, k=4))}, {"from": "gpt", "value": "good"}]
        for _ in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"conversations": each}) + "\n" for each in turns))
    rows = [{"instruction": "the film", "output": "bad", "input": word} for word in WORDS[:20]]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    tree = run_tree("llama", tmp_path, models_dir, "run", model={"name_or_path": str(model)})
    tree["train"]["max_steps"] = 5
    place = {"path": str(tmp_path)}
    tree["task"] = {
        "type": "causal",
        "mixture": [
            {"name": "chats", "messages": "conversations", "dataset": place | {"train_file": "chats.jsonl"}},
            {
                "name": "alpaca",
                "source": "instruction",
                "input": "input",
                "target": "output",
                "dataset": place | {"train_file": "alpaca.json", "max_train_samples": 18},
            },
        ],
        "temperature": 2.0,
        "max_length": 32,
        "max_target_length": 6,
        "metrics": ["loss"],
    }
    by_set = result_of(go(tree).record.folder)["draws_by_set"]
    assert by_set["chats"]["asked"] == pytest.approx(9**0.5 / (9**0.5 + 18**0.5), abs=1e-6)
    assert by_set["chats"]["pool"] == 9 and by_set["alpaca"]["pool"] == 18
