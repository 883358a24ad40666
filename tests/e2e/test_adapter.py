"""The adapter that a run leaves: what is in the file, and that other programs read the same model from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from tests.runs import go, result_of, run_tree, write_config
from tests.tiny import tiny_model
from tsqlora_scale.commands import main as cli


def test_mpnet_opens_in_plain_peft(tmp_path: Path, models_dir: Path) -> None:
    """An encoder whose head, pooling layer included, is all new."""
    path = str(tiny_model("mpnet", models_dir))
    run = go(run_tree("bert", tmp_path, models_dir, "run", model={"name_or_path": path}))
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    fresh = PeftModel.from_pretrained(base, str(tmp_path / "runs" / "run" / "adapter")).eval()
    assert_same_logits(run.engine.module, fresh)


def test_4_bit_llama_opens_in_plain_peft(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("llama", tmp_path, models_dir, "run", model={"quantization": "nf4"})
    run = go(tree)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tree["model"]["name_or_path"], quantization_config=quantised)
    fresh = PeftModel.from_pretrained(base, str(tmp_path / "runs" / "run" / "adapter")).eval()
    for module in fresh.modules():  # matrices smaller than a quantisation block cannot be repacked for this CPU
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert_same_logits(run.engine.module, fresh)


def assert_same_logits(trained: Any, fresh: Any) -> None:
    ids = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = trained.eval()(**inputs).logits
        torch.testing.assert_close(fresh(**inputs).logits, expected, atol=1e-5, rtol=0)
        with fresh.disable_adapter():
            assert (fresh(**inputs).logits - expected).abs().max() > 1e-3, "an adapter without effect tests nothing"


def test_file_and_command(tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file holds the factors of every layer at its own rank and the new head; ``evaluate`` reads it back."""
    tree = run_tree("deberta", tmp_path, models_dir, "run")
    go(tree)
    run_dir = tmp_path / "runs" / "run"
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    result = result_of(run_dir)

    assert config["rank_pattern"] == result["ranks_end"]
    for layer, rank in config["rank_pattern"].items():
        assert tensors.pop(f"base_model.model.{layer}.lora_A.weight").shape[0] == rank
        assert tensors.pop(f"base_model.model.{layer}.lora_B.weight").shape[1] == rank
    head = {name.removeprefix("base_model.model."): tuple(value.shape) for name, value in tensors.items()}
    assert head == {
        "classifier.weight": (2, 32), "classifier.bias": (2,),
        "pooler.dense.weight": (32, 32), "pooler.dense.bias": (32,),
    }  # fmt: skip
    everything = load_file(run_dir / "adapter" / "adapter_model.safetensors").values()
    assert sum(value.numel() for value in everything) == result["trainable_parameters"]

    yaml = str(write_config(tmp_path / "config.yaml", tree))
    capsys.readouterr()
    assert cli.evaluate(["--config", yaml, "--adapter", str(run_dir / "adapter")]) == 0
    assert capsys.readouterr().out == f"accuracy: {result['metrics']['accuracy']:.6f}\n"


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors", "folder"])
def test_evaluate_without_an_adapter(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    folder = tmp_path / "adapter"
    if missing != "folder":
        folder.mkdir()
        for name in {"adapter_config.json", "adapter_model.safetensors"} - {missing}:
            (folder / name).write_text("{}")
    assert cli.evaluate(["--config", str(config), "--adapter", str(folder)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert str(folder) in lines[0]
    assert (missing if missing != "folder" else "--adapter") in lines[0]
