"""Policies by their names in the config: ``allocation.policy: NAME`` is the ``POLICY`` of the file ``NAME.py`` here.

So a new one is one new file, and its name in the config's list. ``fixed`` has no file: its ranks never change
(:class:`~tsqlora_scale.ranks.controller.FixedRanks`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.extensions import is_extension, load_extension
from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.ranks.policies.policy import Policy


def policy_class(name: str) -> Callable[[AllocationConfig], Policy]:
    """What ``allocation.policy`` names.

    Raises:
        UserError: an extension that cannot be imported, or is no policy.
    """
    if not is_extension(name):
        found: Any = importlib.import_module(f"tsqlora_scale.ranks.policies.{name}").POLICY
        return found  # type: ignore[no-any-return]
    found = load_extension(name, key="allocation.policy")
    missing = [member for member in ("plan", "needs_components") if not hasattr(found, member)]
    if missing:
        raise UserError(
            f"allocation.policy={name!r}: is no policy, it lacks {', '.join(missing)}; "
            "see tsqlora_scale.ranks.policies.policy.Policy"
        )
    return found  # type: ignore[no-any-return]
