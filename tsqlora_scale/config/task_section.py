"""The data, and what is learned from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tsqlora_scale.config.fields import PositiveInt, Section, name_or_extension


class DatasetConfig(Section):
    """The pool and the held-out set: a hub dataset (``name``) or a local folder (``path``)."""

    #: A folder, or ``package:NAME/sub/folder``.
    path: str | None = None
    train_file: str | None = None
    dev_file: str | None = None
    #: A hub dataset and its subset.
    name: str | None = None
    subset: str | None = None
    train_split: str = "train"
    #: None where the hub dataset has no such split.
    dev_split: str | None = "validation"
    #: Column names of csv/tsv files that have no header row.
    column_names: list[str] | None = None
    #: A column with unique sample ids; without it the id is the row's number in the pool.
    id_column: str | None = None
    #: Leave out rows with an empty text instead of refusing the data.
    drop_empty: bool = False
    #: A random subset of that size, fixed by ``run.seed``: files are often sorted.
    max_train_samples: PositiveInt | None = None
    max_dev_samples: PositiveInt | None = None

    @property
    def has_dev(self) -> bool:
        """Whether there is a held-out set."""
        return (self.dev_file if self.name is None else self.dev_split) is not None

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if (self.path is None) == (self.name is None):
            raise ValueError("needs exactly one of 'path' (a local folder) and 'name' (a hub dataset)")
        if self.path is not None and self.train_file is None:
            raise ValueError("'path' needs 'train_file', the training file inside it")
        return self


class TaskConfig(Section):
    """What the model learns: columns, lengths, metrics."""

    type: Literal["classification", "regression", "seq2seq", "causal"]
    #: An objective of one's own in the place of the type's: ``FILE.py:NAME`` or ``package.module:NAME``.
    objective: name_or_extension() | None = None  # type: ignore[valid-type]
    dataset: DatasetConfig
    #: One or two text columns (classification, regression).
    text: list[str] = []
    label: str | None = None
    #: Class names in label order, or their number; required for classification.
    labels: list[str] | PositiveInt | None = None
    #: Input and output columns (seq2seq, causal).
    source: str | None = None
    target: str | None = None
    #: Text put before every source (T5-style).
    prefix: str = ""
    max_length: PositiveInt = 128
    max_target_length: PositiveInt = 64
    #: Metric names; the first is the one that decides which checkpoint is best.
    metrics: Annotated[list[str], Field(min_length=1)]
    num_beams: PositiveInt = 4

    @model_validator(mode="after")
    def _columns_of_the_type(self) -> TaskConfig:
        if self.type in ("classification", "regression"):
            if not 1 <= len(self.text) <= 2:
                raise ValueError(f"'text' must name one or two columns for a {self.type} task, got {self.text!r}")
            if self.label is None:
                raise ValueError(f"'label' must name the label column of a {self.type} task")
            if self.type == "classification" and self.labels is None:
                raise ValueError("'labels' must give the class names, or their number, of a classification task")
        elif self.source is None or self.target is None:
            raise ValueError(f"'source' and 'target' must name the input and output columns of a {self.type} task")
        return self

    @property
    def num_labels(self) -> int:
        """Size of the head: classes, or 1 for regression. 0 where there is no head."""
        if self.type == "regression":
            return 1
        if self.labels is None:
            return 0
        return self.labels if isinstance(self.labels, int) else len(self.labels)
