"""Models whose forward is not like others: what it needs to know, what evaluation and packing make of their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ConvBertConfig,
    FNetConfig,
    ProphetNetConfig,
    XmodConfig,
)

from tests import zoo
from tests.runs import go, result_of, run_tree
from tests.tiny import NO_DROPOUT, SIZE, VOCAB, tiny_model, tiny_tokenizer
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model.linear_layers import is_linear
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run

TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
CLASSIFIERS: dict[str, Any] = {
    "fnet": lambda: FNetConfig(**TOKENS, **SIZE, hidden_dropout_prob=0.0),
    "convbert": lambda: ConvBertConfig(**TOKENS, **SIZE, **NO_DROPOUT, embedding_size=32),
    "xmod": lambda: XmodConfig(**TOKENS, **SIZE, **NO_DROPOUT, languages=["en_XX", "de_DE"]),
}


def classifier_tree(kind: str, tmp_path: Path, models: Path, **changes: Any) -> dict[str, Any]:
    """A run on a classifier; ``changes`` of its ``config.json``, where None takes a key out."""
    folder = tmp_path / "model"
    if kind in CLASSIFIERS:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_config(CLASSIFIERS[kind]())
            for param in model.parameters():
                param.data.normal_(0, 0.1)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    else:
        tiny_model(kind, models).rename(folder)
    described = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in described.items() if v is not None}))
    return run_tree("bert", tmp_path, models, "run", model={"name_or_path": str(folder)}, adapter={"method": "lora"})


@pytest.mark.parametrize("kind", ["fnet", "convbert"])
def test_a_model_that_reads_padding_is_said_to(
    kind: str, tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One without a mask, and one whose convolutions know none: and the model itself does what the copy does."""
    described = preflight.check(parse_config(classifier_tree(kind, tmp_path, models_dir)))
    assert "depends on the padding beside it" in caplog.text
    module = build_run(described).engine.module.eval()
    with torch.no_grad():
        together = described.task.losses(module, described.task.batch(np.arange(8), split="dev"))
        alone = [described.task.losses(module, described.task.batch([row], split="dev")) for row in range(8)]
    assert (together - torch.cat(alone)).abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["bert", "deberta", "bart", "llama", "gpt2"])
def test_others_are_not(kind: str, tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny_model(kind, models_dir)
    preflight.check(parse_config(run_tree("bert", tmp_path, models_dir, "run", model={"name_or_path": str(path)})))
    assert "padding beside it" not in caplog.text


def test_a_decoder_that_reads_padding(tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ProphetNet's decoder alone."""
    size = {"hidden_size": 32, "num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    config = ProphetNetConfig(**TOKENS, **size, is_decoder=True, is_encoder_decoder=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tree = zoo.tree_of("llama", tmp_path, models_dir, model={"name_or_path": str(tmp_path / "model")})
    preflight.check(parse_config(tree))
    assert "what this prophetnet model makes of a row depends on the padding beside it" in caplog.text


def test_a_classifier_whose_decoder_does_not_know_how_to_begin(tmp_path: Path, models_dir: Path) -> None:
    tree = classifier_tree("t5", tmp_path, tmp_path, decoder_start_token_id=None)
    with pytest.raises(UserError, match=r"'t5' model whose config\.json has no decoder_start_token_id"):
        preflight.check(parse_config(tree))


def test_x_mod_needs_a_language(tmp_path: Path, models_dir: Path) -> None:
    with pytest.raises(UserError, match=r"default_language of its config\.json is null; write one of en_XX, de_DE"):
        preflight.check(parse_config(classifier_tree("xmod", tmp_path, models_dir)))
    preflight.check(parse_config(classifier_tree("xmod", tmp_path / "told", models_dir, default_language="de_DE")))


def zoo_run(kind: str, tmp_path: Path, models: Path, **model: Any) -> Run:
    return go(zoo.tree_of(kind, tmp_path, models, model=model))


def test_weights_that_mamba_reads_are_not_packed(
    tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = zoo_run("mamba", tmp_path, models_dir, quantization="nf4")
    mixer: Any = run.engine.module.base_model.model.backbone.layers[0].mixer
    assert type(mixer.dt_proj) is torch.nn.Linear
    assert type(mixer.out_proj) is torch.nn.Linear
    assert not is_linear(mixer.in_proj)
    assert mixer.in_proj.base_layer.weight.dtype == torch.uint8
    assert "stay unquantised: backbone.layers.*.mixer.dt_proj, backbone.layers.*.mixer.out_proj" in caplog.text


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_rwkv_evaluates_what_it_has_trained(quantization: str, tmp_path: Path, models_dir: Path) -> None:
    """Its evaluation halves weights of its later blocks, unless told not to: not the adapter's, nor packed ones."""
    folder = models_dir / "rwkv-rescaled"
    if not folder.exists():
        model = zoo.auto_of("rwkv").from_pretrained(zoo.saved("rwkv", models_dir))
        model.config.rescale_every = 1
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    run = zoo_run("rwkv", tmp_path, models_dir, name_or_path=str(folder), quantization=quantization)
    module: Any = run.engine.module
    for name, param in module.named_parameters():
        if "lora_B" in name:
            param.data.normal_(0, 0.5)
    batch = run.task.batch(np.arange(4))
    with torch.no_grad():
        trained = run.task.losses(module.train(), batch)
        evaluated = run.task.losses(module.eval(), batch)
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-5)
    assert result_of(run.record.folder)["steps"] == 2


@pytest.mark.parametrize("source", ["pass", "online"])
def test_samples_are_not_taken_for_tokens_where_there_are_as_many(
    source: str, tmp_path: Path, models_dir: Path
) -> None:
    """LED's attention has time first, (T, B, width): here T = B = 8."""
    tree = zoo.tree_of("led", tmp_path, models_dir, train={"batch_size": 8, "max_steps": 4})
    folder = Path(tree["task"]["dataset"]["path"])
    words = ["the", "film", "is", "not", "very", "good"]
    rows = [{"text": " ".join(words[i % 6 :] + words[: i % 6]), "summary": "a plot"} for i in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["adapter"]["method"] = "tsqlora"
    tree["schedule"] = {"start": 2, "end": 3, "every": 1}
    tree["scoring"] = {"source": source, "warmup_steps": 1, "refresh": "none", "sketch_dim": 16, "batch_size": 8}
    run: Any = go(tree)
    assert run.task.batch(range(8)).inputs["input_ids"].shape == (8, 8)
    assert run.ranks.tracker._listener.whole_micro_batch
    if source == "online":
        assert "longformer_self_attn" in run.selector.scorer._gradients.shared
