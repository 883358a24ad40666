"""Exported adapters open without anything of ours and are the trained function."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests.runs import go, run_tree, write_config
from tsqlora_scale.api import truncate
from tsqlora_scale.commands import main as cli
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.run.truncations import _layers

AUTO: dict[str, Any] = {
    "bart": AutoModelForSeq2SeqLM,
    "t5": AutoModelForSeq2SeqLM,
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
}

FRESH = """
import json, sys
sys.modules["tsqlora_scale"] = None  # as if it were not installed
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
if sys.argv[2:]:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
ids = torch.arange(5, 32).reshape(3, 9)
print(json.dumps(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist()))
"""


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.arange(5, 32).reshape(3, 9)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids[:, :4]} if kind in ("bart", "t5") else {})


def logits(model: Any, kind: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs_of(kind)).logits.float()
    return found


def trained(kind: str, tmp_path: Path, models_dir: Path, **model: Any) -> tuple[Run, Path, Path]:
    """A run whose layers have different ranks, its config file and its adapter."""
    tree = run_tree(kind, tmp_path, models_dir, "run", model=model)
    run = go(tree)
    adapter = tmp_path / "runs" / "run" / "adapter"
    ranks = json.loads((adapter / "adapter_config.json").read_text())["rank_pattern"]
    assert len(set(ranks.values())) > 1
    return run, write_config(tmp_path / "config.yaml", tree), adapter


def export(adapter: Path, form: str, *more: str) -> Path:
    out = adapter.parent / form
    assert cli.main(["export", "--adapter", str(adapter), "--format", form, "--out", str(out), *more]) == 0
    return out


def base(kind: str, run: Run) -> Any:
    labels = {} if kind in AUTO else {"num_labels": 2}
    auto = AUTO.get(kind, AutoModelForSequenceClassification)
    return auto.from_pretrained(run.config.model.name_or_path, **labels)


@pytest.mark.parametrize("kind", ["bert", "deberta", "bart", "t5", "llama", "gpt2"])
def test_padded_and_merged_are_the_same_function(kind: str, tmp_path: Path, models_dir: Path) -> None:
    run, config, adapter = trained(kind, tmp_path, models_dir)
    expected = logits(run.engine.module, kind)
    padded = export(adapter, "padded")
    described = json.loads((padded / "adapter_config.json").read_text())
    shapes = {len(value) for name, value in load_file(padded / "adapter_model.safetensors").items() if "lora_A" in name}
    assert shapes == {described["r"]}
    assert not described["rank_pattern"]
    assert not described["alpha_pattern"]
    for folder in (padded, export(adapter, "peft")):
        found = logits(PeftModel.from_pretrained(base(kind, run), str(folder)), kind)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    merged = export(adapter, "merged", "--config", str(config))
    auto = AUTO.get(kind, AutoModelForSequenceClassification)
    torch.testing.assert_close(logits(auto.from_pretrained(merged), kind), expected, atol=1e-5, rtol=0)
    assert (logits(base(kind, run), kind) - expected).abs().max() > 1e-3, "an adapter without effect tests nothing"


@pytest.mark.slow
def test_a_fresh_process_without_this_package(tmp_path: Path, models_dir: Path) -> None:
    run, config, adapter = trained("bert", tmp_path, models_dir, dropout=0.5)
    expected = logits(run.engine.module, "bert")
    path = str(run.config.model.name_or_path)
    merged = export(adapter, "merged", "--config", str(config))
    assert json.loads((merged / "config.json").read_text())["hidden_dropout_prob"] == 0, "the base's own"
    for arguments in ([str(merged)], [path, str(export(adapter, "padded"))]):
        done = subprocess.run([sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, check=True)
        found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "model", "bound"),
    [
        ("bert", {"quantization": "nf4"}, 1e-5),
        ("gpt2", {"quantization": "nf4"}, 1e-5),  # whose 4-bit weights lie the other way round
        ("bert", {"dtype": "bf16"}, 0.05),
        ("gpt2", {"dtype": "bf16"}, 0.05),
    ],
    ids=["nf4", "nf4-transposed", "bf16", "bf16-transposed"],
)
def test_merging_into_other_bases(
    kind: str, model: dict[str, Any], bound: float, tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """nf4: into what its weights stand for. bf16: the sum of base and update is rounded to 8 bits, the bound is of
    logits of about 1."""
    run, config, adapter = trained(kind, tmp_path, models_dir, **model)
    expected = logits(run.engine.module, kind)
    merged = export(adapter, "merged", "--config", str(config))
    assert ("dequantised to fp32" in capsys.readouterr().out) == ("quantization" in model)
    described = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in described
    opened = AUTO.get(kind, AutoModelForSequenceClassification).from_pretrained(merged)
    assert opened.dtype == (torch.bfloat16 if "dtype" in model else torch.float32)
    torch.testing.assert_close(logits(opened, kind), expected, atol=bound, rtol=0)


def test_a_scaling_of_its_own_goes_into_b(tmp_path: Path, models_dir: Path) -> None:
    run, _, adapter = trained("bert", tmp_path, models_dir)
    described = json.loads((adapter / "adapter_config.json").read_text())
    layer = next(iter(described["alpha_pattern"]))
    described["alpha_pattern"][layer] *= 3
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    expected = logits(PeftModel.from_pretrained(base("bert", run), str(adapter)), "bert")
    found = logits(PeftModel.from_pretrained(base("bert", run), str(export(adapter, "padded"))), "bert")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_mistakes(tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, config, adapter = trained("bert", tmp_path, models_dir)
    out = tmp_path / "out"

    def fails(*arguments: str) -> str:
        assert cli.main(["export", *arguments]) == 2
        captured = capsys.readouterr().err
        assert "Traceback" not in captured
        return captured

    assert "holds no adapter_config.json" in fails("--adapter", str(tmp_path), "--format", "peft", "--out", str(out))
    there = ["--adapter", str(adapter), "--format"]
    assert "needs --config" in fails(*there, "merged", "--out", str(out))
    assert "is the adapter itself" in fails(*there, "peft", "--out", str(adapter), "--overwrite")
    assert not out.exists()
    out.mkdir()
    (out / "precious").write_text("")
    assert "--overwrite" in fails(*there, "padded", "--out", str(out))
    assert (out / "precious").exists()
    other = run_tree("deberta", tmp_path, models_dir, "other")
    assert "the model has no layer" in fails(
        *there, "merged", "--out", str(tmp_path / "new"), "--config", str(write_config(tmp_path / "other.yaml", other))
    )
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*partial"))
    assert "holds no export that --overwrite could replace" in fails(*there, "padded", "--out", str(out), "--overwrite")
    assert (out / "precious").exists()
    (out / "adapter_config.json").write_text("{}")  # an earlier export, and something beside it
    assert cli.main(["export", *there, "padded", "--out", str(out), "--overwrite"]) == 0
    assert not (out / "precious").exists()
    assert config.exists()


@pytest.mark.parametrize("out", ["run", ".", "run/checkpoints"])
def test_what_is_exported_is_not_replaced_by_the_export(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that the adapter, or its run, or the process itself is in."""
    runs = tmp_path / "runs"
    adapter = runs / "run" / ("checkpoints/step-00000001" if "check" in out else "adapter")
    adapter.mkdir(parents=True)
    (adapter / "kept").touch()
    monkeypatch.chdir(runs)
    for given in (adapter, Path("run")):
        arguments = ["--adapter", str(given), "--format", "peft", "--out", out, "--overwrite"]
        assert cli.main(["export", *arguments]) == 2
        assert (adapter / "kept").exists()
        assert "error: --out" in capsys.readouterr().err


def test_cuts_of_triplets_leave_their_diagonals_behind(tmp_path: Path, models_dir: Path) -> None:
    """Which are of other ranks, and would be in the way of a run that starts from the cut."""
    tree = run_tree("bert", tmp_path, models_dir, "run", adapter={"method": "adalora", "r": 6}, train={"max_steps": 3})
    del tree["scoring"], tree["schedule"]
    go(tree | {"schedule": {"start": 1, "end": 2, "every": 1}})
    adapter = tmp_path / "runs" / "run" / "adapter"
    assert (adapter / "diagonals.json").is_file()
    rows = truncate(adapter, [2, 2], tmp_path / "cuts")
    assert [row["rank"] for row in rows] == [None, 2], "a rank that is named twice is one"
    assert not (tmp_path / "cuts" / "rank-2" / "diagonals.json").exists()
    assert not (export(adapter, "padded") / "diagonals.json").exists()
    again = run_tree("bert", tmp_path, models_dir, "again", train={"max_steps": 2})
    del again["scoring"]
    again |= {"adapter": tree["adapter"] | {"init_from": str(tmp_path / "cuts" / "rank-2")}}
    again["allocation"] = {"policy": "fixed"}
    assert go(again).step == 2


def test_cuts_of_rslora_scale_by_their_own_ranks(tmp_path: Path, models_dir: Path) -> None:
    """So that a run may start from them, with the alpha of the run that they were cut from."""
    method = {"method": "rslora", "r": 6, "alpha": 12}
    go(run_tree("bert", tmp_path, models_dir, "run", adapter=method, train={"max_steps": 3}))
    adapter, cut = tmp_path / "runs" / "run" / "adapter", tmp_path / "cuts" / "rank-3"
    truncate(adapter, [3], tmp_path / "cuts", by="total")
    before, after = _layers(adapter), _layers(cut)
    assert len({len(layer.a) for layer in after.values()}) > 1, "or nothing is shown"
    for name, layer in after.items():
        assert layer.scaling == pytest.approx(12 / len(layer.a) ** 0.5)
        whole, part = (torch.linalg.svdvals(each.scaling * each.b @ each.a) for each in (before[name], layer))
        torch.testing.assert_close(part[: len(layer.a)], whole[: len(layer.a)], rtol=1e-4, atol=1e-6)
    again = run_tree(
        "bert", tmp_path, models_dir, "again", adapter=method | {"r": 3, "init_from": str(cut)}, train={"max_steps": 2}
    )
    assert go(again).step == 2


def test_a_merge_into_its_base_and_on_a_machine_that_cannot_unpack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config, adapter = trained("bert", tmp_path, models_dir)
    base = run.config.model.name_or_path
    replacing = ["--adapter", str(adapter), "--format", "merged", "--out", base, "--overwrite"]
    assert cli.main(["export", *replacing, "--config", str(config)]) == 2
    assert "is the base itself" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["--adapter", str(adapter), "--format", "merged", "--out", str(tmp_path / "out")]
    assert cli.main(["export", *arguments, "--config", str(config), "model.quantization=nf4"]) == 2
    assert "needs bitsandbytes" in capsys.readouterr().err
