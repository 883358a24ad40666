"""A whole run is the same with its samples end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.mixed_lengths import SIZES, assert_same_run, mixed_tree
from tests.runs import go
from tsqlora_scale.tasks.packing import Packing

ONLINE = {"source": "online", "sketch_dim": 64, "warmup_steps": 1}


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("llama", {}),
        ("gpt2", {"scoring": ONLINE, "train": SIZES | {"packing": True, "group_by_length": False}}),
    ],
)
def test_a_run_of_packed_samples(kind: str, sections: dict[str, Any], tmp_path: Path, models_dir: Path) -> None:
    """With accumulation, scores, a rank event and an evaluation; the adapter at the end, too."""
    found = []
    laid: list[Packing] = []
    each = Packing.each
    with mock.patch.object(Packing, "each", lambda packing, *change: laid.append(packing) or each(packing, *change)):
        for packing in (False, True):
            train = sections.get("train", SIZES) | {"packing": packing}
            tree = mixed_tree(kind, tmp_path, models_dir, packing=packing, **(sections | {"train": train}))
            found.append(go(tree))
            assert bool(laid) is packing
    plain, packed = found
    assert_same_run(packed.record.folder, plain.record.folder)
    values = dict(plain.engine.module.named_parameters())
    for name, value in packed.engine.module.named_parameters():
        torch.testing.assert_close(value, values[name], rtol=1e-4, atol=2e-5)
