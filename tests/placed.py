"""Tiny models with an adapter of any type on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from tests.tiny import AUTO, tiny_model
from tsqlora_scale.config.schema import AdapterConfig
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.model.adapters.placement import Placement


def base_of(kind: str, models: Path, attention: str | None = None) -> Any:
    """A fresh tiny model."""
    path = tiny_model(kind, models)
    options: dict[str, Any] = {} if kind in AUTO else {"num_labels": 2}
    options |= {"attn_implementation": attention} if attention else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AUTO.get(kind, AutoModelForSequenceClassification).from_pretrained(path, **options).eval()


def built(method: str, kind: str, models: Path, attention: str | None = None, **keys: Any) -> Any:
    """It with an adapter of a type, and more keys of its section."""
    task = {"bart": "SEQ_2_SEQ_LM", "t5": "SEQ_2_SEQ_LM", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM"}.get(
        kind, "SEQ_CLS"
    )
    placement = Placement(
        AdapterConfig(method=None, type=method, r=4, **keys),
        task_type=task,
        new_modules=[] if kind in AUTO else ["classifier"],
        dtype="fp32",
        generator=torch.Generator().manual_seed(1),
    )
    return adapter_type(method).build(base_of(kind, models, attention), placement)


def some_inputs(kind: str) -> dict[str, torch.Tensor]:
    """Three rows, one of which is padded."""
    ids = torch.randint(5, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"decoder_input_ids": ids[:, :3]} if kind in ("bart", "t5") else {})
