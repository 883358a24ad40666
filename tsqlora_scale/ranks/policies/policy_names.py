"""Policies by their names in the config. ``fixed`` is none: its ranks never change (:mod:`..controller`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.extensions import load_extension
from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.ranks.policies.policy import Policy
from tsqlora_scale.ranks.policies.tsqlora import TsqLoraPolicy

POLICIES: dict[str, Callable[[AllocationConfig], Policy]] = {
    "tsqlora": TsqLoraPolicy,
}


def policy_class(name: str) -> Callable[[AllocationConfig], Policy]:
    """What ``allocation.policy`` names.

    Raises:
        UserError: an extension that cannot be imported, or is no policy.
    """
    if name in POLICIES:
        return POLICIES[name]
    found: Any = load_extension(name, key="allocation.policy")
    missing = [member for member in ("plan", "needs_components") if not hasattr(found, member)]
    if missing:
        raise UserError(
            f"allocation.policy={name!r}: is no policy, it lacks {', '.join(missing)}; "
            "see tsqlora_scale.ranks.policies.policy.Policy"
        )
    return found  # type: ignore[no-any-return]
