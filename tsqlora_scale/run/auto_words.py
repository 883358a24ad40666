"""``task.label_words: auto``, found once before the first step; and what another run has found out for its prompts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.features.hidden_states import without_adapters
from tsqlora_scale.tasks.batch import slot_logits
from tsqlora_scale.tasks.evaluation import evaluating, own_batches
from tsqlora_scale.tasks.objectives.prompted import PromptedObjective
from tsqlora_scale.tasks.rows.demonstrations import class_sample
from tsqlora_scale.tasks.task import Task
from tsqlora_scale.tasks.word_search import best_words, likely_words

log = logging.getLogger("tsqlora_scale")

#: Samples of a class that the words are found by, and of all classes together.
OF_A_CLASS, OF_ALL = 32, 1024
#: Words of a class that are looked at, and of all classes together.
WORDS, ALL_WORDS = 100, 1000


def with_found_words(config: Config, task: Task, module: nn.Module, world: World) -> Config:
    """The config with label words, which the task's objective then has, too. A collective.

    Args:
        module: the model itself; its adapters have no say.

    Raises:
        UserError: the base puts too few words at the slot.
    """
    if config.task.label_words != "auto":
        return config
    objective = task.prompted
    assert objective is not None, "words are of prompts"
    words = find_words(config, task, objective, module, world)
    config = config.with_task(label_words=words)
    objective.take_words(words)
    names = config.task.labels if isinstance(config.task.labels, list) else range(len(words))
    if world.is_main:
        pairs = ", ".join(f"{name} -> {word}" for name, word in zip(names, words, strict=True))
        log.warning("task.label_words: the base's own words at the slot of task.prompt are %s", pairs)
    return config


def find_words(config: Config, task: Task, objective: PromptedObjective, module: nn.Module, world: World) -> list[str]:
    """The words by two passes of the frozen base over some samples of every class. A collective.

    Raises:
        UserError: on every rank, there are too few.
    """
    cfg = config.task
    most = max(min(OF_A_CLASS, OF_ALL // cfg.num_labels), 1)
    with world.together():
        drawn = class_sample(cfg, task.train, most, seed=config.run.seed, purpose="label words")
        lacks = next((number for number, own in enumerate(drawn) if not len(own)), None)
        if lacks is not None:
            name = cfg.labels[lacks] if isinstance(cfg.labels, list) else lacks
            raise UserError(f"task.label_words: auto finds no training row of the class {name!r}; give the words")
    rows, classes = (
        np.concatenate(drawn),
        torch.arange(cfg.num_labels).repeat_interleave(torch.tensor([len(own) for own in drawn])),
    )
    label_of = dict(zip(rows.tolist(), classes.tolist(), strict=True))
    size = config.train.eval_batch_size

    def seen(columns: torch.Tensor | None) -> Any:
        """Log-probabilities at the slots: summed by class (C, V), or of some tokens by row, over this rank's rows."""
        sums: torch.Tensor | None = None
        found: dict[int, np.ndarray] = {}
        for own, batch in own_batches(task, world, rows, batch_size=size, split="train"):
            logits = slot_logits(task.outputs(module, batch).logits, batch).float().log_softmax(-1).cpu()
            if columns is not None:
                found |= {} if own is None else dict(zip(own.tolist(), logits[:, columns].numpy(), strict=True))
                continue
            sums = torch.zeros(cfg.num_labels, logits.shape[1], dtype=torch.float64) if sums is None else sums
            if own is not None:
                sums.index_add_(0, torch.tensor([label_of[row] for row in own.tolist()]), logits.double())
        return found if columns is not None else sums

    with evaluating(module), without_adapters(module):
        sums = world.sum(seen(None))
        most = max(min(WORDS, ALL_WORDS // cfg.num_labels), cfg.num_labels + 1)
        likely = world.from_main(lambda: likely_words(sums[:, : len(task.tokenizer)], objective.word_of, most))
        few = min(map(len, likely))
        if few <= cfg.num_labels:
            raise UserError(
                f"task.label_words: auto finds {few} whole words that are single tokens at the slot, too few for "
                f"{cfg.num_labels} classes; give the words"
            )
        tokens = sorted({token for own in likely for token in own})
        parts = world.gather_objects(seen(torch.tensor(tokens)))
    merged = {row: values for part in parts for row, values in part.items()}
    scores = torch.from_numpy(np.stack([merged[row] for row in rows.tolist()]))
    columns = [[tokens.index(token) for token in own] for own in likely]
    chosen = world.from_main(lambda: best_words(scores, classes, columns))
    return [str(objective.word_of(tokens[column])) for column in chosen]


def found_before(config: Config, written: Mapping[str, Any]) -> Config:
    """The config with what another run of the same prompt found out, as far as this one leaves it open.

    Args:
        written: the ``task`` of that run's resolved config.
    """
    task = config.task
    if task.prompt is None or written.get("prompt") != task.prompt:
        return config
    if task.label_words == "auto" and isinstance(written.get("label_words"), list):
        config = config.with_task(label_words=written["label_words"])
    if task.demonstrations == written.get("demonstrations") and not task.demonstrated:
        config = config.with_task(demonstrated=written["demonstrated"])
    return config


def check_found(config: Config) -> None:
    """See that a prompt is the one that an adapter was trained on.

    Raises:
        UserError: what the run found out for it is not known.
    """
    task = config.task
    if task.prompt is None:
        return
    for key, is_open in (
        ("task.label_words=auto", task.label_words == "auto"),
        (f"task.demonstrations={task.demonstrations}", task.demonstrations > 0 and not task.demonstrated),
    ):
        if is_open:
            raise UserError(
                f"{key}: what the adapter's run found is not known; give the config.yaml of its run folder, which says"
            )
