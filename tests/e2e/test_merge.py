"""Merged models of architectures that share weights between layers, or keep them the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests import zoo
from tests.runs import go, run_tree, write_config, write_data
from tsqlora_scale.commands import main as cli


def logits(model: Any, kind: str) -> torch.Tensor:
    ids = torch.arange(5, 32).reshape(3, 9)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in zoo.SEQ2SEQ:
        inputs["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits.float()
    return found


def adapter_on(kind: str, folder: Path, models: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    """An adapter of large effect on a model, and its logits."""
    base = zoo.auto_of(kind).from_pretrained(zoo.saved(kind, models, "seq2seq" if kind in zoo.SEQ2SEQ else "causal"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, **options))
        for name, param in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(param, std=0.3)
            elif param.requires_grad:
                param.data += 0.3 * torch.randn(param.shape)
    expected = logits(model, kind)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", expected


def merged(kind: str, adapter: Path, folder: Path, models: Path) -> tuple[Any, Path]:
    """The adapter merged by the command, and opened by Transformers alone."""
    config = write_config(folder / "config.yaml", zoo.tree_of(kind, folder, models))
    out = folder / "merged"
    arguments = ["--adapter", str(adapter), "--format", "merged", "--out", str(out), "--config", str(config)]
    assert cli.main(["export", *arguments]) == 0
    return zoo.auto_of(kind).from_pretrained(out), out


HEAD: dict[str, dict[str, Any]] = {
    "llama-tied": {"target_modules": ["q_proj", "lm_head"]},
    "qwen2-tied": {"target_modules": ["lm_head"]},
    "gpt2": {"target_modules": ["c_attn", "lm_head"]},
    "gemma3": {"target_modules": ["language_model.layers.0.self_attn.q_proj", "lm_head"]},
    "bloom": {"target_modules": ["query_key_value", "lm_head"]},
    "bart": {"target_modules": ["q_proj", "lm_head"]},
    "mbart": {"target_modules": ["lm_head"]},
    "t5": {"target_modules": ["q", "lm_head"]},
    "mt5": {"target_modules": ["lm_head"]},
    "umt5": {"target_modules": ["lm_head"]},
    "bert-decoder": {"target_modules": ["query", "cls.predictions.decoder"]},
    "opt": {"target_modules": ["lm_head"]},
}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama-tied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    ("t5", {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    ("bart", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
]
CASES = [*HEAD.items(), *OTHERS]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{kind} {options}" for kind, options in CASES])
def test_a_tied_layer_that_is_adapted(kind: str, options: dict[str, Any], tmp_path: Path, models_dir: Path) -> None:
    adapter, expected = adapter_on(kind, tmp_path, models_dir, **options)
    opened, out = merged(kind, adapter, tmp_path, models_dir)
    torch.testing.assert_close(logits(opened, kind), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    described = json.loads((out / "config.json").read_text())
    assert described["tie_word_embeddings"] is False
    assert described.get("text_config", described)["tie_word_embeddings"] is False


def test_an_adapted_embedding_is_not_padded(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = adapter_on("llama-tied", tmp_path, models_dir, target_modules=["q_proj", "embed_tokens"])
    arguments = ["--adapter", str(adapter), "--format", "padded", "--out", str(tmp_path / "out")]
    assert cli.main(["export", *arguments]) == 2
    assert "lora_embedding_A adapts an embedding" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_on_a_tied_head(tmp_path: Path, models_dir: Path) -> None:
    """The run's own adapter, whose head has a rank of its own at the end; two rank events."""
    tree = run_tree("bert", tmp_path, models_dir, "run", adapter={"target_modules": ["q_proj", "lm_head"]})
    tree["model"]["name_or_path"] = str(zoo.saved("llama-tied", models_dir, "causal"))
    tree["task"] = write_data(tmp_path / "data-causal", "causal")
    run = go(tree)
    expected = logits(run.engine.module, "llama-tied")
    adapter = tmp_path / "runs" / "run" / "adapter"
    assert not any("embed_tokens" in name for name in load_file(adapter / "adapter_model.safetensors"))
    opened, _ = merged("llama-tied", adapter, tmp_path, models_dir)
    torch.testing.assert_close(logits(opened, "llama-tied"), expected, atol=1e-5, rtol=0)
    base = zoo.auto_of("llama-tied").from_pretrained(tree["model"]["name_or_path"])
    assert (logits(base, "llama-tied") - expected).abs().max() > 1e-3
    unmerged = PeftModel.from_pretrained(base, str(adapter))
    torch.testing.assert_close(logits(unmerged, "llama-tied"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", [False, True])
def test_a_gpt2_classifies(head: bool, tmp_path: Path, models_dir: Path) -> None:
    """A new head, scored with the factors or not."""
    tree = run_tree("bert", tmp_path, models_dir, "run", resize={"grow_init": "gradient"})
    tree["scoring"]["include_head"] = head
    tree["model"]["name_or_path"] = str(zoo.saved("gpt2", models_dir, "causal"))
    run = go(tree)
    ids = torch.arange(5, 32).reshape(3, 9)
    with torch.no_grad():
        expected = run.engine.module.eval()(input_ids=ids).logits
    adapter, out = tmp_path / "runs" / "run" / "adapter", tmp_path / "merged"
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["evaluate", "--adapter", str(adapter), "--config", str(config)]) == 0
    arguments = ["--adapter", str(adapter), "--format", "merged", "--out", str(out), "--config", str(config)]
    assert cli.main(["export", *arguments]) == 0
    with torch.no_grad():
        found = zoo.auto_of("gpt2", "classification").from_pretrained(out).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
