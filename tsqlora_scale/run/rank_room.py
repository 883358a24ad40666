"""Whether a policy can do anything at all, asked where a run starts: one that is there may be opened as it is."""

from __future__ import annotations

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config


def check_ranks_can_move(config: Config) -> None:
    """Room between the ranks that layers begin with and the bounds of the policy, and steps that tell it something.

    Raises:
        UserError: naming the key, and the remedy.
    """
    if not config.adapts_ranks:
        return
    heard = config.sensitivity
    if config.allocation.policy == "gain" and heard.window is not None and heard.window <= heard.every:
        raise UserError(
            f"allocation.policy=gain tells signal from noise by alternate steps, and sensitivity.window={heard.window} "
            f"has one at sensitivity.every={heard.every}; raise the first above the second"
        )
    if config.adapter.init_from is not None:  # whose layers have ranks of their own
        return
    if config.allocation.policy == "adalora":
        _check_adalora(config)
    elif config.allocation.policy in ("tsqlora", "gain", "elalora"):
        _check_bounds(config)


def _check_adalora(config: Config) -> None:
    allocation, r = config.allocation, config.adapter.r
    target = allocation.adalora_target(r)
    if max(target, allocation.r_min) >= r:
        raise UserError(
            f"allocation.policy=adalora drops components, and of adapter.r={r} none is left over: it ends with "
            f"allocation.target_r={target}, and with allocation.r_min={allocation.r_min} at the least; raise adapter.r "
            "or lower these"
        )


def _check_bounds(config: Config) -> None:
    allocation, r = config.allocation, config.adapter.r
    exchanges = allocation.policy == "elalora"
    # the budget follows the quality of S, which a selector of one's own may tell, too
    may_scale = (config.scores_data or ":" in config.sampling.selector) and not exchanges
    if may_scale or allocation.budget == "auto":
        return
    bounds = [("r_min", allocation.r_min, "lower it (0 lets a layer go without)")]
    if not exchanges:  # which renews components within a layer
        bounds.append(("r_max", allocation.r_max or 0, "raise it"))
    for key, bound, remedy in bounds:
        if bound == r:
            raise UserError(
                f"allocation.policy={allocation.policy} moves ranks from one layer to another, and none can leave "
                f"adapter.r={r} with allocation.{key}={bound}; {remedy}, or change adapter.r"
            )
