"""Tiny random models of many architectures, described by their configs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from tests.bad_input.place import edit_json
from tests.runs import run_tree
from tests.tiny import VOCAB
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import Config

USUAL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
WIDE = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 64}  # fmt: skip
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout", "dropout",
    "embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout", "summary_last_dropout", "dropout_rate",
    "activation_dropout", "classifier_dropout", "cls_dropout", "pooler_dropout", "seq_classif_dropout",
    "embed_dropout", "resid_dropout", "classifier_dropout_prob", "embedding_dropout",
)  # fmt: skip
NO_DROPOUT = dict.fromkeys(DROPOUTS, 0.0)
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": USUAL,
    "roberta": USUAL,
    "xlm-roberta": USUAL,
    "mpnet": USUAL,
    "esm": USUAL | {"token_dropout": False, "position_embedding_type": "absolute"},
    "electra": USUAL | {"embedding_size": 32},
    "albert": USUAL | {"embedding_size": 32},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    "deberta-v2": USUAL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "longformer": USUAL | {"attention_window": 8},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "funnel": {"d_model": 32, "block_sizes": [1, 1], "n_head": 4, "d_head": 8, "d_inner": 64},
    "llama": USUAL | {"num_key_value_heads": 2},
    "mistral": USUAL | {"num_key_value_heads": 2},
    "qwen2": USUAL | {"num_key_value_heads": 2},
    "gemma": USUAL | {"num_key_value_heads": 2, "head_dim": 8},
    "phi": USUAL,
    "gpt_neox": USUAL,
    "gpt2": OLD,
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                "max_position_embeddings": 64},
    "gptj": OLD | {"rotary_dim": 4},
    "gpt_bigcode": OLD,
    "codegen": OLD | {"rotary_dim": 4},
    "ctrl": OLD | {"dff": 64},
    "openai-gpt": OLD,
    "opt": USUAL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "biogpt": USUAL,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bart": WIDE,
    "mbart": WIDE,
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
#: Token numbers of the tiny tokenizer.
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def describe_family(kind: str, **changes: Any) -> Any:
    """A config of that architecture with the tiny tokenizer's token numbers."""
    values = {"vocab_size": VOCAB, **NO_DROPOUT, **FAMILIES[kind], **TOKENS, **changes}
    return AutoConfig.for_model(kind, **values)


def save_family(folder: Path, kind: str, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> Path:
    """A model's folder without weights."""
    describe_family(kind, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", padding_side=tokenizer.padding_side)  # it saves what it was made with
    return folder


def config_over(folder: Path, place: Path, like: str = "bert", **task: Any) -> Config:
    """A run of the model in ``folder``, whose task is that of the tiny model ``like``."""
    tree = run_tree(like, place, place, "run", model={"name_or_path": str(folder)})
    tree["task"] |= task
    return parse_config(tree)


def build_family(model_config: Any, auto_class: Any = AutoModelForSequenceClassification) -> Any:
    """The random model of a config, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = auto_class.from_config(model_config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
