"""Learning rates by depth, chosen blocks, the average and the teacher: the same run under every engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.launch import ROOT, WORKER, launch
from tests.runs import go, losses_of, ranks_of, read_lines, result_of, run_tree, write_config
from tests.tiny import masked_bert

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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    return go(run_tree("bert", tmp_path_factory.mktemp("alone"), models_dir, "run", train=TRAIN)).record.folder


#: ZeRO-3's adapters are partitioned, and in the second case whole between uses.
@pytest.mark.parametrize(
    ("engine", "persistence"),
    [("ddp-2", 0), ("zero2-2", 0), ("zero3-2", 0), ("zero3-2", 100_000), ("fsdp2-2", 0)],
)
def test_the_same_under_every_engine(
    alone: Path, tmp_path: Path, models_dir: Path, engine: str, persistence: int
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train=TRAIN)
    launch(engine, WORKER, [str(write_config(tmp_path / "run.yaml", tree))], tmp_path, persistence=persistence)
    folder = tmp_path / "runs" / "run"
    assert losses_of(folder) == pytest.approx(losses_of(alone), abs=1e-5)
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
    # another engine's checkpoint goes on as its own would
    tree["run"]["name"] = "again"
    again = go(tree, resume=str(folder / "checkpoints" / "step-00000005"))
    assert losses_of(again.record.folder) == pytest.approx(losses_of(alone)[5:], abs=1e-5)


def test_pretraining_under_zero_3(tmp_path: Path, models_dir: Path) -> None:
    """Two engines one after the other, the second with the first one's adapter and a new head."""
    losses = []
    for engine in ("plain", "zero3-2"):
        tree = run_tree(
            "bert", tmp_path, models_dir, engine, train={"max_steps": 3}, adapter={"r": 4, "method": "lora"}
        )
        tree = {key: tree[key] for key in ("run", "task", "adapter", "train")}
        tree |= {"model": {"name_or_path": str(masked_bert(models_dir))}}
        tree |= {"pretrain": {"objective": "mlm", "max_steps": 3}}
        config = write_config(tmp_path / f"{engine}.yaml", tree)
        launch(engine, ROOT / "launch" / "train.py", ["--config", str(config)], tmp_path)
        losses.append([losses_of(tmp_path / "runs" / f"{engine}{end}") for end in ("-pretrain", "")])
    for plain, sharded in zip(*losses, strict=True):
        assert len(plain) == 3 and sharded == pytest.approx(plain, abs=1e-5)
