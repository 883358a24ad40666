"""Adapters for vLLM, and cut to lower ranks: opened by PEFT, what they say is what they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.reference.ranks import best_approximation
from tests.runs import go, run_tree
from tsqlora_scale import UserError, evaluate, export, truncate
from tsqlora_scale.commands import main as cli
from tsqlora_scale.config.load import load_config
from tsqlora_scale.model.padded_adapter import VLLM_RANKS

IDS = torch.arange(5, 32).reshape(3, 9)
FRESH = """
import json, sys
sys.modules["tsqlora_scale"] = None  # as if it were not installed
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
print(json.dumps(model(input_ids=torch.arange(5, 32).reshape(3, 9)).logits.tolist()))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> tuple[Path, str, torch.Tensor]:
    """A run folder of a causal model whose layers have different ranks and a scaling of 8 / 3, its base, its logits."""
    folder = tmp_path_factory.mktemp("served")
    run = go(run_tree("llama", folder, models_dir, "run", adapter={"r": 3, "alpha": 8}))
    with torch.no_grad():
        expected = run.engine.module.eval()(input_ids=IDS).logits
    return folder / "runs" / "run", str(run.config.model.name_or_path), expected


def logits(base: str, adapter: Path) -> torch.Tensor:
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.slow
def test_an_adapter_for_vllm(trained: tuple[Path, str, torch.Tensor], tmp_path: Path) -> None:
    """In a process without this package. vLLM itself needs a GPU; what its loader asks of an adapter is checked."""
    run, base, expected = trained
    out = tmp_path / "out"
    notes = export(run, "vllm", out)
    described = json.loads((out / "adapter_config.json").read_text())
    largest = max(json.loads((run / "adapter" / "adapter_config.json").read_text())["rank_pattern"].values())
    rank = min(size for size in VLLM_RANKS if size >= largest)
    assert rank > largest, "nothing to fill up tests nothing"
    assert described["r"] == rank and f"--max-lora-rank {rank}" in notes[0]
    assert not described["rank_pattern"] and not described["alpha_pattern"]
    assert described["lora_alpha"] / described["r"] == 8 / 3, "exactly"
    assert described["modules_to_save"] is None and described["bias"] == "none"
    assert not described["use_dora"] and not described["use_rslora"]
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        assert rank in tensor.shape and name.endswith((".lora_A.weight", ".lora_B.weight"))
    done = subprocess.run([sys.executable, "-c", FRESH, base, str(out)], capture_output=True, text=True, check=True)
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("largest", "expected"), [(1, 1), (2, 8), (9, 16), (257, 320), (512, 512)])
def test_the_next_rank_that_vllm_takes(largest: int, expected: int, tmp_path: Path) -> None:
    adapter = adapter_of_rank(largest, tmp_path / "adapter")
    export(adapter, "vllm", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == expected
    assert expected in VLLM_RANKS


def test_a_rank_beyond_vllms(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a layer has rank 513, vLLM takes 512 at most; export it as merged"):
        export(adapter_of_rank(513, tmp_path / "adapter"), "vllm", tmp_path / "out")


def adapter_of_rank(rank: int, folder: Path) -> Path:
    """An adapter of one small layer."""
    folder.mkdir()
    LoraConfig(r=rank, lora_alpha=5, target_modules=["q"], task_type="CAUSAL_LM").save_pretrained(folder)
    layer = "base_model.model.q.lora_"
    save_file(
        {f"{layer}A.weight": torch.ones(rank, 4), f"{layer}B.weight": torch.ones(4, rank)},
        folder / "adapter_model.safetensors",
    )
    return folder


def test_cuts_to_lower_ranks(
    trained: tuple[Path, str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each opens as it is, is the best approximation of every layer, and has the numbers of the table."""
    run, base, expected = trained
    out = tmp_path / "cut"
    assert cli.main(["export", "--run", str(run), "--ranks", "1,2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    rows = {row["rank"]: row for row in json.loads((out / "truncations.json").read_text())["rows"]}
    assert set(rows) == {None, 1, 2}
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    layers = [name.removesuffix("lora_A.weight") for name in whole if name.endswith("lora_A.weight")]
    for rank in (1, 2):
        cut = load_file(out / f"rank-{rank}" / "adapter_model.safetensors")
        for layer in layers:
            product = whole[f"{layer}lora_B.weight"].double() @ whole[f"{layer}lora_A.weight"].double()
            found = cut[f"{layer}lora_B.weight"] @ cut[f"{layer}lora_A.weight"]
            torch.testing.assert_close(found.double(), best_approximation(product, rank), atol=1e-6, rtol=0)
        assert rows[rank]["parameters"] == sum(value.numel() for value in cut.values())
        metrics = rows[rank]["metrics"]
        assert set(metrics) == {"rougeL", "loss"}
        opened = load_config(run / "config.yaml", ["task.metrics=[loss]"])
        assert evaluate(opened, out / f"rank-{rank}") == pytest.approx({"loss": metrics["loss"]}, abs=1e-5)
        assert f"{metrics['loss']:.4f}" in said
    assert rows[1]["error"] > rows[2]["error"] > 0
    assert rows[1]["metrics"]["loss"] != rows[None]["metrics"]["loss"]
    assert (logits(base, out / "rank-1") - expected).abs().max() > (logits(base, out / "rank-2") - expected).abs().max()


def test_a_total_shared_out(trained: tuple[Path, str, torch.Tensor], tmp_path: Path) -> None:
    """By singular values of all layers: as many components, less is lost, every layer keeps its scaling."""
    run, base, expected = trained
    uniform = truncate(run, [2], tmp_path / "uniform")
    total = truncate(run, [2], tmp_path / "total", by="total")
    assert sum(total[1]["ranks"].values()) == 2 * len(total[1]["ranks"])
    assert total[1]["error"] < uniform[1]["error"]
    assert "metrics" not in total[1]
    described = json.loads((tmp_path / "total" / "rank-2" / "adapter_config.json").read_text())
    for name, rank in described["rank_pattern"].items():
        assert described["alpha_pattern"][name] / rank == pytest.approx(8 / 3)
    assert (logits(base, tmp_path / "total" / "rank-2") - expected).abs().max() > 1e-4
    with pytest.raises(UserError, match="exists"):
        truncate(run, [2], tmp_path / "total")
