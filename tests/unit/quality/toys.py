"""Pools of random sequences over the tiny models, for scoring."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests.tiny import VOCAB, tiny_model
from tsqlora_scale.config.schema import SamplingConfig, ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.model.adapters.lora import theta_modules
from tsqlora_scale.quality import QualityScorer

TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "mpnet": ["q", "k", "v", "o", "dense"],
    "deberta": ["query_proj", "key_proj", "value_proj", "dense"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
AUTO = {
    "bart": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "t5": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "llama": (AutoModelForCausalLM, "CAUSAL_LM"),
    "gpt2": (AutoModelForCausalLM, "CAUSAL_LM"),
}
KINDS = list(TARGETS)


@dataclass
class Batch:
    inputs: dict[str, Tensor]
    labels: Tensor

    @property
    def size(self) -> int:
        return len(self.labels)

    def to(self, device: object) -> Batch:
        return self


class RandomPool:
    """``size`` random samples of 3 to 12 tokens, padded per batch, for a model ``kind``."""

    def __init__(self, kind: str, size: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.generates = kind in AUTO
        self.seq2seq = kind in ("bart", "t5")
        self.tokens = [generator.integers(5, VOCAB, generator.integers(3, 13)) for _ in range(size)]
        self.targets = [generator.integers(5, VOCAB, generator.integers(2, 7)) for _ in range(size)]
        self.labels = generator.integers(0, 2, size)
        self.ids = [f"sample-{i}" for i in range(size)]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sample_ids(self) -> list[str]:
        return self.ids

    def digest(self) -> str:
        return ""

    def lengths(self) -> np.ndarray:
        return np.array([len(tokens) for tokens in self.tokens])

    def strata(self) -> np.ndarray:
        return self.labels

    def class_ids(self) -> np.ndarray:
        return self.labels

    query = None
    query_rows = 0

    def draw_weights(self) -> np.ndarray | None:
        return None

    def texts(self, rows: np.ndarray) -> list[tuple[str, ...]]:
        said = [self.tokens, self.targets] if self.seq2seq else [self.tokens]
        return [tuple(" ".join(map(str, part[row])) for part in said) for row in rows]

    def batch(self, indices: np.ndarray, *, max_length: int | None = None) -> Batch:
        tokens = _pad([self.tokens[i] for i in indices], 0)
        mask = _pad([np.ones_like(self.tokens[i]) for i in indices], 0)
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self.seq2seq:
            labels = _pad([self.targets[i] for i in indices], -100)
        elif self.generates:
            labels = tokens.masked_fill(mask == 0, -100)
        else:
            labels = torch.as_tensor(self.labels[indices])
        return Batch(inputs, labels)

    def losses(self, module: nn.Module, batch: Batch) -> Tensor:
        if not self.generates:
            return functional.cross_entropy(module(**batch.inputs).logits, batch.labels, reduction="none")
        if self.seq2seq:
            logits, labels = module(**batch.inputs, labels=batch.labels).logits, batch.labels
        else:
            logits, labels = module(**batch.inputs).logits[:, :-1], batch.labels[:, 1:]
        tokens = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return tokens.sum(1) / (labels != -100).sum(1)

    def singles(self) -> list[Batch]:
        return [self.batch(np.array([i])) for i in range(len(self))]


def _pad(rows: list[np.ndarray], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)


def lora_model(kind: str, folder: Path, *, r: int = 3, **options: object) -> nn.Module:
    """A tiny model with LoRA, in training mode, B random so that no gradient is zero, and a visible loss."""
    auto, task = AUTO.get(kind, (AutoModelForSequenceClassification, "SEQ_CLS"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_pretrained(tiny_model(kind, folder), **options)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # an eval forward would repack the weight
        targets = TARGETS[kind]
        config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.1, target_modules=targets, task_type=task)
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
            elif "modules_to_save" in name and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.3)
    return model.train()


def scorer(
    pool: RandomPool,
    *,
    world: World | None = None,
    seed: int = 0,
    eta: float = 0.1,
    sampling: dict | None = None,
    parts_folder: Path | None = None,
    **scoring: object,
) -> QualityScorer:
    """A scorer of ``pool`` with small defaults."""
    section = ScoringConfig(**{"batch_size": 4, "sketch_dim": 64, "delta_loss": "exact"} | scoring)
    return QualityScorer(
        section,
        SamplingConfig(**sampling or {}),
        pool=pool,
        theta=partial(theta_modules, include_head=section.include_head),
        world=world or World(),
        seed=seed,
        eta=eta,
        parts_folder=parts_folder,
    )
