"""rsLoRA (2312.03732): scaling by alpha / sqrt(r)."""

from __future__ import annotations

from tsqlora_scale.model.adapters.lora import LoraAdapter


class RsLoraAdapter(LoraAdapter):
    """``adapter.type: rslora``."""

    name = "rslora"
    peft_options = {"use_rslora": True}  # noqa: RUF012
