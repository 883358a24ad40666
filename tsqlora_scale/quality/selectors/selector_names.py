"""Selectors by their names in the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.extensions import load_extension
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.quality.selectors.by_query import QuerySelector
from tsqlora_scale.quality.selectors.by_steps import OnlineSelector
from tsqlora_scale.quality.selectors.dsir import DsirSelector
from tsqlora_scale.quality.selectors.el2n import El2nSelector
from tsqlora_scale.quality.selectors.from_file import FileSelector
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.quality.selectors.grad_norm import GradNormSelector
from tsqlora_scale.quality.selectors.infobatch import InfoBatchSelector
from tsqlora_scale.quality.selectors.instruction_mining import InstructionMiningSelector
from tsqlora_scale.quality.selectors.k_center import KCenterSelector
from tsqlora_scale.quality.selectors.less import LessSelector
from tsqlora_scale.quality.selectors.random_subset import RandomSelector
from tsqlora_scale.quality.selectors.rds import RdsSelector
from tsqlora_scale.quality.selectors.rho import RhoSelector
from tsqlora_scale.quality.selectors.rs2 import RedrawnSelector
from tsqlora_scale.quality.selectors.selector import Selector, SelectorContext
from tsqlora_scale.quality.selectors.ts_dshapley import TransferredShapleySelector


def by_quality(context: SelectorContext) -> Selector:
    """By scores of passes over the pool or of the training steps, as ``scoring.source`` says."""
    return OnlineSelector(context) if context.config.scores_online else QualitySelector(context)


SELECTORS: dict[str, Callable[[SelectorContext], Selector]] = {
    "full": FullSelector,
    "random": RandomSelector,
    "query": QuerySelector,
    "quality": by_quality,
    "less": LessSelector,
    "rho": RhoSelector,
    "rds": RdsSelector,
    "dsir": DsirSelector,
    "k_center": KCenterSelector,
    "ts_dshapley": TransferredShapleySelector,
    "instruction_mining": InstructionMiningSelector,
    "grad_norm": GradNormSelector,
    "el2n": El2nSelector,
    "file": FileSelector,
    "rs2": RedrawnSelector,
    "infobatch": InfoBatchSelector,
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
