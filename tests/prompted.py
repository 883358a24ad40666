"""Runs that classify by a prompt, on the three kinds of bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM

from tests.runs import run_tree
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

#: kind of a base -> a tiny model, and the template that it is asked by
PROMPTS = {
    "masked": ("bert", "{text} it was {mask} and"),
    "causal": ("llama", "{text} it was {answer}"),
    "seq2seq": ("t5", "{text} it was {answer}"),
}


def masked_model(folder: Path) -> Path:
    """A tiny BERT with its language head."""
    out = folder / "bert-masked"
    if not out.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = AutoModelForMaskedLM.from_config(CONFIGS["bert"]())
            for param in model.parameters():
                if param.dim() > 1:
                    param.data.normal_(0, 0.1)
        model.save_pretrained(out)
        tiny_tokenizer().save_pretrained(out)
    return out


def base_of(kind: str, models: Path) -> Path:
    """The folder of a kind's tiny model."""
    name = PROMPTS[kind][0]
    return masked_model(models) if kind == "masked" else tiny_model(name, models)


def prompted_tree(kind: str, folder: Path, models: Path, name: str = "run", **task: Any) -> dict[str, Any]:
    """A short run of plain LoRA; keys of its task may be given."""
    tree = run_tree("bert", folder, models, name)
    tree["model"]["name_or_path"] = str(base_of(kind, models))
    tree["task"] |= {"prompt": PROMPTS[kind][1], "label_words": ["bad", "good"], "max_length": 24} | task
    tree["adapter"] |= {"method": "lora"}
    tree["train"] |= {"max_steps": 4, "lr": 0.01, "checkpoint_every": 2}
    return tree
