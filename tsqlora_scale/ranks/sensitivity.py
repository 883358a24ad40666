"""Layer sensitivity (paper 2.2, Eq. 3 and 4; METHOD section 2).

With L the loss of an optimizer step, normalised over the global batch, and a group of n of its N samples, let
g = (N / n) dL/dW restricted to that group: the gradient of the group's own mean loss. Then, averaged over all
groups of the global batch:

=====================  =======================================================================================
``weight``             mean over elements of |W * g|, in groups of ``sensitivity.group_size`` samples
``weight_per_sample``  the same with n = 1: Eq. 3 to the letter. The mean of absolute values is not the absolute value
                       of the mean: the smaller the groups, the more of the gradient's noise is counted
``fisher``             ||g||_F^2 with n = 1, the trace of Eq. 4 (a sample's loss is its share of L, times N)
``adapter``            mean |A * dA| + mean |B * dB|, in groups as for ``weight``
=====================  =======================================================================================

Only steps that lead up to an event are listened to (``sensitivity.window``), and of these at most
``sensitivity.max_samples`` samples, spaced evenly over the global batch. S drifts as training goes on, so steps long
before an event mislead, and samples can be spared. MiniLM on film reviews, 36 layers, 32 samples a step, compared with
the statistic of all samples of all steps after 40, 80 and 120 steps (``benchmarks/overhead.py --agreement``):

==========================  =====================  ==========================
steps, samples of a step    Spearman of S          ranks of 288 that move
==========================  =====================  ==========================
last 10 (default), 8        0.999, 0.999, 0.997    4, 4, 3
last 10, all                0.999, 1.000, 0.999    2, 1, 2
last 10, 4                  0.997, 0.997, 0.995    3, 6, 6
every 10th, all             0.995, 0.992, 0.993    6, 7, 5
every 10th, 8               0.996, 0.994, 0.992    5, 4, 7
==========================  =====================  ==========================

Every 20th step from the start of training on gave 0.52 after 40 steps.

None of these depends on the number of processes or on accumulation, as long as ``group_size`` stays the same. One
exception is a model that calls an adapted layer without a batch dimension (DeBERTa's relative positions): its groups
are whole micro-batches, one at least.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tsqlora_scale.adapters import ADAPTER, lora_layers
from tsqlora_scale.config import SensitivityConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.errors import UserError
from tsqlora_scale.ranks.estimators import full_weight
from tsqlora_scale.ranks.listening import Listener, Site

log = logging.getLogger(__name__)


class SensitivityTracker:
    """Listens to some optimizer steps, those that lead up to an event, and keeps S_l as a bias-corrected EMA.

    Calls, in order: :meth:`attach` before the engine is prepared, and again after every resize; then in every
    optimizer step :meth:`start_step`, :meth:`start_micro_batch` before each forward pass, :meth:`end_step`; and
    :meth:`reduce` when S is wanted. Steps that are not listened to cost one attribute check per layer.
    """

    def __init__(
        self, cfg: SensitivityConfig, *, batch_size: int, micro_batch_size: int, events: Sequence[int] | None = None
    ) -> None:
        """Of a run of ``batch_size`` samples an optimizer step, over all processes.

        Args:
            events: after how many finished steps S is wanted, ascending; none: after any.

        Raises:
            UserError: when ``sensitivity.group_size`` does not divide the micro-batch.
        """
        self.group_size = _group_size(cfg, micro_batch_size)
        self._cfg = cfg
        self._events = events
        self._batch_size = batch_size
        self._listener = Listener(
            group_size=self.group_size,
            batch_size=batch_size,
            max_samples=cfg.max_samples,
            squared=cfg.estimator == "fisher",
            on_shared_call=self._shared_call,
        )
        self._listening = False
        #: Nothing has been heard yet.
        self._fresh = True
        # Per layer: the EMA of the sum over samples from zero, that of the number of samples (which corrects the bias,
        # and lets processes hear differently many samples), and how many gradients were ever heard.
        self._ema: dict[str, float] = {}
        self._weight: dict[str, float] = {}
        self._heard: dict[str, float] = {}
        self._silent: tuple[str, ...] = ()

    def attach(self, model: nn.Module) -> None:
        """Hook the adapted layers of ``model``; may be called again, after a resize for instance."""
        layers = lora_layers(model)
        sites = []
        for name, layer in layers.items():
            if self._cfg.estimator == "adapter":
                # tiny linear layers like any other, so that no engine's way with gradients matters
                linears = (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
                sites += [Site(name, linear, partial(full_weight, linear)) for linear in linears]
            else:
                base = layer.get_base_layer()
                transposed = bool(getattr(layer, "fan_in_fan_out", False))
                sites.append(Site(name, base, partial(full_weight, base, transposed=transposed)))
        self._listener.attach(sites)
        for table in (self._ema, self._weight, self._heard):
            for name in layers:
                table.setdefault(name, 0.0)

    def detach(self) -> None:
        """Remove all hooks."""
        self._listener.detach()

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """Optimizer step number ``step`` begins.

        Args:
            step: how many steps are finished; where no events are known, any steady count.
            loss_scale: how much larger the gradients within the backward pass are than those of the step's globally
                normalised loss: the product of the factors put on the loss to make up for averaging over processes,
                and of a mixed-precision loss scale. Factors that the engine divides by before the backward pass
                (accumulation) do not count.
        """
        self._listening = self.listens(step)
        self._position = 0
        if self._listening:
            self._listener.start(self._batch_size / loss_scale)

    def listens(self, step: int) -> bool:
        """Whether that step is listened to: with events every ``sensitivity.every``-th, counted back from the next
        event, as far as ``sensitivity.window``.

        Without events, every so many steps and the first of all, so that S is always known.
        """
        if self._events is None:
            return self._fresh or step % self._cfg.every == 0
        following = bisect_right(self._events, step)
        if following == len(self._events):
            return False
        ahead = self._events[following] - 1 - step
        window = self._cfg.window
        return ahead % self._cfg.every == 0 and (window is None or ahead < window)

    def start_micro_batch(self, size: int, position: int | None = None) -> None:
        """A forward and backward pass over ``size`` samples of this process begins.

        Args:
            size: of the micro-batch; the same for all.
            position: of its first sample in the global batch; none: this process trains on all of it, in order.
        """
        if self._listening:
            position = self._position if position is None else position
            self._position = position + size
            self._listener.start_micro_batch(size, position)

    def end_step(self) -> None:
        """The step's last backward pass is over. The one point where the host waits for the device."""
        if not self._listening:
            return
        self._listening = False
        sites = self._listener.stop()
        assert self._position > 0, "a listened step had no micro-batch"
        zero = torch.zeros((), dtype=torch.float64)
        device = next((site.total.device for site in sites if site.total is not None), zero.device)
        totals = torch.stack([(zero if site.total is None else site.total).to(device) for site in sites]).tolist()
        step: dict[str, float] = {}
        for site, total in zip(sites, totals, strict=True):
            step[site.layer] = step.get(site.layer, 0.0) + total
            self._heard[site.layer] += site.heard
        beta = self._cfg.beta
        for name, value in step.items():
            if math.isfinite(value):  # an overflowing half-precision step says nothing
                self._ema[name] = beta * self._ema[name] + (1 - beta) * value
                self._weight[name] = beta * self._weight[name] + (1 - beta) * self._listener.samples
                self._fresh = False

    def synchronize(self, world: World) -> None:
        """Give every process the mean of all: one all-reduce of one flat vector. A collective.

        S is a ratio of sums over processes, and the EMA is linear: neither its value now nor its future changes.
        Called by :meth:`reduce`, and before :meth:`state_dict`.
        """
        names = sorted(self._ema)
        tables = (self._ema, self._weight, self._heard)
        flat = torch.tensor([table[name] for table in tables for name in names], dtype=torch.float64)
        mean = iter(world.mean(flat).tolist())
        for table in tables:
            for name in names:
                table[name] = next(mean)

    def reduce(self, world: World) -> dict[str, float]:
        """S_l of every layer, sorted by name, the same on all processes; 0 where no gradient was ever heard.

        A collective.
        """
        self.synchronize(world)
        silent = tuple(name for name in sorted(self._ema) if self._heard[name] == 0)
        if silent and silent != self._silent and world.is_main:
            log.warning(
                "no gradient has reached %d of %d adapted layers, their sensitivity counts as 0: %s",
                len(silent),
                len(self._ema),
                ", ".join(silent),
            )
        self._silent = silent
        weights = self._weight
        return {name: self._ema[name] / weights[name] if weights[name] > 0 else 0.0 for name in sorted(self._ema)}

    def state_dict(self) -> dict[str, Any]:
        """Plain floats; after :meth:`synchronize` the same on all processes, and right for any number of them."""
        return {
            "ema": dict(self._ema),
            "weight": dict(self._weight),
            "heard": dict(self._heard),
            "whole_micro_batch": self._listener.whole_micro_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict` that was taken after :meth:`synchronize`, on every process."""
        self._ema, self._weight, self._heard = (dict(state[key]) for key in ("ema", "weight", "heard"))
        self._fresh = not any(self._weight.values())
        self._listener.whole_micro_batch = state["whole_micro_batch"]

    def _shared_call(self, layer: str) -> None:
        log.warning(
            "layer %r is called without a batch dimension, so samples cannot be told apart: sensitivity takes whole "
            "micro-batches instead of groups of %d, and depends on train.micro_batch_size",
            layer,
            self.group_size,
        )


def _group_size(cfg: SensitivityConfig, micro_batch_size: int) -> int:
    if cfg.estimator in ("weight_per_sample", "fisher"):
        return 1
    if cfg.group_size == "auto":
        return 1
    if micro_batch_size % cfg.group_size:
        raise UserError(
            f"sensitivity.group_size={cfg.group_size} does not divide the micro-batch of {micro_batch_size} samples; "
            "choose a divisor of train.micro_batch_size, or auto"
        )
    return cfg.group_size
