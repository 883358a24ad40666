"""How many tokens a model takes: from the sizes of its tables of positions, of encoder and decoder apart."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.objectives.model_inputs import counts_positions_from_pads

#: Tables of absolute positions by their names; of distances (``relative_attention_bias``) there is no limit.
_TABLE = re.compile(r"(^|\.)(position_embeddings?|embed_positions|positions_embed|wpe)$")

#: Towers that read no text.
_OTHER = re.compile(r"vision|visual|image|audio|speech")
#: Tables of GPT-J, CodeGen and CTRL that are computed, but once.
_COMPUTED = re.compile(r"(^|\.)(embed_positions|pos_encoding)$")


def position_limits(model: nn.Module) -> dict[str, int]:
    """Most tokens of ``encoder`` and ``decoder``; a side without a table of positions has no entry.

    A model of one side is its own encoder. Tables have rows that no token can have: two before the first in BART and
    OPT, all up to the padding token's number in RoBERTa. Tables that are computed for any length, as M2M100's, rotary
    and relative positions and ALiBi have no limit.

    Args:
        model: its modules; their weights need not be there.
    """
    limits: dict[str, int] = {}
    model_config: Any = model.config
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _TABLE.search(name) and not _OTHER.search(name):
            side = "decoder" if model_config.is_encoder_decoder and ".decoder." in f".{name}" else "encoder"
            limits[side] = min(_rows(module, side, model_config), limits.get(side, module.num_embeddings))
    computed = [
        len(buffer) for name, buffer in model.named_buffers() if _COMPUTED.search(name) and not _OTHER.search(name)
    ]
    if model_config.model_type == "mpt":  # its ALiBi, alone of all, is computed for a fixed length
        computed.append(int(model_config.max_seq_len))
    if computed:
        limits["encoder"] = min([*computed, *limits.values()])
    return limits


def _rows(table: nn.Embedding, side: str, model_config: Any) -> int:
    """Positions of a table that tokens can have."""
    rows = table.num_embeddings - int(getattr(table, "offset", 0))
    if type(table) is nn.Embedding and table.padding_idx is not None and counts_positions_from_pads(model_config):
        rows -= table.padding_idx + 1
    declared = getattr(model_config, "max_position_embeddings", None)
    if isinstance(declared, int) and 0 < declared < rows:  # Nystromformer's table has two rows that are not used
        rows = declared
    window = getattr(model_config, "attention_window", None)
    if window and side == "encoder" and model_config.is_encoder_decoder:  # LED fills a text up to whole windows
        largest = max(window) if isinstance(window, list | tuple) else int(window)
        rows -= rows % largest
    return rows


def check_lengths(cfg: TaskConfig, model: nn.Module, *, ahead: int = 0) -> None:
    """Check the task's lengths against a model that has a fixed number of positions.

    Args:
        ahead: positions that ``adapter.prompt_tokens`` takes from the text that is read.

    Raises:
        UserError: naming the key, its value and the limit. Without the check the run would end at its first
            long sample, with an index error deep in the model.
    """
    limits = position_limits(model)
    if cfg.type == "seq2seq":
        allowed = {"max_length": limits.get("encoder"), "max_target_length": limits.get("decoder")}
    else:  # a classifier's decoder reads the text, too
        allowed = {"max_length": min(limits.values(), default=None)}
    for key, limit in allowed.items():
        if ahead and key == "max_length" and limit is not None and cfg.max_length + ahead > limit:
            raise UserError(
                f"task.max_length={cfg.max_length} and adapter.prompt_tokens={ahead}: the model takes {limit} tokens; "
                "lower either"
            )
        if limit is not None and getattr(cfg, key) > limit:
            raise UserError(f"task.{key}={getattr(cfg, key)}: the model takes {limit} tokens; lower it")
