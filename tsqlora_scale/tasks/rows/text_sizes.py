"""Characters of texts, counted where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow.compute as pc

from tsqlora_scale.common.disk_arrays import blocks, new_array


def text_lengths(view: datasets.Dataset, names: Sequence[str], rows: int) -> np.ndarray:
    """Characters of the columns ``names`` together of every row, (N,) int32.

    Args:
        rows: that are in memory at once.
    """
    view = view.select_columns(list(names)).with_format("arrow")
    lengths = new_array(len(view), np.int32)
    for block in blocks(len(view), rows):
        table = view[block]
        lengths[block] = sum(pc.fill_null(pc.utf8_length(table[name]), 0).to_numpy() for name in names)
    return lengths


def text_sizes(view: datasets.Dataset, names: Sequence[str], rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """The same of some rows, (B,) int64."""
    table = view.select_columns(list(names)).with_format("arrow")[np.asarray(rows, dtype=np.int64).tolist()]
    columns = [pc.fill_null(pc.utf8_length(table[name]), 0).to_numpy() for name in names]
    found: np.ndarray = np.stack(columns).sum(axis=0, dtype=np.int64)
    return found
