"""DoRA (2402.09353): LoRA of a weight's direction, beside its magnitude."""

from __future__ import annotations

from tsqlora_scale.model.adapters.lora import LoraAdapter


class DoraAdapter(LoraAdapter):
    """``adapter.type: dora``."""

    name = "dora"
    peft_options = {"use_dora": True}  # noqa: RUF012
