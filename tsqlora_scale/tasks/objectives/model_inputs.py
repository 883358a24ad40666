"""What a model's forward takes, and how rows are padded for it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.tasks.batch import pad_rows
from tsqlora_scale.tasks.objectives.tokenizing import pad_id


def model_class(auto_class: Any, model_config: PretrainedConfig) -> Any:
    """The class that an auto class builds for a config; None where it cannot be known before it is loaded."""
    try:
        found = auto_class._model_mapping[type(model_config)]
    except (AttributeError, KeyError):  # code of the model's own, or an auto class of the user's
        return None
    return found[0] if isinstance(found, tuple) else found


def counts_positions_from_pads(model_config: PretrainedConfig) -> bool:
    """Whether the model numbers its positions from the padding token's id on, as RoBERTa does."""
    name = type(model_config).__module__.replace(".configuration_", ".modeling_")
    try:
        source = inspect.getsource(importlib.import_module(name))
    except (ImportError, OSError, TypeError):
        return False
    return bool(re.search(r"create_position_ids_from_input_ids|def make_positions", source))


class InputRows:
    """Rows of what a tokenizer gives, as tensors of what the model takes.

    A tokenizer may give more than its model knows: BERT's gives segment ids to BART, which has no argument for them,
    and numbers two segments where RoBERTa has one. Those are left out.

    Rows are padded on the tokenizer's own side. On the left the model is told the positions, so that a row means the
    same beside a longer one; a model that cannot be told them, or has an encoder and a decoder, is padded on the
    right whatever its tokenizer says.
    """

    def __init__(self, auto_class: Any, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        built = model_class(auto_class, model_config)
        self._known = built is not None
        forward = {} if built is None else dict(inspect.signature(built.forward).parameters)
        self._takes = set(forward)
        number = getattr(model_config, "type_vocab_size", None)
        self._segments = self._takes_segments(tokenizer, model_config.model_type, number)
        segment = tokenizer.pad_token_type_id
        outside = isinstance(number, int) and segment >= number
        self._fill = {"input_ids": pad_id(tokenizer), "token_type_ids": 0 if outside else segment}
        learned = getattr(model_config, "max_position_embeddings", None)
        told = "position_ids" in self._takes
        knows_places = told or not isinstance(learned, int) or learned <= 0
        counts = counts_positions_from_pads(model_config)
        #: Whether rows are padded on the left.
        self.on_the_left = (
            tokenizer.padding_side == "left" and not model_config.is_encoder_decoder and knows_places and not counts
        )
        self._tells_positions = self.on_the_left and told

    def tensors(self, encoded: Mapping[str, list[list[int]]]) -> dict[str, Tensor]:
        """The rows padded to the longest, each name (B, T) int64."""
        names = [name for name in encoded if self._passes(name)]
        inputs = {
            name: pad_rows(encoded[name], self._fill.get(name, 0), on_the_left=self.on_the_left) for name in names
        }
        if self._tells_positions:
            mask = inputs["attention_mask"]
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return inputs

    def _passes(self, name: str) -> bool:
        if name == "token_type_ids":
            return self._segments
        return not self._known or name in self._takes

    def _takes_segments(self, tokenizer: PreTrainedTokenizerBase, model_type: str, number: int | None) -> bool:
        """Whether segment ids mean to the model, which knows ``number`` segments, what they mean to the tokenizer."""
        if not self._known:
            return True
        if "token_type_ids" not in self._takes:
            return False
        if number is None:  # XLNet's are relative, so any number will do; GPT-2 and XLM look them up among the words
            return model_type == "xlnet"
        pair = tokenizer(["a"], ["a"])
        return max(pair.get("token_type_ids", [[0]])[0], default=0) < number
