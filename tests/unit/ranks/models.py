"""Tiny adapted models, padded batches, and their per-sample losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests.tiny import VOCAB, tiny_model
from tsqlora_scale.model.adapters.lora import lora_layers

#: Attention and feed-forward linears, by suffix.
TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "deberta": ["query_proj", "key_proj", "value_proj", "dense"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
CAUSAL = ("llama", "gpt2")
AUTO = {"bart": AutoModelForSeq2SeqLM, "t5": AutoModelForSeq2SeqLM} | dict.fromkeys(CAUSAL, AutoModelForCausalLM)


@dataclass
class Batch:
    """Inputs, labels (-100 is padding) and the loss of each sample as a share of the step's mean loss."""

    kind: str
    inputs: dict[str, Tensor]
    labels: Tensor
    #: Loss terms of the whole step: samples, or target tokens.
    terms: int

    def __getitem__(self, part: slice) -> Batch:
        inputs = {key: value[part] for key, value in self.inputs.items()}
        return Batch(self.kind, inputs, self.labels[part], self.terms)

    def __len__(self) -> int:
        return len(self.labels)

    def loss(self, model: nn.Module) -> Tensor:
        """Sum of this batch's loss terms over the number of terms of the step."""
        if self.kind not in AUTO:
            logits, labels = model(**self.inputs).logits, self.labels
        elif self.kind in CAUSAL:
            logits = model(**self.inputs).logits[:, :-1].flatten(0, 1)
            labels = self.labels[:, 1:].flatten()
        else:
            logits, labels = model(**self.inputs, labels=self.labels).logits.flatten(0, 1), self.labels.flatten()
        return cross_entropy(logits.float(), labels, reduction="sum") / self.terms


def adapted(kind: str, folder: Path, *, r: int = 3, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A tiny model of ``kind`` with LoRA layers whose B is not zero, in training mode."""
    auto = AUTO.get(kind, AutoModelForSequenceClassification)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = auto.from_pretrained(tiny_model(kind, folder), dtype=dtype)
        exclude = r".*pooler\.dense" if "dense" in TARGETS[kind] else None
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS[kind], exclude_modules=exclude)
        model = get_peft_model(base, config)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model.train()


def padded_batch(kind: str, size: int = 8, length: int = 9, seed: int = 0) -> Batch:
    """Random tokens, every sample of another length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (size, length), generator=generator)
    lengths = torch.randint(3, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if kind not in AUTO:
        return Batch(kind, inputs, torch.randint(0, 2, (size,), generator=generator), size)
    if kind in CAUSAL:
        labels = ids.masked_fill(mask == 0, -100)
        return Batch(kind, inputs, labels, int((labels[:, 1:] != -100).sum()))
    labels = torch.randint(5, VOCAB, (size, length - 2), generator=generator)
    labels[torch.arange(length - 2) >= lengths - 2] = -100
    return Batch(kind, inputs, labels, int((labels != -100).sum()))
