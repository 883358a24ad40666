"""Which layers of a 4-bit model are packed, by the names in its files, which may be those of an older layout."""

from __future__ import annotations

import re

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests import zoo
from tsqlora_scale.model.base_model import skeleton
from tsqlora_scale.model.linear_layers import linear_layers
from tsqlora_scale.model.stored_quantization import kept_in_floating_point


@pytest.mark.parametrize("layout", ["today's", "older"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_packed_layers_are_found_by_any_name_that_loads(kind: str, layout: str) -> None:
    auto = AutoModelForImageTextToText if kind == "gemma3" else AutoModelForCausalLM
    bare = skeleton(auto, zoo.CONFIGS[kind]())
    packed = [name for name in linear_layers(bare) if "vision" not in name and "lm_head" not in name]
    assert packed
    names = [f"{name}.weight.quant_state.bitsandbytes__nf4" for name in packed]
    if layout == "older":  # of Llava's family before version 5 of the library
        names = [re.sub(r"^model\.language_model\.", "language_model.model.", name) for name in names]
        assert kind != "gemma3" or names[0].startswith("language_model.model.layers.")
    kept = kept_in_floating_point(bare, names)
    assert not set(packed) & set(kept)
    assert "lm_head" in kept
