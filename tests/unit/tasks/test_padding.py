"""A row means the same alone and beside a longer one, whatever the config says of padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma3Config, PreTrainedTokenizerFast

from tests.tiny import VOCAB, WORDS, tiny_tokenizer
from tests.unit.tasks.families import FAMILIES, build_family, config_over, save_family
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.model.describe import load_descriptions
from tsqlora_scale.tasks import Task, build_task, load_data

DECODERS = ["llama", "mistral", "qwen2", "gemma", "phi", "gpt_neox", "gpt2", "gpt_neo", "gptj", "gpt_bigcode", "opt",
            "openai-gpt", "bloom", "mpt", "falcon", "biogpt"]  # fmt: skip


def open_family(
    tmp_path: Path, kind: str, *, tokenizer: Any = None, changes: dict[str, Any] | None = None, **task: Any
) -> tuple[Task, Any, Any, Any]:
    """The task, the model, its config and the tokenizer, as a run has them."""
    folder = save_family(tmp_path / "model", kind, tokenizer or tiny_tokenizer(), **(changes or {}))
    config = config_over(folder, tmp_path, **task)
    model_config, opened = load_descriptions(config, str(folder))
    made = build_task(config.task, load_data(config.task, seed=0), opened, model_config)
    return made, build_family(model_config), model_config, opened


def logits(task: Task, model: Any, rows: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**task.batch(rows).inputs).logits
    return found


def assert_rows_agree(task: Task, model: Any) -> None:
    rows = range(5)
    batch = task.batch(rows)
    assert (batch.inputs["attention_mask"] == 0).any(), "nothing is padded, nothing is tested"
    together = logits(task, model, rows)
    alone = torch.cat([logits(task, model, [i]) for i in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.std(0).min() > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "codegen"])  # which has no classifier
def test_a_row_alone_and_in_a_batch(kind: str, side: str, tmp_path: Path) -> None:
    made = tiny_tokenizer()
    made.padding_side = side
    task, model, _, _ = open_family(tmp_path, kind, tokenizer=made)
    assert_rows_agree(task, model)


@pytest.mark.parametrize("pad", [7, -1, None])
@pytest.mark.parametrize("kind", DECODERS)
def test_the_models_pad_is_the_tokenizers(kind: str, pad: int | None, tmp_path: Path) -> None:
    task, model, model_config, tokenizer = open_family(tmp_path, kind, changes={"pad_token_id": pad})
    assert model_config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.config.get_text_config().pad_token_id == 0
    assert_rows_agree(task, model)


def last_real(task: Task, model: Any, rows: Any) -> torch.Tensor:
    """Logits at the last token that the mask shows."""
    inputs = task.batch(rows).inputs
    with torch.no_grad():
        states = model.model(**inputs).last_hidden_state
        every = model.score(states)
    places = torch.arange(every.shape[1]) * inputs["attention_mask"]
    return every[torch.arange(len(every)), places.argmax(1)]


@pytest.mark.parametrize("pad", ["</s>", "<unk>", "film"])
def test_a_pad_that_ends_texts_is_replaced(pad: str, tmp_path: Path) -> None:
    """The tokenizer puts ``</s>`` behind every text; some end with unknown words."""
    made = tiny_tokenizer()
    made.pad_token = pad
    task, model, model_config, tokenizer = open_family(tmp_path, "llama", tokenizer=made)
    assert tokenizer.pad_token not in ("</s>", "<s>", "<unk>", "film")
    assert model_config.pad_token_id == tokenizer.pad_token_id
    assert_rows_agree(task, model)
    torch.testing.assert_close(logits(task, model, range(6)), last_real(task, model, range(6)), atol=1e-5, rtol=1e-5)


def ended_by_its_pad() -> Any:
    """A tokenizer without any token to spare."""
    vocab = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("spare", [0, 24])
def test_a_pad_of_its_own_takes_a_row_to_spare(spare: int, tmp_path: Path) -> None:
    if not spare:
        with pytest.raises(UserError, match=r"padding token '</s>' also occurs in texts; give the tokenizer"):
            open_family(tmp_path, "mistral", tokenizer=ended_by_its_pad(), changes={"vocab_size": len(WORDS) + 2})
        return
    changes = {"vocab_size": len(WORDS) + 2 + spare}
    task, model, model_config, tokenizer = open_family(
        tmp_path, "mistral", tokenizer=ended_by_its_pad(), changes=changes
    )
    assert model_config.pad_token_id == tokenizer.pad_token_id == len(WORDS) + 2
    assert_rows_agree(task, model)


@pytest.mark.parametrize("kind", ["xlnet", "llama", "gpt2", "opt", "bloom"])
def test_the_tokenizers_side_is_padded(kind: str, tmp_path: Path) -> None:
    made = tiny_tokenizer()
    made.padding_side = "left"
    task, _, _, _ = open_family(tmp_path, kind, tokenizer=made)
    mask = task.batch(range(5)).inputs["attention_mask"]
    assert mask[:, -1].all() and not mask[:, 0].all()


def test_positions_that_count_from_the_pad_stay(tmp_path: Path) -> None:
    """RoBERTa's: another number would shift all positions; a special token of that number becomes the tokenizer's."""
    task, model, model_config, tokenizer = open_family(tmp_path, "roberta", changes={"pad_token_id": 4})
    assert model_config.pad_token_id == tokenizer.pad_token_id == 4
    assert_rows_agree(task, model)


def test_nested_configs_have_it_too(tmp_path: Path) -> None:
    made = tiny_tokenizer()
    text = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "pad_token_id": 9}  # fmt: skip
    Gemma3Config(text_config=text).save_pretrained(tmp_path / "model")
    made.save_pretrained(tmp_path / "model")
    described, _ = load_descriptions(config_over(tmp_path / "model", tmp_path), str(tmp_path / "model"))
    assert described.text_config.pad_token_id == described.pad_token_id == 0
