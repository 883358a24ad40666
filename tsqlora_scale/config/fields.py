"""What all sections share: kinds of values, and a section's strictness."""

from __future__ import annotations

import math
from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.extensions import is_extension

#: No count of anything here needs more, and arrays of indices hold it.
LARGEST = 2**31 - 1
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UnitInterval = Annotated[float, Field(gt=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
#: Optimizer steps, or a fraction of the run when strictly between 0 and 1.
StepsOrFraction = Annotated[int, Field(ge=0, le=LARGEST)] | Annotated[float, Field(gt=0, lt=1)]


def _is_date(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise ValueError(f"{shown(value)} is no date; write it as 'YYYY-MM-DD'") from None


def _kept(value: Any) -> Any:
    """YAML reads ``off`` as a truth value, and so do its readers ``on``."""
    if value == "":
        raise ValueError("'' names no folder; give one, auto or off")
    return {True: "auto", False: "off"}.get(value, value) if isinstance(value, bool) else value


#: ``auto``, ``off``, or a folder.
KeptOrNot = Annotated[str, BeforeValidator(_kept)]
IsoDate = Annotated[str, AfterValidator(_is_date)]


class Section(BaseModel):
    """A config section: unknown keys are errors, values are immutable once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), strict=True)


def name_or_extension(*names: str) -> Any:
    """The type of a key that takes one of ``names``, or names code of a user's own (:mod:`.extensions`)."""

    def check(value: str) -> str:
        if value in names or is_extension(value):
            return value
        known = ", ".join(map(repr, names))
        raise ValueError(
            f"{shown(value)} is none of {known}; give one of them, or FILE.py:NAME, or package.module:NAME"
        )

    return Annotated[str, AfterValidator(check)]


def as_steps(value: int | float, total: int) -> int:
    """A number of optimizer steps from steps or a fraction of ``total``."""
    return value if isinstance(value, int) else math.ceil(round(value * total, 6))  # 0.55 * 100 is 55, not 56
