"""The splits of a task whose texts are not tokenized again when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from tsqlora_scale.tasks.objectives.causal import CausalObjective
from tsqlora_scale.tasks.objectives.chat import ChatObjective
from tsqlora_scale.tasks.objectives.label_heads import LabelObjective
from tsqlora_scale.tasks.objectives.seq2seq import Seq2SeqObjective
from tsqlora_scale.tasks.tokens.token_store import TokenStore

#: Objectives whose tokens depend on what a cache looks at; one of a user's own may read anything.
_OURS = (CausalObjective, ChatObjective, LabelObjective, Seq2SeqObjective)


class KeptTokens:
    """Stores by split and length.

    Args:
        objective: of the task.
        fast: whether its tokenizer is, and can say what it does.
    """

    def __init__(self, objective: Any, *, fast: bool) -> None:
        self._objective, self._fast = objective, fast
        self._stores: dict[tuple[str, int], TokenStore] = {}
        self._beside: dict[str, datasets.Dataset | None] = {}

    @property
    def columns(self) -> list[str] | None:
        """Columns whose texts are tokenized; None where tokens cannot be kept."""
        if type(self._objective) not in _OURS or not self._fast:
            return None
        found: list[str] = self._objective.token_columns
        return found

    def keep(self, split: str, view: datasets.Dataset, limit: int, store: TokenStore) -> None:
        """From now on read the rows of a split, where they are asked for at ``limit`` tokens, from a store.

        Args:
            view: the split's rows, with the objective's columns.
        """
        others = [name for name in self._objective.columns if name not in self._objective.token_columns]
        self._beside[split] = view.select_columns(others) if others else None
        self._stores[split, limit] = store

    def padded(
        self, split: str, rows: Sequence[int] | np.ndarray, limit: int
    ) -> tuple[dict[str, Tensor], Tensor] | None:
        """What :meth:`.Objective.collate` makes of some rows; None where they are not kept."""
        store = self._stores.get((split, limit))
        if store is None:
            return None
        view = self._beside[split]
        cells = {} if view is None else view[np.asarray(rows, dtype=np.int64).tolist()]
        made: tuple[dict[str, Tensor], Tensor] = self._objective.padded(store.rows(rows), cells)
        return made
