"""What a rank receives of others, where what trains is shared, too."""

from __future__ import annotations

from pathlib import Path

from tests.runs import run_tree
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.planning.exchange import received_bytes
from tsqlora_scale.planning.held_bytes import WHOLE, HeldWeights
from tsqlora_scale.run.plan import plan_run


def test_zero3_gathers_what_trains_where_it_is_large(tmp_path: Path, models_dir: Path) -> None:
    """Full fine-tuning has nothing frozen, and is gathered all the same."""
    train = {"eval_every": 5, "batch_size": 16, "micro_batch_size": 2}
    config = parse_config(run_tree("bert", tmp_path, models_dir, "run", train=train))
    run = plan_run(config, 48, 2)

    def received(trained: list[int], engine: str) -> dict[str, int]:
        weights = HeldWeights([], trained, 0)
        return received_bytes(engine, config, run, weights, look="gradients", scoring_rows=4, dev_size=9)

    small, large = received([WHOLE], "zero3"), received([2 * WHOLE], "zero3")
    assert small == received([WHOLE], "ddp")
    half = 4 * 2 * WHOLE // 2
    assert large["scoring"] % (2 * half) == 0 < large["scoring"]
    assert large["steps"] == received([2 * WHOLE], "ddp")["steps"] + 13 * run.accumulation * 2 * half
