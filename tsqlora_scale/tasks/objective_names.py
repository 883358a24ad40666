"""``task.objective`` and ``task.type``: which objective it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.extensions import load_extension
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.objectives.causal import CausalObjective
from tsqlora_scale.tasks.objectives.chat import ChatObjective
from tsqlora_scale.tasks.objectives.label_heads import LabelObjective
from tsqlora_scale.tasks.objectives.prompted import prompted_class
from tsqlora_scale.tasks.objectives.seq2seq import Seq2SeqObjective


def objective_class(cfg: TaskConfig) -> Any:
    """The implementation of :class:`.Objective`: ``task.objective``, or that of the task's type.

    Raises:
        UserError: an extension that cannot be imported, is no class, or is no objective.
    """
    if cfg.prompt is not None:
        return prompted_class(cfg)
    if cfg.objective is None:
        causal = CausalObjective if cfg.messages is None else ChatObjective
        return {"seq2seq": Seq2SeqObjective, "causal": causal}.get(cfg.type, LabelObjective)
    found = load_extension(cfg.objective, key="task.objective")
    if not isinstance(found, type):
        raise UserError(f"task.objective={cfg.objective!r}: is no class; name the class of an objective")
    check_members(cfg, found, ("auto_class", "peft_task_type", "collate", "losses", "predict", "preview"))
    return found


def check_members(cfg: TaskConfig, objective: Any, members: Sequence[str]) -> None:
    """``columns`` and ``answer`` follow the config: an instance has them, its class need not."""
    missing = [member for member in members if not hasattr(objective, member)]
    if missing:
        raise UserError(
            f"task.objective={cfg.objective!r}: is no objective, it lacks {', '.join(missing)}; derive it from one of "
            "tsqlora_scale.tasks.objectives"
        )


def auto_class_of(cfg: TaskConfig) -> Any:
    """The transformers auto class that loads models for a task."""
    return objective_class(cfg).auto_class
