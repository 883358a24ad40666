"""Which texts of a run are tokenized once, before its first step, and kept (``task.token_cache``)."""

from __future__ import annotations

import logging

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.schema import Config
from tsqlora_scale.report.progress import Progress
from tsqlora_scale.run.plan import RunPlan
from tsqlora_scale.run.preflight import Preflight
from tsqlora_scale.tasks.tokens.recipe import text_bytes
from tsqlora_scale.tasks.tokens.token_cache import NoPlace, TokenCache, cache_root
from tsqlora_scale.tasks.tokens.tokenizing_processes import Tokenizing

log = logging.getLogger("tsqlora_scale")

#: Bytes of text of a split that ``auto`` takes for much.
MUCH = 2**24


def keep_tokens(preflight: Preflight) -> None:
    """Tokenize what the run reads more than once, or find it tokenized. No collective: ranks meet at a lock on disk.

    Raises:
        UserError: the tokens cannot be written to a folder that the config names, or the task's tokens cannot be kept.
    """
    config, task = preflight.config, preflight.task
    setting = config.task.token_cache
    kept = task.kept_tokens
    if setting == "off":
        return
    if kept.columns is None:
        if setting != "auto":
            raise UserError(
                f"task.token_cache={shown(setting)}: tokens of an objective of one's own, or of a tokenizer without "
                "tokenizer.json, cannot be kept; set it to off"
            )
        return
    cache = TokenCache(cache_root(setting), config.task.tokenize_workers, setting)
    for split, limit, reads in _reads(config, preflight.plan, list(task.held_out)):
        view = task.read_rows(split)
        if setting == "auto" and (reads <= 1 or text_bytes(view, kept.columns) < MUCH):
            continue
        tokenizing = Tokenizing(config.task, preflight.tokenizer, preflight.model_config, limit)
        try:
            with Progress(f"tokenizing {split}", shows=launched_rank() == 0) as bar:
                store = cache.store(view, kept.columns, tokenizing, bar)
        except NoPlace as error:
            if setting != "auto":
                raise
            log.warning("%s; texts are tokenized as they are read", error)
            continue
        kept.keep(split, view, limit, store)


def _reads(config: Config, plan: RunPlan, held_out: list[str]) -> list[tuple[str, int, float]]:
    """Splits, the lengths that they are read at, and how often, about."""
    longest = config.task.max_length
    scored = min(config.scoring.max_length or longest, longest)
    trained = plan.total_steps * config.train.batch_size / plan.pool_size
    looks = 0.0
    if config.looks_at_pool and not plan.scores_online:
        events = len(plan.schedule.events) if config.refreshes_scores and plan.schedule is not None else 0
        looks = 1 + events * config.scoring.refresh_fraction
    reads = {("train", longest): trained}
    reads["train", scored] = reads.get(("train", scored), 0.0) + looks
    reads |= {(split, longest): config.train.evaluations(plan.total_steps) for split in held_out}
    return [(split, limit, times) for (split, limit), times in reads.items() if times]
