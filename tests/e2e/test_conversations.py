"""A run on conversations: scored, drawn, trained and judged as any other, and its adapter answers new ones."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runs import go, losses_of, result_of, run_tree, write_config
from tests.tiny import WORDS, tiny_model
from tsqlora_scale import export, load_config, predict
from tsqlora_scale.commands import main as cli
from tsqlora_scale.model import export_formats

#: Whose turns end with a mark that is not the model's end token.
MARKED = (
    "{% for m in messages %}{{ 'actor' if m.role == 'user' else 'director' }} {{ m.content }} <mask>\n{% endfor %}"
    "{% if add_generation_prompt %}director {% endif %}"
)
TEMPLATE = (
    "{% for m in messages %}<mask> {{ 'actor' if m.role == 'user' else 'director' }} {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<mask> director {% endif %}"
)


def conversations(path: Path, rows: int, seed: int) -> None:
    """Conversations of one to three exchanges, whose answers say the question's first word twice."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            turns = []
            for _ in range(rng.randint(1, 3)):
                words = rng.choices(WORDS, k=rng.randint(1, 4))
                turns.append({"from": "human", "value": " ".join(words)})
                turns.append({"from": "gpt", "value": f"{words[0]} {words[0]}"})
            file.write(json.dumps({"conversations": turns}) + "\n")


def test_a_run(tmp_path: Path, models_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama", models_dir), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    for name, rows in (("train", 48), ("dev", 9)):
        conversations(tmp_path / f"{name}.jsonl", rows, seed=len(name))
    tree = run_tree("llama", tmp_path, models_dir, "run", model={"name_or_path": str(model)})
    tree["task"] = {
        "type": "causal",
        "messages": "conversations",
        "dataset": {"path": str(tmp_path), "train_file": "train.jsonl", "dev_file": "dev.jsonl"},
        "max_length": 32,
        "max_target_length": 6,
        "num_beams": 1,
        "metrics": ["rougeL", "perplexity", "loss"],
    }
    assert cli.main(["train", "--config", str(write_config(tmp_path / "c.yaml", tree)), "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert "director[[" in shown and "conversation: " in shown and "of them learned: " in shown
    folder = go(tree).record.folder
    losses = losses_of(folder)
    assert len(losses) == 13 and losses[-1] < losses[0] - 0.1
    assert list(folder.glob("*scores*")), "the pool was scored"
    metrics = result_of(folder)["metrics"]
    assert metrics["perplexity"] > 1 and math.isfinite(metrics["loss"]) and 0 <= metrics["rougeL"] <= 1

    new = tmp_path / "new.jsonl"
    rows = [json.loads(line)["conversations"] for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    cells = [row[:-1] for row in rows] + rows + [[]]
    new.write_text("".join(json.dumps({"conversations": cell}) + "\n" for cell in cells))
    result = predict(new, tmp_path / "out.jsonl", run=folder)
    assert (result.rows, result.empty) == (19, 1)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = [row["prediction"] for row in answers]
    assert found[:9] == found[9:18] and found[18] is None, "an answer that is given is not read"
    assert [row["conversations"] for row in answers] == cells


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("spoken", [True, False])
def test_a_merged_model_knows_where_its_answers_end(
    spoken: bool, streamed: bool, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a template's mark, which other programs read from its generation settings."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama", models_dir), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(model)
    tree = run_tree("llama", tmp_path, models_dir, "run", model={"name_or_path": str(model)})
    tree |= {"sampling": {"selector": "full"}, "scoring": {"enabled": False}, "allocation": {"policy": "fixed"}}
    if spoken:
        conversations(tmp_path / "train.jsonl", 48, seed=3)
        keys = ("source", "target")
        tree["task"] = {key: value for key, value in tree["task"].items() if key not in keys}
        tree["task"] |= {"messages": "conversations", "dataset": {"path": str(tmp_path), "train_file": "train.jsonl"}}
    tree["train"] |= {"max_steps": 2, "eval_every": None}
    folder = go(tree).record.folder
    if not streamed:

        def refused(*_: Any, **__: Any) -> None:
            raise export_formats.NotLayerByLayer("for a test")

        monkeypatch.setattr(export_formats, "StreamedMerge", refused)
    out = tmp_path / "merged"
    export(folder, "merged", out, config=load_config(write_config(tmp_path / "c.yaml", tree)))
    opened = AutoModelForCausalLM.from_pretrained(out)
    ends = opened.generation_config.eos_token_id
    assert sorted(ends) == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<mask>")]
    opened.lm_head = torch.nn.Linear(32, len(tokenizer), bias=True)  # says the mark, whatever it reads
    with torch.no_grad():
        opened.lm_head.weight.zero_()
        opened.lm_head.bias.zero_()
        opened.lm_head.bias[4] = 9.0
    assert opened.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=9, do_sample=False).shape == (1, 4)
