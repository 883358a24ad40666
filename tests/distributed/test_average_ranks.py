"""Plain text first, learning rates by depth, the average and the teacher: the same run under every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.launch import ROOT, launch
from tests.runs import go, losses_of, ranks_of, read_lines, result_of, run_tree, write_config
from tests.tiny import masked_bert
from tsqlora_scale.commands import main as cli

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3000)]

TRAIN = {
    "lr_decay": 0.6,
    "average_last": 2,
    "average_every": 3,
    "keep": "average",
    "distill": {"weight": 2.0},
    "micro_batch_size": 3,
    "max_steps": 10,
    "checkpoint_every": 5,
}


def tree_for(folder: Path, models: Path) -> dict[str, Any]:
    tree = run_tree("bert", folder, models, "run", train=TRAIN, pretrain={"objective": "mlm", "max_steps": 2})
    tree["model"] = {"name_or_path": str(masked_bert(models))}
    tree["scoring"]["refresh"] = "none"
    return tree


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    config = write_config(folder / "run.yaml", tree_for(folder, models_dir))
    assert cli.main(["train", "--config", str(config)]) == 0
    return folder / "runs" / "run"


#: Of ZeRO-3's factors some are partitioned, and some whole between uses.
@pytest.mark.parametrize(("engine", "persistence"), [("zero2-2", 0), ("zero3-2", 200), ("fsdp2-2", 0)])
def test_the_same_under_every_engine(
    alone: Path, tmp_path: Path, models_dir: Path, engine: str, persistence: int
) -> None:
    tree = tree_for(tmp_path, models_dir)
    config = write_config(tmp_path / "run.yaml", tree)
    launch(engine, ROOT / "launch" / "train.py", ["--config", str(config)], tmp_path, persistence=persistence)
    folder = tmp_path / "runs" / "run"
    for end in ("-pretrain", ""):
        pairs = [losses_of(at.with_name(f"run{end}")) for at in (folder, alone)]
        assert len(pairs[0]) == (2 if end else 10) and pairs[0] == pytest.approx(pairs[1], abs=1e-5)
    assert ranks_of(folder) == ranks_of(alone)
    gaps = [[line["teacher_gap"] for line in read_lines(at / "metrics.jsonl") if "teacher_gap" in line]
            for at in (folder, alone)]  # fmt: skip
    assert len(gaps[0]) == 7 and gaps[0] == pytest.approx(gaps[1], abs=1e-5)
    assert result_of(folder)["average"]["steps"] == [6, 9]
    assert result_of(folder)["metrics"] == pytest.approx(result_of(alone)["metrics"], abs=1e-6)
    kept, wanted = (load_file(at / "adapter" / "adapter_model.safetensors") for at in (folder, alone))
    for name, value in wanted.items():
        if "lora_B" in name:  # products: factors are a choice of basis
            partner = name.replace("lora_B", "lora_A")
            assert (kept[name] @ kept[partner] - value @ wanted[partner]).abs().max() < 1e-4, name
    if engine.startswith("zero3"):  # its checkpoint goes on as any other would
        tree["run"]["name"] = "again"
        again = go(tree, resume=str(folder / "checkpoints" / "step-00000005"))
        assert losses_of(again.record.folder) == pytest.approx(losses_of(alone)[5:], abs=1e-5)
