"""Tiny models of architectures that are no base of the other tests, each for a trait of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

from tests.runs import write_data
from tests.tiny import NO_DROPOUT, SIZE, VOCAB, tiny_tokenizer

IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = SIZE | IDS | NO_DROPOUT | {"max_position_embeddings": 128}
DECODER = SIZE | IDS | {"num_key_value_heads": 2, "max_position_embeddings": 128}
BART = IDS | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "decoder_start_token_id": 2,
    "forced_eos_token_id": 2, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "classifier_dropout": 0.0,
}  # fmt: skip
GPT2 = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def gemma3(tied: bool = True) -> Any:
    """Text and images; the text's half has a vocabulary of its own in the config."""
    return t.Gemma3Config(
        text_config=t.Gemma3TextConfig(**DECODER, head_dim=8, tie_word_embeddings=tied),
        vision_config=t.SiglipVisionConfig(**VISION, image_size=28, patch_size=14),
        mm_tokens_per_image=4, image_token_index=VOCAB - 1, boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[], Any]] = {
    "roberta": lambda: t.RobertaConfig(**ENCODER),
    "roberta-decoder": lambda: t.RobertaConfig(**ENCODER, is_decoder=True),
    "bert": lambda: t.BertConfig(**ENCODER),
    "bert-decoder": lambda: t.BertConfig(**ENCODER, is_decoder=True),
    "xlm-roberta": lambda: t.XLMRobertaConfig(**ENCODER),
    "camembert": lambda: t.CamembertConfig(**ENCODER),
    "electra": lambda: t.ElectraConfig(**ENCODER, embedding_size=32),
    "ernie": lambda: t.ErnieConfig(**ENCODER),
    "data2vec": lambda: t.Data2VecTextConfig(**ENCODER),
    "megatron-bert": lambda: t.MegatronBertConfig(**ENCODER),
    "rembert": lambda: t.RemBertConfig(**ENCODER, input_embedding_size=32, output_embedding_size=32),
    "roformer": lambda: t.RoFormerConfig(**ENCODER),
    "big_bird": lambda: t.BigBirdConfig(**ENCODER, sep_token_id=2),
    "xlnet": lambda: t.XLNetConfig(**IDS, d_model=32, n_layer=2, n_head=4, d_inner=64, dropout=0.0),
    "xlm": lambda: t.XLMConfig(n_words=VOCAB, emb_dim=32, n_layers=2, n_heads=4, pad_index=0, eos_index=2,
                               pad_token_id=0, bos_token_id=1, eos_token_id=2, dropout=0.0),
    "llama": lambda: t.LlamaConfig(**DECODER),
    "llama-tied": lambda: t.LlamaConfig(**DECODER, tie_word_embeddings=True),
    "qwen2-tied": lambda: t.Qwen2Config(**DECODER, tie_word_embeddings=True),
    "mixtral": lambda: t.MixtralConfig(**DECODER, num_local_experts=4),
    "phimoe": lambda: t.PhimoeConfig(**DECODER, num_local_experts=4),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(**DECODER, moe_intermediate_size=32, shared_expert_intermediate_size=32,
                                          num_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: t.GPT2Config(**GPT2),
    "openai-gpt": lambda: t.OpenAIGPTConfig(**GPT2),
    "bloom": lambda: t.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4),
    "opt": lambda: t.OPTConfig(**IDS, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, ffn_dim=64,
                               num_attention_heads=4, max_position_embeddings=128, layerdrop=0.1),
    "mamba": lambda: t.MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": lambda: t.Mamba2Config(**IDS, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1,
                                     state_size=4, chunk_size=8),
    "rwkv": lambda: t.RwkvConfig(**IDS, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "jamba": lambda: t.JambaConfig(**DECODER, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1,
                                   expert_layer_period=2, expert_layer_offset=1, mamba_dt_rank=4, mamba_d_state=4),
    "gemma3": gemma3,
    "bart": lambda: t.BartConfig(**BART),
    "bart-untied": lambda: t.BartConfig(**BART, tie_word_embeddings=False),
    "bart-layerdrop": lambda: t.BartConfig(**BART, encoder_layerdrop=0.5, decoder_layerdrop=0.5),
    "bart-decoder": lambda: t.BartConfig(**BART, is_decoder=True, is_encoder_decoder=False),
    "m2m_100": lambda: t.M2M100Config(**BART, encoder_layerdrop=0.05, decoder_layerdrop=0.05),
    "mbart": lambda: t.MBartConfig(**BART),
    "led": lambda: t.LEDConfig(**BART, attention_window=4, max_encoder_position_embeddings=64,
                               max_decoder_position_embeddings=64),
    "t5": lambda: t.T5Config(**T5, tie_word_embeddings=True),
    "t5-untied": lambda: t.T5Config(**T5, tie_word_embeddings=False),
    "umt5": lambda: t.UMT5Config(**T5, tie_word_embeddings=True),
    "mt5": lambda: t.MT5Config(**T5, tie_word_embeddings=True),
}  # fmt: skip
SEQ2SEQ = {"bart", "bart-untied", "bart-layerdrop", "m2m_100", "mbart", "led", "t5", "t5-untied", "umt5", "mt5"}


def auto_of(kind: str, task: str | None = None) -> Any:
    """The auto class of a kind's task, or of another one."""
    task = task or ("seq2seq" if kind in SEQ2SEQ else "causal")
    return {
        "seq2seq": t.AutoModelForSeq2SeqLM,
        "causal": t.AutoModelForCausalLM,
        "classification": t.AutoModelForSequenceClassification,
    }[task]


def saved(kind: str, folder: Path, task: str | None = None) -> Path:
    """A model of a kind with its head and a tokenizer, as a folder. Random weights are large enough to tell apart."""
    out = folder / f"zoo-{kind}-{task}"
    if not out.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = auto_of(kind, task).from_config(CONFIGS[kind]())
            for name, param in model.named_parameters():
                if param.dim() > 1 and not name.endswith(("A_log", "time_decay")):
                    param.data.normal_(0, 0.1)
        model.save_pretrained(out)
        tiny_tokenizer().save_pretrained(out)
    return out


def tree_of(kind: str, tmp_path: Path, models: Path, form: str | None = None, **sections: Any) -> dict[str, Any]:
    """A plain run of two steps on a kind, of its own task or another."""
    task = form or ("seq2seq" if kind in SEQ2SEQ else "causal")
    tree: dict[str, Any] = {
        "run": {"name": "run", "output_dir": str(tmp_path / "runs")},
        "model": {"name_or_path": str(saved(kind, models, task))},
        "task": write_data(tmp_path / f"data-{task}", task) | {"num_beams": 1},
        "adapter": {"method": "lora", "r": 2},
        "train": {"max_steps": 2, "batch_size": 4, "lr": 1e-2},
    }
    for section, values in sections.items():
        tree[section] = tree[section] | values
    return tree
