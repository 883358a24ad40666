"""An audit finds the same on every engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.distributed.launch import ROOT, launch
from tests.runs import run_tree, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(400)]


def test_any_number_of_ranks(tmp_path: Path, models_dir: Path) -> None:
    found = {}
    for engine in ("plain", "ddp-2", "zero3-2"):
        tree = run_tree("bert", tmp_path, models_dir, engine, scoring={"audit": "both", "folds": 2})
        tree["train"]["max_steps"] = 6
        config = write_config(tmp_path / f"{engine}.yaml", tree)
        launch(engine, ROOT / "launch" / "score.py", ["--audit", "--config", str(config)], tmp_path, timeout=200)
        found[engine] = pq.read_table(tmp_path / "runs" / engine / "audit" / "audit.parquet")
    expected = found.pop("plain")
    for engine, table in found.items():
        for name in ("audit_suspicion", "audit_probability"):
            values, wanted = (part.column(name).to_numpy() for part in (table, expected))
            np.testing.assert_allclose(values, wanted, atol=2e-3, err_msg=f"{engine} {name}")
        assert table.column("sample_id").equals(expected.column("sample_id"))
