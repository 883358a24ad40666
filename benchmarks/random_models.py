"""Runs on models of real shapes and random weights, made where they compute: nothing is loaded or fetched."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from tsqlora_scale.common.failures import Watchdog
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model.base_model import DTYPES
from tsqlora_scale.model.heads import has_head, head_modules
from tsqlora_scale.quality.selectors.selector import Selector
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run, build_selector
from tsqlora_scale.run.preemption import StopRequest
from tsqlora_scale.run.preflight import Described, Preflight
from tsqlora_scale.run.training_run import Run

WORDS = [f"w{number}" for number in range(1000)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
#: Steps from one event to the next.
EVERY = 100
POLICY = Path(__file__).with_name("policies.py")


@dataclass(frozen=True)
class Shape:
    """A model, and the batch that it is measured on.

    Attributes:
        layers: of the model that is meant; the config may have fewer, which the name says.
    """

    name: str
    config: PretrainedConfig
    batch: int
    length: int
    rank: int
    layers: int

    @property
    def is_causal(self) -> bool:
        """Whether it generates text; else it classifies."""
        return isinstance(self.config, LlamaConfig)

    @property
    def share(self) -> float:
        """Layers that are there, of those that are meant."""
        return float(self.config.num_hidden_layers / self.layers)


def encoder(name: str, *, hidden: int, layers: int, heads: int, batch: int = 32, length: int = 128) -> Shape:
    """A BERT without dropout."""
    config = BertConfig(
        vocab_size=30522, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, max_position_embeddings=512, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    return Shape(name, config, batch, length, rank=8, layers=layers)


def llama(name: str, *, hidden: int, inner: int, layers: int, of: int, heads: int, batch: int, length: int) -> Shape:
    """A Llama with ``layers`` of its ``of`` layers."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=max(2048, length),
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Shape(name, config, batch, length, rank=16, layers=of)


def write_folder(shape: Shape, folder: Path, rows: int) -> None:
    """Config, tokenizer and data: texts of as many words as fill the length, with some that are shorter."""
    folder.mkdir(parents=True, exist_ok=True)
    shape.config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"], model_max_length=10**6,
    ).save_pretrained(folder)  # fmt: skip
    rng = random.Random(0)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as out:
        for number in range(rows):
            words = rng.choices(WORDS, k=shape.length if number % 4 else 3 * shape.length // 4)
            half = len(words) // 2
            line = {"text": " ".join(words), "label": ("no", "yes")[number % 2]}
            if shape.is_causal:
                line |= {"text": " ".join(words[:half]), "target": " ".join(words[half:])}
            out.write(json.dumps(line) + "\n")


def tree_of(shape: Shape, folder: Path, *, dtype: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run's config, in which an event comes every :data:`EVERY` steps and nothing ends."""
    task: dict[str, Any] = {"dataset": {"path": str(folder), "train_file": "train.jsonl"}}
    if shape.is_causal:
        task |= {"type": "causal", "source": "text", "target": "target", "metrics": ["rougeL"]}
        task |= {"max_length": shape.length, "max_target_length": shape.length // 2}
    else:
        task |= {"type": "classification", "text": ["text"], "label": "label", "labels": ["no", "yes"],
                 "max_length": shape.length, "metrics": ["accuracy"]}  # fmt: skip
    tree: dict[str, Any] = {
        "run": {"name": f"{dtype}-run", "output_dir": str(folder / "runs")},
        "model": {"name_or_path": str(folder), "dtype": dtype},
        "task": task,
        "adapter": {"r": shape.rank, "alpha": 2 * shape.rank},
        "scoring": {"warmup_steps": 1},
        "allocation": {"policy": f"{POLICY}:UniformInTurn"},
        "schedule": {"start": EVERY, "end": 10**6, "every": EVERY},
        "train": {"max_steps": 10**6, "batch_size": shape.batch, "lr": 1e-4, "lr_schedule": "constant"},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return tree


def random_base(described: Described, *, device: torch.device, **_: Any) -> tuple[nn.Module, list[str]]:
    """In the place of :func:`tsqlora_scale.run.adapted_model.build_base`: the same model without files."""
    config = described.config
    torch.manual_seed(0)
    with torch.device(device):
        base = described.task.auto_class.from_config(described.model_config, dtype=DTYPES[config.model.dtype])
    if config.model.quantization == "nf4":
        pack(base, DTYPES[config.model.dtype], device)
    if config.model.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.config.use_cache = False
    return base, sorted(head_modules(base)) if has_head(described.task.peft_task_type) else []


def pack(base: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Put bitsandbytes' 4-bit layers in the place of the linear layers of the blocks."""
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    for name, part in list(base.named_modules()):
        if isinstance(part, nn.Linear) and ".layers." in name:
            layer = layers.Linear4bit(
                part.in_features, part.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            weight = part.weight.detach()
            layer.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer).to(device)
            owner, _, own = name.rpartition(".")
            setattr(base.get_submodule(owner), own, layer)
    base.is_loaded_in_4bit = True
    base.is_quantized = True


@contextmanager
def without_files() -> Iterator[None]:
    """Inside, runs are built on random bases."""
    with (
        mock.patch("tsqlora_scale.run.preflight.check_weights"),
        mock.patch("tsqlora_scale.run.adapted_model.build_base", random_base),
    ):
        yield


def build(shape: Shape, folder: Path, *, dtype: str, **sections: dict[str, Any]) -> tuple[Run, Preflight]:
    """A run, and what was found out before it."""
    with without_files():
        checked = preflight.check(parse_config(tree_of(shape, folder, dtype=dtype, **sections)))
        return build_run(checked), checked


def selector_of(run: Run, checked: Preflight, name: str, **scoring: Any) -> Selector:
    """Another selector for a run's model, that scores as told."""
    tree = checked.config.model_dump(mode="json")
    tree["scoring"] |= scoring
    tree["run"]["name"] = name
    other = Preflight(**{**vars(checked), "config": parse_config(tree)})
    return build_selector(other, run.engine.world, StopRequest(), Watchdog(minutes=60, acts=False))
