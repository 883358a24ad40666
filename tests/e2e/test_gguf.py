"""GGUF files are the merged model: read by Transformers, logits and tokens are what they were."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t

from tests import zoo
from tests.vocabularies import CHAT, IDS, LLAMA3, ODD, QWEN2, SIZES, byte_level, sentencepiece_like, trained
from tsqlora_scale import UserError, export
from tsqlora_scale.config.load import parse_config

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the extra gguf")

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip

FRESH = """
import json, sys
sys.modules["tsqlora_scale"] = sys.modules["peft"] = None  # as if they were not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
places, texts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for name, (folder, file) in places.items():
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 32).reshape(3, 9)).logits.tolist()
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    found[name] = {"logits": logits, "tokens": tokens, "template": tokenizer.chat_template}
print(json.dumps(found))
"""


CASES: dict[str, tuple[Any, Any, str, float]] = {
    "llama": (t.LlamaConfig(**SIZES, **IDS), byte_level(LLAMA3, begins=True), "f32", 1e-5),
    "llama-2": (t.LlamaConfig(**SIZES | {"vocab_size": 380}, **IDS), sentencepiece_like(), "f16", 0.02),
    "mistral": (t.MistralConfig(**SIZES, **IDS, sliding_window=None), byte_level(LLAMA3), "bf16", 0.15),
    "qwen2": (t.Qwen2Config(**SIZES, **IDS, tie_word_embeddings=True), byte_level(QWEN2), "f32", 1e-5),
    "qwen3": (t.Qwen3Config(**SIZES, **IDS, head_dim=128), byte_level(QWEN2), "q8_0", 0.15),
}


@pytest.mark.slow
def test_the_same_models(tmp_path: Path) -> None:
    """Read in a process without this package. The bounds of f16, bf16 and q8_0 are of logits of about 2."""
    places, expected = {}, {}
    for name, (model_config, tokenizer, gguf_type, _) in CASES.items():
        folder = tmp_path / name
        adapter, config, expected[name] = trained(model_config, tokenizer, folder)
        notes = export(adapter, "gguf", folder / "out", config=config, gguf_type=gguf_type)  # type: ignore[arg-type]
        file = f"model-{gguf_type}.gguf"
        assert file in notes[-1]
        assert sorted(path.name for path in (folder / "out").iterdir()) == ["README.md", file]
        places[name] = [str(folder / "out"), file]
    command = [sys.executable, "-c", FRESH, json.dumps(places), json.dumps(ODD)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        bound = CASES[name][-1]
        torch.testing.assert_close(torch.tensor(found["logits"]), expected[name], atol=bound, rtol=0)
        told = dict(zip(ODD, found["tokens"], strict=True))
        if name == "llama-2":  # Transformers puts no space before a space when it reads such a file; llama.cpp does
            told = {text: ids for text, ids in told.items() if not text.startswith(" ")}
        before = t.AutoTokenizer.from_pretrained(tmp_path / name / "base")
        assert told == {text: before(text)["input_ids"] for text in told}, name
        assert found["template"] == (CHAT if name != "llama-2" else None)


def test_the_header(tmp_path: Path) -> None:
    """What Transformers does not read: frequencies of Llama 3, types of tokens, what is put around a text."""
    import gguf

    model_config = t.LlamaConfig(**SIZES, **IDS, rope_parameters=LLAMA3_ROPE)
    adapter, config, _ = trained(model_config, byte_level(LLAMA3, begins=True), tmp_path)
    export(adapter, "gguf", tmp_path / "out", config=config)
    assert "gguf_file='model-f16.gguf'" in (tmp_path / "out" / "README.md").read_text()
    reader = gguf.GGUFReader(tmp_path / "out" / "model-f16.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "llama"
    assert said["llama.attention.head_count_kv"] == 2
    assert said["llama.rope.freq_base"] == 500000.0
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.add_eos_token"] is False
    assert said["tokenizer.ggml.eos_token_id"] == 1
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 384
    of_kind = {kind: [t for t, k in zip(tokens, kinds, strict=True) if k == kind] for kind in gguf.TokenType}
    assert of_kind[gguf.TokenType.CONTROL] == ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    assert of_kind[gguf.TokenType.USER_DEFINED] == ["<think>"]
    assert all(token.startswith("[PAD") for token in of_kind[gguf.TokenType.UNUSED])
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    model = t.LlamaForCausalLM(model_config).model
    plain = 500000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / factors, model.rotary_emb.inv_freq.numpy(), rtol=1e-5)


def test_what_is_not_served(tmp_path: Path, models_dir: Path) -> None:
    """Before anything is merged."""
    adapter, config, _ = trained(CASES["llama"][0], byte_level(r"\w+|\W+"), tmp_path)
    with pytest.raises(UserError, match=r"its tokenizer \(BPE, split by .*\) is none that is served: byte-level BPE"):
        export(adapter, "gguf", tmp_path / "out", config=config)
    gpt2 = parse_config(zoo.tree_of("gpt2", tmp_path, models_dir))
    with pytest.raises(UserError, match="is a gpt2 model for causal; served are causal models of the types llama"):
        export(adapter, "gguf", tmp_path / "out", config=gpt2)
    assert not list(tmp_path.glob(".out*"))
