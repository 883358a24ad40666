"""A minimal config, and what is said of one that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config

MINIMAL = """\
model: {name_or_path: some/model}
task:
  type: classification
  dataset: {path: data, train_file: train.tsv}
  text: [text]
  label: label
  labels: ['no', 'yes']
  metrics: [accuracy]
train: {max_steps: 10}
"""


def tree(**changes: Any) -> dict[str, Any]:
    """A valid config as nested mappings, with dotted keys set (``section__key``)."""
    base: dict[str, Any] = {
        "model": {"name_or_path": "some/model"},
        "task": {
            "type": "classification",
            "dataset": {"path": "data", "train_file": "train.tsv"},
            "text": ["text"],
            "label": "label",
            "labels": ["no", "yes"],
            "metrics": ["accuracy"],
        },
        "train": {"max_steps": 10},
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = base
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return base


def message(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(config)
    return str(caught.value)
