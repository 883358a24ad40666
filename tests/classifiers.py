"""Tiny classifiers that have been fine-tuned before: a base with a head, whose classes have names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, DistilBertConfig, GPT2Config, XLNetConfig

from tests.tiny import CONFIGS, VOCAB, tiny_tokenizer

#: kind -> the modules of its head
HEADS = {
    "bert": ["classifier"],
    "mpnet": ["classifier"],
    "deberta": ["classifier", "pooler"],
    "bart": ["classification_head"],
    "t5": ["classification_head"],
    "llama": ["score"],
    "distilbert": ["classifier", "pre_classifier"],
    "xlnet": ["logits_proj", "sequence_summary"],
    "gpt2": ["score"],
}
MORE: dict[str, Any] = {
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCAB, dim=32, hidden_dim=64, n_layers=2, n_heads=4, pad_token_id=0, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    ),
    "xlnet": lambda: XLNetConfig(
        vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=64, pad_token_id=0, dropout=0.0,
        summary_last_dropout=0.0,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip


def tiny_classifier(kind: str, folder: Path, labels: list[str] | int, **config: Any) -> Path:
    """Save a classifier with random weights, and a head whose answers differ, for classes of these names.

    Args:
        labels: names, in the order of the head's rows, or their number.
        config: more of the model's config.
    """
    described = (CONFIGS | MORE)[kind]()
    names = {i: f"LABEL_{i}" for i in range(labels)} if isinstance(labels, int) else dict(enumerate(labels))
    described.id2label, described.label2id = names, {name: i for i, name in names.items()}
    for key, value in config.items():
        setattr(described, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(described)
        for name, param in model.named_parameters():
            if name.split(".")[0] in HEADS[kind]:
                param.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def class_logits(model: Any) -> torch.Tensor:
    """Logits of three short texts (3, classes)."""
    ids = torch.arange(5, 32).reshape(3, 9)
    ids[:, -1] = 2  # BART pools at the end token
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    return logits
