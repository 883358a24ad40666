"""Several processes at once on a cold cache: one converts, all read the same, metrics do not meet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks import load_data
from tsqlora_scale.tasks.metrics import compute_metrics
cfg = TaskConfig.model_validate({
    "type": "classification", "text": ["text"], "label": "label", "labels": 2, "metrics": ["accuracy"],
    "dataset": {"path": sys.argv[1], "train_file": "train.tsv", "dev_file": "train.tsv"},
})
data = load_data(cfg, seed=0)
labels = data.train["label"][:]
scores = [compute_metrics(["accuracy"], labels, labels[::-1])["accuracy"] for _ in range(20)]
print(len(data.train), sum(labels), data.train[-1]["text"], set(scores), data.train.cache_files[0]["filename"])
"""


@pytest.mark.distributed
def test_ranks_share_one_conversion(tmp_path: Path) -> None:
    rows = [f"film {i}\t{i % 3 % 2}" for i in range(30_000)]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]))
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    ranks = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1, outputs
    assert outputs[0][0].startswith("30000 10000 film 29999 ")
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1
