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


def pools_by_pads(built: Any) -> bool:
    """Whether a class of classifiers looks for the last token that is not the padding token."""
    try:
        return built is not None and "pad_token_id" in inspect.getsource(built.forward)
    except (OSError, TypeError):
        return False


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

    A classifier that reads the last token which is no padding has its rows padded on the tokenizer's own side; on the
    left it is told the positions, so that a row means the same beside a longer one. One that reads its last position
    whatever it is, as XLNet does, is padded on the left; all others, which read the first, or a decoder's end, on the
    right.
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
        left = tokenizer.padding_side == "left" and (built is None or pools_by_pads(built))
        last = getattr(model_config, "summary_type", None) == "last"
        #: Whether rows are padded on the left.
        self.on_the_left = (left or last) and not model_config.is_encoder_decoder
        self._tells_positions = self.on_the_left and "position_ids" in self._takes

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
