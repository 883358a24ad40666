"""Layers that lose their adapter and get it back: in a run, in a resumed one, in the file that is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests.runs import go, losses_of, ranks_of, run_tree, write_config
from tests.steps import Killed, killed_in_step
from tsqlora_scale import training as loop
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model.adapters.lora import LoraAdapter, short_name
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run

AUTO: dict[str, Any] = {"bert": AutoModelForSequenceClassification, "bart": AutoModelForSeq2SeqLM}


POLICY = "tests.policies:RemoveAndRestore"


def tree_of(kind: str, tmp_path: Path, models_dir: Path, name: str, **sections: Any) -> dict[str, Any]:
    """Layers are removed after steps 4 and 12, and come back after step 8; scores are refreshed each time."""
    sections |= {"schedule": {"start": 4, "end": 12, "every": 4}, "allocation": {"policy": POLICY}}
    return run_tree(kind, tmp_path, models_dir, name, **sections)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_the_adapter_of_a_run_that_removed_layers(tmp_path: Path, models_dir: Path, kind: str) -> None:
    tree = tree_of(kind, tmp_path, models_dir, "run")
    run = go(tree)
    run_dir = tmp_path / "runs" / "run"
    removed = {short_name(name) for name, rank in current_ranks(run.engine.module).items() if not rank}
    assert len(removed) == -(-len(current_ranks(run.engine.module)) // 3)
    assert [sum(r == 0 for r in ranks.values()) for ranks in ranks_of(run_dir)] == [len(removed), 0, len(removed)]
    adapter = run_dir / "adapter"
    described = json.loads((adapter / "adapter_config.json").read_text())
    assert set(described["exclude_modules"]) == removed
    assert not removed & described["rank_pattern"].keys()
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(value.numel() for value in tensors.values())
    assert not [name for name in tensors if any(f".{layer}.lora_" in name for layer in removed)]

    expected = logits(run.engine.module)
    config = write_config(tmp_path / "config.yaml", tree)
    for form in ("peft", "padded", "merged"):
        out = tmp_path / form
        more = ["--config", str(config)] if form == "merged" else []
        assert cli.main(["export", "--adapter", str(adapter), "--format", form, "--out", str(out), *more]) == 0
        labels = {} if kind == "bart" else {"num_labels": 2}
        if form == "merged":
            opened = AUTO[kind].from_pretrained(out)
        else:
            base = AUTO[kind].from_pretrained(tree["model"]["name_or_path"], **labels)
            opened = PeftModel.from_pretrained(base, str(out))
        torch.testing.assert_close(logits(opened), expected, atol=1e-5, rtol=0)

    started = build_run(preflight.check(parse_config(tree | {"run": {"name": "more"}})), adapter=str(adapter))
    assert current_ranks(started.engine.module) == current_ranks(run.engine.module)
    torch.testing.assert_close(logits(started.engine.module), expected, atol=1e-5, rtol=0)


def test_an_adapter_of_other_layers_is_still_refused(tmp_path: Path, models_dir: Path) -> None:
    """That a layer was removed must be said in its config; a missing one is a mistake."""
    go(tree_of("bert", tmp_path, models_dir, "run"))
    adapter = tmp_path / "runs" / "run" / "adapter"
    described = json.loads((adapter / "adapter_config.json").read_text())
    described["exclude_modules"] = described["exclude_modules"][1:]
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    fresh = build_run(preflight.check(parse_config(tree_of("bert", tmp_path, models_dir, "fresh"))))
    with pytest.raises(UserError, match=r"has no .*lora_A"):
        LoraAdapter().read(fresh.engine.module, adapter)


@pytest.mark.parametrize(
    ("killed_at", "grow_init"), [(6, "orthogonal"), (10, "gradient")], ids=["while removed", "after coming back"]
)
def test_a_run_with_removed_layers_resumes(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, grow_init: str
) -> None:
    """From steps 5 and 10, of which the sensitivity has heard some of those before the next event."""
    changes: dict[str, Any] = {
        "train": {"checkpoint_every": 5, "checkpoint_keep": 3},
        "resize": {"grow_init": grow_init},
    }
    go(tree_of("bert", tmp_path, models_dir, "whole", **changes))
    killed = tree_of("bert", tmp_path, models_dir, "killed", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed_in_step(killed_at))
        with pytest.raises(Killed):
            go(killed)
    go(killed, resume="auto")
    whole, again = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    assert losses_of(again) == losses_of(whole)
    assert ranks_of(again) == ranks_of(whole)
    files = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, again)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
