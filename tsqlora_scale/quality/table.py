"""The score store: what is known of every sample of the pool, and its parquet files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsqlora_scale.errors import UserError
from tsqlora_scale.files import written_whole

#: pass number of a sample that was never scored itself and carries the mean of those that were
NEVER = -1


@dataclass
class ScoreTable:
    """Scores of the whole pool, one entry per sample, in pool order. The same on every rank.

    Attributes:
        loss: loss of the sample alone.
        grad_norm: G, norm of its gradient.
        delta_loss: loss reduction by one step on the sample itself.
        convergence: convergence term, per ``scoring.convergence``.
        quality: Q, the weighted sum of the standardised terms.
        probability: softmax of Q / tau over the pool.
        selected: whether the sample belongs to S.
        scoring_pass: number of the pass that scored it last; -1 if none did.
    """

    loss: np.ndarray
    grad_norm: np.ndarray
    delta_loss: np.ndarray
    convergence: np.ndarray
    quality: np.ndarray
    probability: np.ndarray
    selected: np.ndarray
    scoring_pass: np.ndarray

    @classmethod
    def empty(cls, size: int) -> ScoreTable:
        """A table in which nothing is known yet."""
        unknown = {f.name: np.full(size, np.nan) for f in fields(cls)}
        return cls(**unknown | {"selected": np.zeros(size, bool), "scoring_pass": np.full(size, NEVER, np.int64)})

    def __len__(self) -> int:
        return len(self.quality)

    def mean_quality(self) -> float:
        """Mean over S of sigmoid(Q), in (0, 1)."""
        return float((0.5 + 0.5 * np.tanh(self.quality[self.selected] / 2)).mean())

    def effective_sample_size(self) -> float:
        """``1 / sum p_i^2`` over S, with p renormalised over S: from 1 (one sample has all mass) to |S| (uniform)."""
        weights = self.probability[self.selected]
        return float(weights.sum() ** 2 / (weights**2).sum())

    def copy(self) -> ScoreTable:
        """A table that shares no memory with this one."""
        return ScoreTable(**{f.name: getattr(self, f.name).copy() for f in fields(self)})

    def state_dict(self) -> dict[str, Any]:
        """The columns as tensors."""
        return {f.name: torch.from_numpy(getattr(self, f.name).copy()) for f in fields(self)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ScoreTable:
        """The table of :meth:`state_dict`."""
        return cls(**{name: column.numpy().copy() for name, column in state.items()})

    def write(self, folder: str | Path, sample_ids: Sequence[str]) -> Path:
        """Write ``folder/pass-NNN.parquet``, NNN the last pass, whole or not at all; call on one rank."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert len(sample_ids) == len(self), f"{len(sample_ids)} ids for {len(self)} samples"
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"pass-{max(self.scoring_pass.max(initial=NEVER), 0):03d}.parquet"
        columns = {"sample_id": pa.array([str(i) for i in sample_ids], pa.string())}
        columns |= {f.name: pa.array(getattr(self, f.name)) for f in fields(self)}
        with written_whole(path) as partial:
            pq.write_table(pa.table(columns), partial)
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
        try:
            content = pq.read_table(path, columns=["sample_id", *(f.name for f in fields(cls))])
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a score file ({reason}); score the pool again") from None
        missing = {"sample_id", *(f.name for f in fields(cls))} - set(content.column_names)
        if missing:
            raise UserError(f"{path}: not a score file, columns {sorted(missing)} are missing; score the pool again")
        columns = {f.name: content[f.name].to_numpy().copy() for f in fields(cls)}
        return cls(**columns), content["sample_id"].to_pylist()


def pool_fingerprint(sample_ids: Sequence[str]) -> str:
    """A digest of the pool's sample ids in order: scores belong to one pool only."""
    digest = hashlib.sha256()
    for sample_id in sample_ids:
        digest.update(f"{len(str(sample_id))}:{sample_id}".encode())
    return digest.hexdigest()
