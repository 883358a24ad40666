"""What a scoring pass has measured so far, part by part, so that a killed pass goes on where it stopped.

A part holds the raw numbers of one shard of the pass. It depends on the shard, the model and the settings, never on the
number of ranks.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tsqlora_scale.common.files import written_whole

log = logging.getLogger(__name__)

#: What a pass measures: losses by a forward pass, also gradients by a backward pass, or the loss reduction by a second
#: forward pass on top.
Kind = Literal["loss", "first_order", "exact"]

#: The folder of the parts in a run folder. Not in ``scores/``, which other programs open as one table.
PARTS = "score-parts"
_METADATA = b"tsqlora_scale"


@dataclass
class PassPart:
    """The samples of one shard.

    Attributes:
        indices: pool indices, (n,).
        values: (n, 3) float64: loss, gradient norm, loss reduction; NaN what was not measured.
        sketches: (n, sketch_dim) float32; (n, 0) where the convergence term needs none.
        rounding: machine epsilon of the forward.
        batch_size: samples per forward of what follows; None where that is not decided yet.
        one_at_a_time: what was decided about batches; None where batches hold one sample anyway.
        kind: what the last of its passes measured (:data:`Kind`).
        reason: why that kind.
    """

    indices: np.ndarray
    values: np.ndarray
    sketches: np.ndarray
    rounding: float
    batch_size: int | None
    one_at_a_time: bool | None = None
    kind: Kind = "exact"
    reason: str = ""


class Parts:
    """The parts of one pass, on disk or, without a folder, in memory. Used on rank 0 alone.

    Args:
        folder: of this pass's parts; it and what is beside it are this class's own.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: list[PassPart] = []
        self._fingerprint: dict[str, Any] = {}
        self._count = 0
        #: Whether the folder cannot be used.
        self._barred = False

    def open(self, fingerprint: dict[str, Any]) -> int:
        """Number of parts that are there already, in order from the first. Parts of other passes are removed.

        Where the folder cannot be made or cleared, all parts stay in memory, after a warning.

        Args:
            fingerprint: what the numbers depend on, JSON values; two that are equal give equal numbers.
        """
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self._memory.clear()
        self._count = 0
        self._barred = False
        if self.folder is None:
            return 0
        try:
            self._count = self._found(self.folder)
        except OSError as error:
            self._barred = True
            log.warning("%s cannot be written (%s); the scoring pass goes on in memory", self.folder, error)
        return self._count

    def _found(self, folder: Path) -> int:
        if folder.parent.exists():
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        count = 0
        while self._path(count).exists():
            if not self._is_of_this_pass(self._path(count)):
                shutil.rmtree(folder)
                folder.mkdir()
                return 0
            count += 1
        return count

    def append(self, rows: PassPart) -> None:
        """Keep the next part, whole or not at all; in memory from the first on that cannot be written."""
        if self.folder is None or self._barred or self._memory or not self._written(rows):
            self._memory.append(rows)
        self._count += 1

    def _written(self, rows: PassPart) -> bool:
        path = self._path(self._count)
        try:
            _write(path, rows, self._fingerprint)
        except OSError as error:
            log.warning("%s cannot be written (%s); the scoring pass goes on in memory from there", path, error)
            return False
        return True

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> PassPart:
        if not 0 <= number < self._count:
            raise IndexError(number)
        on_disk = self._count - len(self._memory)
        return _read(self._path(number)) if number < on_disk else self._memory[number - on_disk]

    def __iter__(self) -> Iterator[PassPart]:
        return (self[number] for number in range(self._count))

    def discard(self) -> None:
        """Remove all parts."""
        self._memory.clear()
        self._count = 0
        if self.folder is not None:
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:06d}.parquet"

    def _is_of_this_pass(self, path: Path) -> bool:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            found = json.loads((pq.read_schema(path).metadata or {})[_METADATA])["fingerprint"]
        except (OSError, KeyError, ValueError, pa.ArrowInvalid):
            return False
        return all(found.get(key) == value for key, value in self._fingerprint.items())


def _write(path: Path, rows: PassPart, fingerprint: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = rows.sketches.shape[1]
    columns = {"index": pa.array(rows.indices)}
    columns |= {name: pa.array(rows.values[:, i]) for i, name in enumerate(("loss", "grad_norm", "delta_loss"))}
    if width:
        flat = pa.array(np.ascontiguousarray(rows.sketches, np.float32).reshape(-1))
        columns["sketch"] = pa.FixedSizeListArray.from_arrays(flat, width)
    names = ("rounding", "batch_size", "one_at_a_time", "kind", "reason")
    decided = {name: getattr(rows, name) for name in names}
    note = json.dumps({"fingerprint": fingerprint, **decided})
    table = pa.table(columns).replace_schema_metadata({_METADATA: note})
    with written_whole(path) as partial:
        pq.write_table(table, partial, compression="none")


def _read(path: Path) -> PassPart:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    indices = table["index"].to_numpy()
    values = np.column_stack([table[name].to_numpy() for name in ("loss", "grad_norm", "delta_loss")])
    sketches = np.empty((len(indices), 0), np.float32)
    if "sketch" in table.column_names:
        flat = table["sketch"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        sketches = flat.reshape(len(indices), -1).copy()  # torch wants memory that it may write to
    note = json.loads(table.schema.metadata[_METADATA])
    decided = {name: note[name] for name in ("one_at_a_time", "kind", "reason") if name in note}
    return PassPart(indices, values, sketches, note["rounding"], note["batch_size"], **decided)
