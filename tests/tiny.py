"""Tiny random models of the supported architectures, saved as ordinary Hugging Face folders with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

WORDS = [
    "the",
    "a",
    "film",
    "movie",
    "plot",
    "actor",
    "scene",
    "is",
    "was",
    "not",
    "very",
    "good",
    "bad",
    "great",
    "awful",
    "dull",
    "fine",
    "boring",
    "lovely",
    "weak",
    "strong",
    "and",
    "but",
    "with",
    "of",
    "in",
    "to",
    "it",
    "this",
    "that",
    "story",
    "ending",
    "music",
    "script",
    "director",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
VOCAB = len(WORDS) + len(SPECIAL)
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

CONFIGS = {
    "bert": lambda: BertConfig(vocab_size=VOCAB, pad_token_id=0, max_position_embeddings=64, **SIZE, **NO_DROPOUT),
    "mpnet": lambda: MPNetConfig(vocab_size=VOCAB, pad_token_id=0, max_position_embeddings=64, **SIZE, **NO_DROPOUT),
    "deberta": lambda: DebertaV2Config(
        vocab_size=VOCAB, pad_token_id=0, max_position_embeddings=64, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=16, share_att_key=True, norm_rel_ebd="layer_norm",
        pooler_dropout=0.0, cls_dropout=0.0, **SIZE, **NO_DROPOUT,
    ),
    "bart": lambda: BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, classifier_dropout=0.0,
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.0,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **SIZE,
    ),
    "gpt2": lambda: GPT2Config(  # whose weights lie the other way round
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip
AUTO = {
    "bart": AutoModelForSeq2SeqLM,
    "t5": AutoModelForSeq2SeqLM,
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over :data:`WORDS`: ``<s> words </s>``."""
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def tiny_model(kind: str, folder: Path, num_labels: int = 2) -> Path:
    """Save a tiny model of ``kind`` (a key of :data:`CONFIGS`) with its tokenizer; encoders get a base without head."""
    out = folder / kind
    if not out.exists():
        config = CONFIGS[kind]()
        auto = AUTO.get(kind, AutoModelForSequenceClassification)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = auto.from_config(config)
            if kind not in AUTO:
                model = getattr(model, model.base_model_prefix)  # as pretrained encoders come: the head is new
        model.save_pretrained(out)
        tiny_tokenizer().save_pretrained(out)
    return out


def masked_bert(folder: Path) -> Path:
    """Save a tiny BERT with the head that fills in masks."""
    out = folder / "bert-with-head"
    if not out.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForMaskedLM.from_config(CONFIGS["bert"]()).save_pretrained(out)
        tiny_tokenizer().save_pretrained(out)
    return out
