"""What lies in a base's folder beside the base, and bases that are quantised already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from tests.bad_input.models import to_pickle
from tests.classifiers import class_logits, tiny_classifier
from tests.runs import go, result_of, run_tree, write_config
from tests.tiny import tiny_model, tiny_tokenizer
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run

SHORT: dict[str, Any] = {
    "train": {"max_steps": 4, "checkpoint_every": 2},
    "allocation": {"policy": "fixed"},
    "scoring": {"warmup_steps": 1, "refresh": "none"},
}


def four_bit(source: Path, auto: Any, folder: Path, **options: Any) -> Path:
    """A model as bitsandbytes packs it, saved."""
    wanted = BitsAndBytesConfig(load_in_4bit=True, **({"bnb_4bit_quant_type": "nf4"} | options))
    auto.from_pretrained(source, quantization_config=wanted).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def not_repacked(model: Any) -> Any:
    """Matrices smaller than a block of quantisation cannot be repacked for this CPU."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def causal_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=torch.arange(5, 32).reshape(3, 9)).logits.float()
    return logits


def everything(tree: dict[str, Any], folder: Path, auto: Any, logits: Any) -> None:
    """Train, evaluate, resume, and merge: all the same function."""
    run = go(tree)
    run_dir, config = run.record.folder, str(write_config(folder / "config.yaml", tree))
    expected = logits(run.engine.module)
    assert cli.main(["evaluate", "--config", config, "--adapter", str(run_dir / "adapter")]) == 0
    resumed = go(tree | {"run": tree["run"] | {"name": "resumed"}}, resume=str(run_dir / "checkpoints/step-00000002"))
    torch.testing.assert_close(logits(resumed.engine.module), expected, rtol=0, atol=0)
    assert result_of(resumed.record.folder)["metrics"] == result_of(run_dir)["metrics"]
    out = folder / "merged"
    arguments = ["export", "--adapter", str(run_dir / "adapter"), "--format", "merged", "--config", config]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    torch.testing.assert_close(logits(auto.from_pretrained(out)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}], ids=["nf4", "fp4"]
)
def test_a_4_bit_language_model(options: dict[str, Any], tmp_path: Path, models_dir: Path) -> None:
    base = four_bit(tiny_model("llama", models_dir), AutoModelForCausalLM, tmp_path / "model", **options)
    model = {"name_or_path": str(base), "quantization": "nf4"}
    tree = run_tree("llama", tmp_path, models_dir, "run", model=model, **SHORT)
    everything(tree, tmp_path, AutoModelForCausalLM, causal_logits)
    opened = AutoModelForCausalLM.from_pretrained(base)
    opened = PeftModel.from_pretrained(not_repacked(opened), str(tmp_path / "runs" / "run" / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(causal_logits(opened), causal_logits(merged), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_a_4_bit_classifier_whose_head_is_packed_too(
    kind: str, tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    auto = AutoModelForSequenceClassification
    base = four_bit(tiny_classifier(kind, tmp_path / "whole", ["yes", "no"]), auto, tmp_path / "model")
    own = class_logits(not_repacked(auto.from_pretrained(base)))
    tree = run_tree(
        "bert", tmp_path, models_dir, "run", model={"name_or_path": str(base), "quantization": "nf4"}, **SHORT
    )
    run = build_run(preflight.check(parse_config(tree)))
    torch.testing.assert_close(class_logits(run.engine.module), own[:, [1, 0]], rtol=0, atol=1e-5)
    assert "its head is 4-bit" in caplog.text
    everything(tree, tmp_path, auto, class_logits)


def test_a_new_head_on_a_4_bit_language_model(tmp_path: Path, models_dir: Path) -> None:
    base = four_bit(tiny_model("llama", models_dir), AutoModelForCausalLM, tmp_path / "model")
    tree = run_tree(
        "bert", tmp_path, models_dir, "run", model={"name_or_path": str(base), "quantization": "nf4"}, **SHORT
    )
    everything(tree, tmp_path, AutoModelForSequenceClassification, class_logits)


def test_storage_must_be_the_files(tmp_path: Path, models_dir: Path) -> None:
    base = four_bit(tiny_model("llama", models_dir), AutoModelForCausalLM, tmp_path / "model")
    model = {"name_or_path": str(base), "quantization": "nf4", "quant_storage": "bf16"}
    with pytest.raises(UserError, match=r"stored as uint8, not bf16; set model\.quant_storage=uint8"):
        preflight.check(parse_config(run_tree("llama", tmp_path, models_dir, "run", model=model)))


def own_base(tmp_path: Path, models_dir: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("bert", models_dir), folder)
    return folder, run_tree("bert", tmp_path, models_dir, "run", model={"name_or_path": str(folder)})


def test_an_adapter_beside_the_weights_is_left_aside(
    tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, tree = own_base(tmp_path, models_dir)
    expected = class_logits(build_run(preflight.check(parse_config(tree))).engine.module)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    other = get_peft_model(model, LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    other.save_pretrained(str(folder))
    run = build_run(preflight.check(parse_config(tree)))
    torch.testing.assert_close(class_logits(run.engine.module), expected, rtol=0, atol=0)
    assert "the adapter in its adapter_config.json is left aside" in caplog.text


@pytest.mark.parametrize("beside", ["pytorch_model.bin", "optimizer.pt", "quantize_config.json", "consolidated.00.pth"])
def test_other_files_beside_the_weights_change_nothing(beside: str, tmp_path: Path, models_dir: Path) -> None:
    folder, tree = own_base(tmp_path, models_dir)
    expected = class_logits(build_run(preflight.check(parse_config(tree))).engine.module)
    (folder / beside).write_bytes(b"{}")
    found = class_logits(build_run(preflight.check(parse_config(tree))).engine.module)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"architectures": ["GPT2LMHeadModel"]}, {"quantization_config": {}}])
def test_what_the_config_may_say(changes: dict[str, Any], tmp_path: Path, models_dir: Path) -> None:
    folder, tree = own_base(tmp_path, models_dir)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    to_pickle(folder / "model.safetensors")  # the older format, too
    build_run(preflight.check(parse_config(tree)))
