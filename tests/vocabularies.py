"""Small tokenizers of the kinds that large models have, and random models with an adapter that read by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests import zoo
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import Config

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TEXTS = ["the film was a lovely story, and 1984 wasn't dull", "Don't watch it!  In 12345 scenes\n\nthere's no plot."]
#: What a tokenizer must not cut otherwise than before: spaces, digits, other scripts, special tokens inside.
ODD = [
    *TEXTS,
    "  two  spaces",
    "x=10000;\n\ty",
    "naïve façade, 日本語 😀",
    "<|im_end|>the film<|im_end|>",
    "I'LL'S it's",
]
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
ENDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = rf"{WORDS}|\p{{N}}{{1,3}}|{ENDS}", rf"{WORDS}|\p{{N}}|{ENDS}"
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_level(split: str, *, begins: bool = False) -> Any:
    """Byte-level BPE with a way to split texts first; ``begins``: with a token before every text."""
    tokenizer = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    if begins:
        begin = [("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=begin)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    whole.chat_template = CHAT
    return whole


def sentencepiece_like() -> Any:
    """BPE over characters with bytes to fall back to and a space before every text, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=380, special_tokens=special[:3], show_progress=False)
    )
    described = tokenizer.get_vocab()
    learned = sorted(set(described) - set(special), key=described.__getitem__)
    tree = json.loads(tokenizer.to_str())
    tree["model"]["vocab"] = {token: number for number, token in enumerate([*special, *learned])}
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def trained(model_config: Any, tokenizer: Any, folder: Path) -> tuple[Path, Config, torch.Tensor]:
    """An adapter of large effect on a random model with this tokenizer, the run's config, and its logits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base: Any = t.AutoModelForCausalLM.from_config(model_config)
        for name, param in base.named_parameters():
            param.data.normal_(1.0 if "norm" in name else 0.0, 0.1)
        base.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        targets = ["q_proj", "k_proj", "o_proj", "down_proj"]
        model: Any = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"))
        for name, param in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(param, std=0.1)
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.arange(5, 32).reshape(3, 9)).logits
    tree = zoo.tree_of("llama", folder, folder)
    tree["model"]["name_or_path"] = str(folder / "base")
    return folder / "adapter", parse_config(tree), expected
