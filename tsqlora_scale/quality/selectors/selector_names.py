"""Selectors by their names in the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.extensions import load_extension
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.quality.selectors.by_query import QuerySelector
from tsqlora_scale.quality.selectors.by_steps import OnlineSelector
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.quality.selectors.random_subset import RandomSelector
from tsqlora_scale.quality.selectors.selector import Selector, SelectorContext


def by_quality(context: SelectorContext) -> Selector:
    """By scores of passes over the pool or of the training steps, as ``scoring.source`` says."""
    return OnlineSelector(context) if context.config.scores_online else QualitySelector(context)


SELECTORS: dict[str, Callable[[SelectorContext], Selector]] = {
    "full": FullSelector,
    "random": RandomSelector,
    "query": QuerySelector,
    "quality": by_quality,
}


def selector_class(name: str) -> Callable[[SelectorContext], Selector]:
    """What ``sampling.selector`` names.

    Raises:
        UserError: an extension that cannot be imported, or is no selector.
    """
    if name in SELECTORS:
        return SELECTORS[name]
    found: Any = load_extension(name, key="sampling.selector")
    missing = [m for m in vars(Selector) if not m.startswith("_") and not hasattr(found, m)]
    if missing:
        raise UserError(
            f"sampling.selector={name!r}: is no selector, it lacks {', '.join(missing)}; "
            "derive it from tsqlora_scale.quality.selectors.full.FullSelector"
        )
    return found  # type: ignore[no-any-return]
