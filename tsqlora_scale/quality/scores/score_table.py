"""The score store: what is known of every sample of the pool, and its parquet files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tsqlora_scale.common.disk_arrays import BLOCK, blocks, copied, filled
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import written_whole
from tsqlora_scale.quality.pool import Pool

if TYPE_CHECKING:
    import pyarrow as pa

#: pass number of a sample that was never scored itself and carries the mean of those that were
NEVER = -1
#: samples of a row group that holds their texts
WITH_TEXTS = 2**16
#: types of the columns that are not float64
KINDS: dict[str, type] = {"selected": bool, "scoring_pass": np.int64}
#: what every table has, in the order of the files
COLUMNS = (
    "loss", "grad_norm", "delta_loss", "convergence", "quality", "probability", "selected", "scoring_pass",
)  # fmt: skip


@dataclass
class ScoreTable:
    """Scores of the whole pool, one entry per sample, in pool order. The same on every rank.

    57 bytes a sample, and 8 for each of ``terms``, in columns that are mapped to disk where they are large
    (:mod:`~.disk_arrays`).

    Attributes:
        loss: loss of the sample alone.
        grad_norm: G, norm of its gradient.
        delta_loss: loss reduction by one step on the sample itself.
        convergence: convergence term, per ``scoring.convergence``.
        quality: Q, the weighted sum of the standardised terms.
        probability: softmax of Q / tau over the pool.
        selected: whether the sample belongs to S.
        scoring_pass: number of the pass that scored it last; -1 if none did.
        terms: what else a selector has found, by name, (N,) float64 each.
    """

    loss: np.ndarray
    grad_norm: np.ndarray
    delta_loss: np.ndarray
    convergence: np.ndarray
    quality: np.ndarray
    probability: np.ndarray
    selected: np.ndarray
    scoring_pass: np.ndarray
    terms: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def empty(cls, size: int) -> ScoreTable:
        """A table in which nothing is known yet."""
        unknown = dict.fromkeys(COLUMNS, np.nan) | {"selected": False, "scoring_pass": NEVER}
        columns: dict[str, Any] = {
            name: filled(size, KINDS.get(name, np.float64), value) for name, value in unknown.items()
        }
        return cls(**columns)

    def __len__(self) -> int:
        return len(self.quality)

    def mean_quality(self) -> float:
        """Mean over S of sigmoid(Q), in (0, 1)."""
        total = 0.0
        for block in blocks(len(self)):
            total += (0.5 + 0.5 * np.tanh(self.quality[block][self.selected[block]] / 2)).sum()
        return float(total / np.count_nonzero(self.selected))

    def effective_sample_size(self) -> float:
        """``1 / sum p_i^2`` over S, with p renormalised over S: from 1 (one sample has all mass) to |S| (uniform)."""
        total, squares = 0.0, 0.0
        for block in blocks(len(self)):
            weights = self.probability[block][self.selected[block]]
            total += weights.sum()
            squares += np.square(weights).sum()
        return float(total**2 / squares)

    def copy(self) -> ScoreTable:
        """A table that shares no memory with this one."""
        columns: dict[str, Any] = {name: copied(getattr(self, name)) for name in COLUMNS}
        return ScoreTable(**columns, terms={name: copied(values) for name, values in self.terms.items()})

    def state_dict(self) -> dict[str, Any]:
        """The columns as tensors, which share the table's memory."""
        columns: dict[str, Any] = {name: torch.from_numpy(getattr(self, name)) for name in COLUMNS}
        if self.terms:
            columns["terms"] = {name: torch.from_numpy(values) for name, values in self.terms.items()}
        return columns

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ScoreTable:
        """The table of :meth:`state_dict`; it shares no memory with it."""
        terms = {name: copied(column.numpy()) for name, column in state.get("terms", {}).items()}
        return cls(**{name: copied(state[name].numpy()) for name in COLUMNS}, terms=terms)

    def write(
        self, folder: str | Path, sample_ids: Sequence[str], *, given: Callable[[slice], pa.Table] | None = None
    ) -> Path:
        """Write ``folder/pass-NNN.parquet``, NNN the last pass, whole or not at all; call on one rank.

        Args:
            given: the samples of a block as they are in the data, to stand beside their scores; of its columns those
                that are called as one of ours are called ``data_…``.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert len(sample_ids) == len(self), f"{len(sample_ids)} ids for {len(self)} samples"
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"pass-{max(self.scoring_pass.max(initial=NEVER), 0):03d}.parquet"
        ours = _schema(self.terms)
        beside = [] if given is None else list(_beside(given(slice(0, 0)).schema, ours.names))
        schema = pa.schema([ours.field(0), *beside, *list(ours)[1:]])
        with written_whole(path) as partial, pq.ParquetWriter(partial, schema) as writer:
            for block in blocks(len(self), None if given is None else WITH_TEXTS):  # a row group each
                ids = pa.array([str(i) for i in sample_ids[block]], pa.string())
                texts = [] if given is None else given(block).columns
                columns = {name: getattr(self, name) for name in COLUMNS} | self.terms
                numbers = [pa.array(columns[name][block]) for name in ours.names[1:]]
                writer.write_table(pa.table([ids, *texts, *numbers], schema=schema), row_group_size=len(ids))
        return path

    @classmethod
    def read(cls, folder: str | Path) -> tuple[ScoreTable, list[str]]:
        """The table of the last pass in ``folder`` (or of one parquet file), and the sample ids of its rows.

        Raises:
            UserError: no score file there, or one without the expected columns.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(folder)
        if path.is_dir():
            passes = sorted(path.glob("pass-*.parquet"), key=lambda p: (len(p.name), p.name))
            if not passes:
                raise UserError(f"{path}: no score file pass-NNN.parquet in this folder; score the pool first")
            path = passes[-1]
        ids: list[str] = []
        try:
            with pq.ParquetFile(path) as file:
                schema = _schema()
                if missing := [name for name in schema.names if name not in file.schema_arrow.names]:
                    raise UserError(f"{path}: not a score file (without {', '.join(missing)}); score the pool again")
                table = cls.empty(file.metadata.num_rows)
                for batch in file.iter_batches(BLOCK, columns=schema.names):
                    place = slice(len(ids), len(ids) + len(batch))
                    for name in schema.names[1:]:
                        column = batch[name].cast(schema.field(name).type)
                        if column.null_count and column.type != pa.float64():
                            raise UserError(f"{path}: not a score file ({name} has gaps); score the pool again")
                        getattr(table, name)[place] = column.to_numpy(zero_copy_only=False)
                    ids += batch["sample_id"].cast(pa.string()).to_pylist()
        except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a score file ({reason}); score the pool again") from None
        return table, ids


def _beside(given: pa.Schema, names: Iterable[str]) -> Iterator[pa.Field]:
    """The data's fields under names that are none of ours."""
    taken = set(names)
    for column in given:
        name = column.name
        while name in taken:
            name = f"data_{name}"
        taken.add(name)
        yield column.with_name(name).remove_metadata()


def _schema(terms: Iterable[str] = ()) -> pa.Schema:
    """Of a score file."""
    import pyarrow as pa

    kinds = [(name, pa.from_numpy_dtype(KINDS.get(name, np.float64))) for name in (*COLUMNS, *terms)]
    return pa.schema([("sample_id", pa.string()), *kinds])


def pool_fingerprint(sample_ids: Sequence[str]) -> str:
    """A digest of the pool's sample ids in order: scores belong to one pool only."""
    digest = hashlib.sha256()
    for block in blocks(len(sample_ids), 2**16):
        digest.update("".join(f"{len(str(i))}:{i}" for i in sample_ids[block]).encode())
    return digest.hexdigest()


def pool_key(pool: Pool[Any]) -> str:
    """A digest of the pool's ids and content."""
    return f"{pool_fingerprint(pool.sample_ids)} {pool.digest()}".strip()


def check_pool(found: str, key: str) -> None:
    """Check that a checkpoint's scores are of the pool of :func:`pool_key` ``key``.

    Raises:
        UserError: they belong to another.
    """
    if found != key:
        raise UserError(
            "the checkpoint's scores belong to another pool of samples; "
            "resume with the task.dataset of the run that wrote it"
        )
