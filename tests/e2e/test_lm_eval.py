"""Tasks of lm-evaluation-harness, of the base and of the adapter: an offline task, checked by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
import yaml
from peft import PeftModel

from tests.runs import go, run_tree, write_config
from tests.vocabularies import IDS, LLAMA3, SIZES, byte_level, trained
from tsqlora_scale import load_adapter
from tsqlora_scale.commands import main as cli

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra lm_eval")

QUESTIONS = ["the film", "a lovely story", "the plot was", "Don't watch", "there's no", "scenes and"]
#: Sections of a run by scores and changing ranks.
OF_THE_METHOD = ("scoring", "sampling", "sensitivity", "allocation", "schedule", "resize")
#: Of a base whose positions are in a table, and tokens that are written.
GPT2 = {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
NEW = 4
CHOICES = [" dull", " lovely", " a plot"]


def task_folder(folder: Path, right: list[int]) -> Path:
    """A task of multiple choice in a local file, and one whose file is not there."""
    folder.mkdir()
    rows = [{"question": q, "choices": CHOICES, "gold": gold} for q, gold in zip(QUESTIONS, right, strict=True)]
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_choice", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    missing = task | {"task": "tiny_missing", "dataset_kwargs": {"data_files": {"test": str(folder / "no.json")}}}
    for name, tree in (("tiny", task), ("missing", missing)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


@torch.no_grad()
def choices_of(model: Any, tokenizer: Any) -> list[int]:
    """The most likely choice of every question."""
    found = []
    for question in QUESTIONS:
        scores = []
        for choice in CHOICES:
            start, ids = len(tokenizer(question)["input_ids"]), tokenizer(question + choice)["input_ids"]
            logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[k - 1, ids[k]]) for k in range(start, len(ids))))
        found.append(scores.index(max(scores)))
    return found


@pytest.mark.slow
def test_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers by hand, in the table and in the file; what is not there is one line."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    adapter, config, _ = trained(t.LlamaConfig(**SIZES, **IDS), byte_level(LLAMA3), tmp_path)
    path = write_config(tmp_path / "config.yaml", tree_of(config))
    base: Any = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "base")
    before = choices_of(base, tokenizer)
    after = choices_of(PeftModel.from_pretrained(base, str(adapter)).eval(), tokenizer)
    share = sum(one == other for one, other in zip(before, after, strict=True)) / len(QUESTIONS)
    assert share < 1, "an adapter without effect tests nothing"
    folder = task_folder(tmp_path / "tasks", before)
    arguments = ["evaluate", "--adapter", str(adapter), "--config", str(path), "--lm-eval-tasks", str(folder)]
    file = tmp_path / "numbers.json"
    assert cli.main([*arguments, "--lm-eval", "tiny_choice", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    row = json.loads(file.read_text())["tasks"]["tiny_choice"]["acc"]
    assert (row["base"], row["adapter"]) == pytest.approx((1.0, share))
    assert "1.0000" in said and f"{share:.4f}" in said
    import lm_eval.tasks as index

    known = index.TaskManager
    monkeypatch.setattr(index, "TaskManager", lambda **options: known(**options | {"include_defaults": False}))
    assert cli.main([*arguments, "--lm-eval", "tiny_*,nosuch"]) == 2  # the harness' own would take a minute to read
    assert "--lm-eval 'nosuch' is no task that lm-evaluation-harness knows" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*arguments, "--lm-eval", "tiny_missing"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --lm-eval: the task tiny_missing cannot be prepared (")
    assert "without a network its data must have been fetched before" in error


def writing_task(folder: Path, texts: list[str], written: list[str]) -> None:
    """A task of going on with texts in a local file."""
    rows = [{"text": text, "target": target} for text, target in zip(texts, written, strict=True)]
    (folder / "texts.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_writing", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.json")}},
        "doc_to_text": "{{text}}", "doc_to_target": "{{target}}", "target_delimiter": "",
        "generation_kwargs": {"until": ["<|im_start|>"], "max_gen_toks": NEW, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "writing.yaml").write_text(yaml.safe_dump(task))


@torch.no_grad()
def written_by(model: Any, tokenizer: Any, texts: list[str], width: int) -> list[str]:
    """What a model goes on with, token by token, after the last ``width - NEW`` tokens of every text."""
    found = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][NEW - width :]
        for _ in range(NEW):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(tokenizer.decode(ids[-NEW:], skip_special_tokens=True))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prompt", "full", "lora"])
def test_what_peft_has_none_of_and_a_tied_head(
    method: str, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: the base's own file, whatever has become of it since. Texts are longer than the base has positions."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    random = t.AutoModelForCausalLM.from_config(t.GPT2Config(**GPT2, **IDS))
    for name, param in random.named_parameters():
        param.data.normal_(float("ln_" in name and "weight" in name), 0.2)
    random.save_pretrained(tmp_path / "base")
    byte_level(LLAMA3).save_pretrained(tmp_path / "base")
    tree = run_tree("llama", tmp_path, models_dir, "run", train={"lr": 0.3, "max_steps": 4})
    adapted = {"target_modules": ["c_attn", "lm_head"]} if method == "lora" else {}
    tree |= {"adapter": {"method": method} | adapted, "model": {"name_or_path": str(tmp_path / "base")}}
    tree = {key: values for key, values in tree.items() if key not in OF_THE_METHOD}
    adapter = go(tree).record.folder / "adapter"
    base: Any = t.AutoModelForCausalLM.from_pretrained(tree["model"]["name_or_path"])
    tokenizer = t.AutoTokenizer.from_pretrained(tree["model"]["name_or_path"])
    before = choices_of(base, tokenizer)
    model, ahead = load_adapter(base, adapter).eval(), 20 if method == "prompt" else 0
    after = choices_of(model, tokenizer)
    share = sum(one == other for one, other in zip(before, after, strict=True)) / len(QUESTIONS)
    assert share < 1, "an adapter without effect tests nothing"
    folder, file = task_folder(tmp_path / "tasks", before), tmp_path / "numbers.json"
    texts, width = [f"{question} " * 60 for question in QUESTIONS], GPT2["n_positions"] - ahead
    bare = t.AutoModelForCausalLM.from_pretrained(tree["model"]["name_or_path"])
    written, then = written_by(bare, tokenizer, texts, width), written_by(model, tokenizer, texts, width)
    writing_task(folder, texts, written)
    arguments = ["--config", str(write_config(tmp_path / "config.yaml", tree)), "--lm-eval-tasks", str(folder)]
    arguments += ["--lm-eval", "tiny_choice,tiny_writing", "--json", str(file)]
    assert cli.main(["evaluate", "--adapter", str(adapter), *arguments]) == 0
    tasks = json.loads(file.read_text())["tasks"]
    row = tasks["tiny_choice"]["acc"]
    assert (row["base"], row["adapter"]) == pytest.approx((1.0, share))
    row = tasks["tiny_writing"]["exact_match"]
    same = sum(one == other for one, other in zip(written, then, strict=True)) / len(texts)
    assert (row["base"], row["adapter"]) == pytest.approx((1.0, same))


def tree_of(config: Any) -> dict[str, Any]:
    """A config as a tree again."""
    tree: dict[str, Any] = yaml.safe_load(config.to_yaml())
    return tree
