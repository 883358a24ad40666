"""Advice is the same where parameters are sharded over ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launch import ROOT, launch
from tests.queried import queried
from tests.runs import write_config
from tsqlora_scale.api import advise
from tsqlora_scale.config.load import parse_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(400)]


def test_sharded_over_two_ranks(tmp_path: Path, models_dir: Path) -> None:
    tree = queried("bert", tmp_path, models_dir, "zero3-2")
    config = write_config(tmp_path / "config.yaml", tree)
    arguments = ["--config", str(config), "--rows", "40", "--pilot", "adapters", "--steps", "2"]
    launch("zero3-2", ROOT / "launch" / "advise.py", arguments, tmp_path, timeout=200)
    found = json.loads((tmp_path / "runs" / "zero3-2" / "advice" / "advice.json").read_text(encoding="utf-8"))
    expected = advise(parse_config(tree), rows=40, pilot="adapters", steps=2).summary
    assert found["verdict"] == expected["verdict"]
    for name, nats in expected["trials"]["nats a row"].items():
        np.testing.assert_allclose(found["trials"]["nats a row"][name], nats, atol=2e-3)
    for name, share in expected["shares"].items():
        np.testing.assert_allclose(found["shares"][name]["share"], share["share"], atol=2e-3)
    against = "query against pool"
    np.testing.assert_allclose(found[against]["area"], expected[against]["area"], atol=2e-3)
