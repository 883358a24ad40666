"""Where rank is spent: sensitivity, schedule, allocation, policies, resize.

Paper 2.2 and 2.3, Eq. 3, 4 and 6; Algorithm 1, lines 5, 7 and 8.
"""

from tsqlora_scale.ranks.allocate import Allocation, allocate
from tsqlora_scale.ranks.install import (
    components,
    current_ranks,
    layer_dims,
    resize_model,
    set_ranks,
    start_with_ranks,
)
from tsqlora_scale.ranks.policies.policy import Plan, PlanMismatch, Policy, Statistics, agree
from tsqlora_scale.ranks.policies.tsqlora import TsqLoraPolicy
from tsqlora_scale.ranks.resize import Resized, resize_layer
from tsqlora_scale.ranks.schedule import Schedule
from tsqlora_scale.ranks.sensitivity import SensitivityTracker

__all__ = [
    "Allocation",
    "Plan",
    "PlanMismatch",
    "Policy",
    "Resized",
    "Schedule",
    "SensitivityTracker",
    "Statistics",
    "TsqLoraPolicy",
    "agree",
    "allocate",
    "components",
    "current_ranks",
    "layer_dims",
    "resize_layer",
    "resize_model",
    "set_ranks",
    "start_with_ranks",
]
