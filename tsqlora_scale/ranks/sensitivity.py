"""Layer sensitivity (paper 2.2, Eq. 3 and 4).

With L the loss of an optimizer step, normalised over the global batch, and a group of n of its N samples, let
g = (N / n) dL/dW restricted to that group: the gradient of the group's own mean loss. Then, averaged over all
groups of the global batch:

=====================  =======================================================================================
``weight``             mean over elements of |W * g|, in groups of ``sensitivity.group_size`` samples
``weight_per_sample``  the same with n = 1: Eq. 3 to the letter. The mean of absolute values is not the absolute value
                       of the mean: the smaller the groups, the more of the gradient's noise is counted
``fisher``             ||g||_F^2 with n = 1, the trace of Eq. 4 (a sample's loss is its share of L, times N)
``adapter``            mean |A * dA| + mean |B * dB|, in groups as for ``weight``; 0 while a layer has rank 0, which
                       therefore does not come back by its own S
=====================  =======================================================================================

Only steps that lead up to an event are listened to (``sensitivity.window``), and of these at most
``sensitivity.max_samples`` samples, spaced evenly over the global batch. S drifts as training goes on, so steps long
before an event mislead, and samples can be spared (docs/results.md, "Sampled sensitivities").

None of these depends on the number of processes or on accumulation, as long as ``group_size`` stays the same. One
exception is a model that calls an adapted layer without a batch dimension (DeBERTa's relative positions): its groups
are whole micro-batches, one at least.

S_l is the bias-corrected moving average (beta = ``sensitivity.beta``) of these numbers over the listened steps; with
``sensitivity.uncertainty`` (beta_2), times the moving average of their distance from it, as AdaLoRA has it (2303.10512,
Eq. 9 to 11). With one listened step that distance is 0 for all layers, which makes ranks uniform.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora_scale.config.schema import SensitivityConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.model.adapters.lora import ADAPTER, has_factors, lora_layers, short_name
from tsqlora_scale.ranks.estimators import full_weight
from tsqlora_scale.ranks.gradient_sketches import SKETCH_ROWS, GradientSketches
from tsqlora_scale.ranks.schedule import leads_up
from tsqlora_scale.ranks.taps import Listener, Site
from tsqlora_scale.tasks.packing import Packing

log = logging.getLogger(__name__)


class SensitivityTracker:
    """Listens to the steps that lead up to an event and keeps S_l, and sketches of gradients if wanted.

    Calls, in order: :meth:`attach` before the engine is prepared, and again after every resize; then in every
    optimizer step :meth:`start_step`, :meth:`start_micro_batch` before each forward pass, :meth:`end_step`; and
    :meth:`reduce` when S is wanted. Steps that are not listened to cost one attribute check per layer.
    """

    def __init__(
        self,
        cfg: SensitivityConfig,
        *,
        batch_size: int,
        micro_batch_size: int,
        events: Sequence[int],
        sketch_seed: int | None = None,
        sketch_rows: int = SKETCH_ROWS,
        halves: bool = False,
        without_batch: Collection[str] = frozenset(),
    ) -> None:
        """Of a run of ``batch_size`` samples an optimizer step, over all processes.

        Args:
            events: after how many finished steps S is wanted, ascending.
            sketch_seed: of the random projections of :meth:`sketches`; none: no sketches are taken.
            sketch_rows: of a sketch.
            halves: whether sketches are taken of alternate steps, too; see :meth:`halves`.
            without_batch: layers, by their short names, that never get the batch as their first dimension.
        """
        self.group_size = _group_size(cfg, micro_batch_size)
        self._cfg = cfg
        self._without_batch = frozenset(without_batch)
        self._events = events
        self._batch_size = batch_size
        self._listener = Listener(
            group_size=self.group_size,
            batch_size=batch_size,
            max_samples=cfg.max_samples,
            squared=cfg.estimator == "fisher",
            on_shared_call=self._shared_call,
        )
        #: Samples of the step that this process has trained on, heard or not.
        self._samples = 0
        self._scale = 1.0
        self._listening = False
        assert sketch_seed is None or cfg.estimator != "adapter", "the adapter's gradients have no rows of the weight's"
        assert sketch_seed is not None or not halves
        #: Of all listened steps, and where halves are wanted of every second one, and of the others.
        self._kept: tuple[GradientSketches, ...] = ()
        if sketch_seed is not None:
            self._kept = tuple(
                GradientSketches(sketch_seed, cfg.beta, rows=sketch_rows) for _ in range(3 if halves else 1)
            )
        self._turn = 0
        # Per layer: the EMA from zero and its bias-correcting weight, the same for its uncertainty, and how many
        # gradients were ever heard.
        self._ema: dict[str, float] = {}
        self._weight: dict[str, float] = {}
        self._deviation: dict[str, float] = {}
        self._deviation_weight: dict[str, float] = {}
        self._heard: dict[str, float] = {}
        # Steps of this process alone, not in the averages yet: sums over the samples heard, and their number or 0
        # where the sum says nothing, (2, layers).
        self._pending: list[Tensor] = []
        self._silent: tuple[str, ...] = ()
        self._removed: frozenset[str] = frozenset()

    def attach(self, model: nn.Module) -> None:
        """Hook the adapted layers of ``model``; may be called again, after a resize for instance."""
        layers = lora_layers(model)
        sites, removed = [], []
        for name, layer in layers.items():
            if self._cfg.estimator == "adapter":
                if not has_factors(layer):
                    removed.append(name)
                    continue
                # tiny linear layers like any other, so that no engine's way with gradients matters
                linears = (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
                sites += [Site(name, linear, partial(full_weight, linear)) for linear in linears]
            else:
                base = layer.get_base_layer()
                transposed = bool(getattr(layer, "fan_in_fan_out", False))
                site = Site(name, base, partial(full_weight, base, transposed=transposed))
                if self._kept:
                    site.projection = self.projection(name, int(layer.out_features))  # type: ignore[arg-type]
                for kept in self._kept:
                    kept.add_layer(name, int(layer.in_features))  # type: ignore[arg-type]
                sites.append(site)
        for site in sites:
            site.without_batch = short_name(site.layer) in self._without_batch
        self._listener.attach(sites)
        for table in self._tables:
            for name in layers:
                table.setdefault(name, 0.0)
        for name in removed:  # what it was is past, and nothing is there to be heard
            for table in self._averages:
                table[name] = 0.0
        self._removed = frozenset(removed)

    @property
    def _averages(self) -> tuple[dict[str, float], ...]:
        return self._ema, self._weight, self._deviation, self._deviation_weight

    @property
    def _tables(self) -> tuple[dict[str, float], ...]:
        return *self._averages, self._heard

    def detach(self) -> None:
        """Remove all hooks."""
        self._listener.detach()

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """Optimizer step number ``step`` begins.

        Args:
            step: how many steps are finished.
            loss_scale: how much larger the gradients within the backward pass are than those of the step's globally
                normalised loss: the product of the factors put on the loss to make up for averaging over processes,
                and of a mixed-precision loss scale. Factors that the engine divides by before the backward pass
                (accumulation) do not count.
        """
        self._listening = self.listens(step)
        turn = step // self._cfg.every  # listened steps are so far apart
        self._turn = turn % 2
        self._samples = 0
        if self._listening:
            self._scale = self._batch_size / loss_scale
            self._listener.start(self._scale, turn)

    def listens(self, step: int) -> bool:
        """Whether that step is listened to: every ``sensitivity.every``-th, counted back from the next event, as far as
        ``sensitivity.window``."""
        return leads_up(step, self._events, every=self._cfg.every, window=self._cfg.window)

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """A forward and backward pass over ``size`` samples of this process begins.

        Args:
            size: of the micro-batch; the same for all.
            position: of its first sample in the global batch.
            packing: in which the samples stand end to end; none: a row each.
        """
        if self._listening:
            self._samples += size
            self._listener.start_micro_batch(size, position, packing)

    def end_step(self, *, taken: bool) -> None:
        """The step's last backward pass is over. The one point where the host waits for the device.

        Args:
            taken: whether the optimizer has stepped; what was heard in a step that it left out does not count.
        """
        if not self._listening:
            return
        self._listening = False
        sites = self._listener.stop()
        if not taken:
            return
        assert self._samples > 0, "a listened step had no micro-batch"
        zero = torch.zeros((), dtype=torch.float64)
        device = next((site.total.device for site in sites if site.total is not None), zero.device)
        totals = torch.stack([(zero if site.total is None else site.total).to(device) for site in sites]).tolist()
        step: dict[str, float] = {}
        for site, total in zip(sites, totals, strict=True):
            step[site.layer] = step.get(site.layer, 0.0) + total
            self._heard[site.layer] += site.heard
        # an overflowing half-precision step says nothing
        usable = {name: value for name, value in step.items() if math.isfinite(value)}
        names, heard = sorted(self._ema), float(self._listener.samples)
        values, counts = [usable.get(name, 0.0) for name in names], [heard * (name in usable) for name in names]
        self._pending.append(torch.tensor([values, counts], dtype=torch.float64))
        share = self._scale / self._samples
        for kept in (*self._kept[:1], *self._kept[1 + self._turn : 2 + self._turn]):
            kept.count()
            for site in sites:
                if site.sketch is not None and site.layer in usable:
                    kept.update(site.layer, share * site.sketch)

    def synchronize(self, world: World) -> None:
        """Take the mean over processes of all steps since the last time into the averages. A collective.

        One all-reduce of one flat vector, layers x (1 + 2 steps) numbers, and one of each layer's sketches. Uncertainty
        is not linear in the steps' values, so that these must be those of all processes first. Sketches are linear, and
        their average goes on from the mean. Called by :meth:`reduce`, and before :meth:`state_dict`.
        """
        names = sorted(self._ema)
        parts = [torch.tensor([self._heard[name] for name in names], dtype=torch.float64)]
        parts += [step.flatten() for step in self._pending]
        mean = world.mean(torch.cat(parts)).split([len(part) for part in parts])
        self._heard = dict(zip(names, mean[0].tolist(), strict=True))
        for step in mean[1:]:
            for name, value, count in zip(names, *step.view(2, -1).tolist(), strict=True):
                if count:
                    self._take(name, value / count)
        self._pending = []
        for kept in self._kept:
            kept.average(world)

    def _take(self, name: str, value: float) -> None:
        """A step's value of a layer, over all processes, into the layer's averages."""
        beta, beta_2 = self._cfg.beta, self._cfg.uncertainty
        first = not self._weight[name]
        self._ema[name] = beta * self._ema[name] + (1 - beta) * value
        self._weight[name] = beta * self._weight[name] + (1 - beta)
        if beta_2 is not None:
            # of the first step from itself: not what rounding makes of it
            distance = 0.0 if first else abs(value - self._ema[name] / self._weight[name])
            self._deviation[name] = beta_2 * self._deviation[name] + (1 - beta_2) * distance
            self._deviation_weight[name] = beta_2 * self._deviation_weight[name] + (1 - beta_2)

    def _smoothed(self, name: str) -> float:
        if not self._weight[name]:
            return 0.0
        mean = self._ema[name] / self._weight[name]
        if self._cfg.uncertainty is None:
            return mean
        return mean * self._deviation[name] / self._deviation_weight[name]

    def reduce(self, world: World) -> dict[str, float]:
        """S_l of every layer, sorted by name, the same on all processes; 0 where no gradient was ever heard.

        A collective.
        """
        self.synchronize(world)
        silent = tuple(name for name in sorted(self._ema) if self._heard[name] == 0 and name not in self._removed)
        if silent and silent != self._silent and world.is_main:
            log.warning(
                "no gradient has reached %d of %d adapted layers, their sensitivity counts as 0: %s",
                len(silent),
                len(self._ema),
                ", ".join(silent),
            )
        self._silent = silent
        return {name: self._smoothed(name) for name in sorted(self._ema)}

    def sketches(self) -> dict[str, Tensor]:
        """Omega G of every layer, (k, d_in), as of the last :meth:`reduce`; empty where none are taken."""
        return self._kept[0].values if self._kept else {}

    def halves(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Omega G of every layer, (k, d_in) each, of every second listened step and of the others, as of the last
        :meth:`reduce`: means, so that both have one scale, whatever the number of their steps; empty where they are not
        taken."""
        if not self._kept[1:]:
            return {}
        first, second = self._kept[1:]
        one, other = (kept.weight or 1.0 for kept in (first, second))
        ours, theirs = first.values, second.values
        return {name: (ours[name] / one, theirs[name] / other) for name in ours}

    def projection(self, layer: str, d_out: int) -> Tensor:
        """Omega of a layer, (k, d_out)."""
        return self._kept[0].projection(layer, d_out)

    def state_dict(self) -> dict[str, Any]:
        """Floats, and the sketches; after :meth:`synchronize` the same on all processes, and right for any number."""
        assert not self._pending, "synchronize() comes before state_dict()"
        return {
            "ema": dict(self._ema),
            "weight": dict(self._weight),
            "deviation": dict(self._deviation),
            "deviation_weight": dict(self._deviation_weight),
            "heard": dict(self._heard),
            "whole_micro_batch": self._listener.whole_micro_batch,
            "sketches": self.sketches(),
            "sketch_weights": [kept.weight for kept in self._kept],
            "alternate_sketches": {str(turn): kept.values for turn, kept in enumerate(self._kept[1:])},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict` that was taken after :meth:`synchronize`, on every process."""
        self._ema, self._weight, self._heard = (dict(state[key]) for key in ("ema", "weight", "heard"))
        self._deviation, self._deviation_weight = dict(state["deviation"]), dict(state["deviation_weight"])
        if self._kept:
            # a checkpoint of an earlier release has the first alone
            for kept, values in zip(
                self._kept, (state["sketches"], *state.get("alternate_sketches", {}).values()), strict=True
            ):
                kept.values = values
            for kept, weight in zip(self._kept, state.get("sketch_weights", [1.0] * len(self._kept)), strict=True):
                kept.weight = weight
        self._pending = []
        self._listener.whole_micro_batch = state["whole_micro_batch"]

    def _shared_call(self, layer: str) -> None:
        log.warning(
            "layer %r is called without a batch dimension, so samples cannot be told apart: sensitivity takes whole "
            "micro-batches instead of groups of %d, and depends on train.micro_batch_size",
            layer,
            self.group_size,
        )


def _group_size(cfg: SensitivityConfig, micro_batch_size: int) -> int:
    if cfg.estimator in ("weight_per_sample", "fisher") or cfg.group_size == "auto":
        return 1
    assert micro_batch_size % cfg.group_size == 0, "the plan of a run sees to it"
    return cfg.group_size
