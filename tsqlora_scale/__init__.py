"""Fine-tuning that chooses which data to learn from and where to spend rank.

The public interface: ``Config``, ``load_config``, ``plan``, ``train``, ``score``, ``audit``, ``advise``,
``evaluate``, ``evaluate_tasks``, ``predict``, ``export``, ``truncate``, ``load_adapter``, and the exceptions
``UserError`` and ``Stopped``. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsqlora_scale.advice.advice_result import AdviceResult
    from tsqlora_scale.api import (
        advise,
        audit,
        evaluate,
        evaluate_tasks,
        export,
        plan,
        predict,
        score,
        train,
        truncate,
    )
    from tsqlora_scale.audit.audit_result import AuditResult
    from tsqlora_scale.common.errors import Stopped, UserError
    from tsqlora_scale.config.load import load_config
    from tsqlora_scale.config.schema import Config
    from tsqlora_scale.model.adapters.adapter_type import load_adapter
    from tsqlora_scale.planning.forecast import Forecast
    from tsqlora_scale.report.run_results import PredictResult, ScoreResult, TrainResult

__version__ = "0.2.0.dev0"
__all__ = [
    "AdviceResult",
    "AuditResult",
    "Config",
    "Forecast",
    "PredictResult",
    "ScoreResult",
    "Stopped",
    "TrainResult",
    "UserError",
    "advise",
    "audit",
    "evaluate",
    "evaluate_tasks",
    "export",
    "load_adapter",
    "load_config",
    "plan",
    "predict",
    "score",
    "train",
    "truncate",
]

_HOMES = {
    **dict.fromkeys(("PredictResult", "ScoreResult", "TrainResult"), "report.run_results"),
    **dict.fromkeys(("advise", "audit", "evaluate", "evaluate_tasks", "export", "plan", "predict", "score"), "api"),
    **dict.fromkeys(("train", "truncate"), "api"),
    **dict.fromkeys(("Stopped", "UserError"), "common.errors"),
    "AdviceResult": "advice.advice_result",
    "AuditResult": "audit.audit_result",
    "Config": "config.schema",
    "Forecast": "planning.forecast",
    "load_adapter": "model.adapters.adapter_type",
    "load_config": "config.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
