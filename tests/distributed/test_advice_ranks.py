"""Advice is the same under an engine that shards over two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launch import ROOT, launch
from tests.queried import queried
from tests.runs import write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(400)]


def test_any_number_of_ranks(tmp_path: Path, models_dir: Path) -> None:
    found = {}
    for engine in ("plain", "zero3-2"):
        config = write_config(tmp_path / f"{engine}.yaml", queried("bert", tmp_path, models_dir, engine))
        arguments = ["--config", str(config), "--rows", "40", "--pilot", "adapters", "--steps", "2"]
        launch(engine, ROOT / "launch" / "advise.py", arguments, tmp_path, timeout=200)
        path = tmp_path / "runs" / engine / "advice" / "advice.json"
        found[engine] = json.loads(path.read_text(encoding="utf-8"))
    expected = found.pop("plain")
    for engine, summary in found.items():
        assert summary["verdict"] == expected["verdict"], engine
        for name, nats in expected["trials"]["nats a row"].items():
            np.testing.assert_allclose(summary["trials"]["nats a row"][name], nats, atol=2e-3, err_msg=engine)
        for name, share in expected["shares"].items():
            np.testing.assert_allclose(summary["shares"][name]["share"], share["share"], atol=2e-3, err_msg=engine)
        against = "query against pool"
        np.testing.assert_allclose(summary[against]["area"], expected[against]["area"], atol=2e-3)
