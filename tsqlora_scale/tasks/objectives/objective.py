"""What is learned from the rows: how they become tensors, what their loss is, how the model is asked.

One implementation for each kind of model head; :class:`~tsqlora_scale.tasks.task.Task` holds one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tsqlora_scale.tasks.batch import Batch

#: Column name -> the values of the rows of a batch.
Rows = dict[str, list[Any]]
#: Name -> the numbers of every row of a batch: token ids, or what is said of each of them.
Tokens = dict[str, list[list[int]]]


#: Characters of a text that are looked at where its length is only told to a reader.
MEASURED = 50_000


@dataclass(frozen=True)
class Measured:
    """How long texts are, and how much of them is kept.

    Attributes:
        what: the texts.
        lengths: in tokens, with what is put around them.
        limit: tokens that are kept.
        side: that a longer text loses.
    """

    what: str
    lengths: list[int]
    limit: int
    side: str


class Objective(Protocol):
    """One kind of task, without its data."""

    #: PEFT's name of the task type.
    peft_task_type: str | None
    #: Columns that :meth:`collate` reads.
    columns: list[str]
    #: The column that holds the right answers.
    answer: str

    @property
    def auto_class(self) -> Any:
        """The transformers auto class that loads the model."""

    def collate(self, rows: Rows, max_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs and targets of some rows, padded to the longest."""

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss and number of loss terms of every sample, (B,) float32 each."""

    def predict(self, module: Any, batch: Batch, *, synced: bool) -> list[Any]:
        """The model's B answers: class ids, numbers or texts."""

    def preview(self, rows: Rows) -> list[str]:
        """The rows as text, for a reader."""
