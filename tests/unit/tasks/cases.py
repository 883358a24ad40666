"""Task sections over small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsqlora_scale.config.schema import TaskConfig

TEXT = {"text": ["text"], "label": "label", "max_length": 48}


CLASSES = TEXT | {"type": "classification", "labels": ["bad", "good"], "metrics": ["f1"]}


NUMBERS = TEXT | {"type": "regression", "metrics": ["pearson"]}


LENGTHS = {"max_length": 48, "max_target_length": 16}


SUMMARIES = LENGTHS | {"type": "seq2seq", "source": "source", "target": "target", "metrics": ["rouge1"]}


ANSWERS = SUMMARIES | {"type": "causal"}


def task_config(folder: Path, kind: dict[str, Any], /, **dataset: Any) -> TaskConfig:
    """A task config on files of a folder; keys of ``kind`` are the task's, the rest the dataset's."""
    files = {"path": str(folder), "train_file": "train.tsv"}
    return TaskConfig.model_validate(kind | {"dataset": files | dataset})
