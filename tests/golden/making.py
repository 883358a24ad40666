"""Two small runs whose losses, ranks, scores and adapters are pinned: how they are made, and what is compared.

``python -m tests.golden.making OUT.json`` writes the file anew; do so only where a change of the numbers is meant, and
say why.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from tests.distributed.launch import WORKER, launch
from tests.runs import losses_of, ranks_of, read_lines, result_of, write_config
from tests.tiny import tiny_model

PINNED = Path(__file__).with_name("runs.json")
GOLDEN_ENGINES = ("plain", "ddp-2", "zero2-2", "zero3-2")
#: Of the pool; the same rows are one to classify and one to summarise.
DATA = Path(__file__).with_name("written_by_0_1") / "data-classification"
#: kind -> the sections by which the two runs differ: between them they use most of the method.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {
        "task": {
            "type": "classification", "text": ["text"], "label": "label", "labels": ["no", "yes"],
            "metrics": ["accuracy"],
        },
        "sampling": {"keep_fraction": 0.75, "unbiased": True, "redundancy": 0.5},
    },
    "bart": {
        "task": {"type": "seq2seq", "source": "text", "target": "summary", "metrics": ["rougeL"]},
        "resize": {"grow_init": "gradient", "shrink": "importance"},
        "sampling": {"keep_fraction": 0.75, "replacement": False},
    },
}  # fmt: skip


def machine() -> dict[str, str]:
    """What the last bits depend on, beside the code."""
    fields = dict(
        reversed([(key.strip(), value.strip()) for key, _, value in (x.partition(":") for x in _cpu_lines())])
    )
    named = " ".join(fields.get(key, "") for key in ("model name", "cpu family", "model", "stepping"))
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": named.strip() or platform.processor(),
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def tree_of(kind: str, folder: Path, models: Path) -> dict[str, Any]:
    """A run of 13 steps with a pass after step 2 and rank events after steps 4 and 8, written out in full.

    Nothing here comes from the other tests' runs, which may change.
    """
    dataset = {"path": str(DATA), "train_file": "train.jsonl", "dev_file": "dev.jsonl"}
    task = {"dataset": dataset, "max_length": 32, "max_target_length": 6, "num_beams": 2}
    return {
        "run": {"name": kind, "output_dir": str(folder / "runs"), "seed": 1, "timeout_minutes": 4},
        "model": {"name_or_path": str(tiny_model(kind, models))},
        "adapter": {"r": 4, "alpha": 8},
        "scoring": {
            "warmup_steps": 2, "batch_size": 8, "sketch_dim": 64, "refresh_fraction": 0.5, "delta_loss": "exact",
        },
        "sensitivity": {"window": 3},
        "schedule": {"start": 4, "end": 8, "every": 4},
        "train": {
            "max_steps": 13, "batch_size": 12, "micro_batch_size": 2, "lr": 1e-2, "lr_schedule": "constant",
            "eval_batch_size": 4,
        },
        **KINDS[kind],
        "task": task | KINDS[kind]["task"],
    }  # fmt: skip


def make(engine: str, folder: Path, models: Path) -> dict[str, dict[str, Any]]:
    """Make both runs under an engine, through a real launcher; what is compared of each."""
    configs = [str(write_config(folder / f"{kind}.yaml", tree_of(kind, folder, models))) for kind in KINDS]
    launch(engine, WORKER, configs, folder)
    return {kind: summary(folder / "runs" / kind) for kind in KINDS}


def summary(run: Path) -> dict[str, Any]:
    """Numbers of a run folder, and digests of its files without times."""
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    scores = {}
    for path in sorted((run / "scores").glob("*.parquet")):
        table = pq.read_table(path)
        columns = [(n, np.array(table[n].to_pylist()) if n == "sample_id" else table[n].to_numpy())
                   for n in table.column_names]  # fmt: skip
        scores[path.name] = digest(columns)
    result = result_of(run)
    return {
        "losses": losses_of(run),
        "ranks": ranks_of(run),
        "scores": scores,
        "adapter": digest([(name, adapter[name].numpy()) for name in sorted(adapter)]),
        "metrics": result["metrics"],
        "engine": result["engine"],
        "metrics_lines": timeless(run / "metrics.jsonl"),
        "ranks_lines": timeless(run / "ranks.jsonl"),
    }


def digest(arrays: list[tuple[str, np.ndarray]]) -> str:
    """Of names and contents, to the bit."""
    found = hashlib.sha256()
    for name, array in arrays:
        found.update(name.encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def timeless(path: Path) -> str:
    """Digest of a record without its seconds."""
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in read_lines(path)]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def main() -> None:
    """Write all of it."""
    with tempfile.TemporaryDirectory() as place:
        runs = {}
        for engine in GOLDEN_ENGINES:
            (folder := Path(place) / engine).mkdir()
            runs[engine] = make(engine, folder, Path(place) / "models")
        by_kind = {kind: {engine: runs[engine][kind] for engine in GOLDEN_ENGINES} for kind in KINDS}
    Path(sys.argv[1]).write_text(json.dumps({"machine": machine(), "runs": by_kind}, indent=1) + "\n")


if __name__ == "__main__":
    main()
