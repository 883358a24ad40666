"""The importance of every component, smoothed over steps as AdaLoRA has it (2303.10512, Eq. 8 to 11).

With w an element of a factor (or of the diagonal between two) and L the loss of an optimizer step over the global
batch, I = |w dL/dw|, w as it is before the step. Two moving averages over the listened steps are kept of every element,
from zero: I' of I (beta_1, ``sensitivity.beta``) and U' of |I - I'| (beta_2, ``sensitivity.uncertainty``). An element's
score is I' U', or I' without a beta_2; a component's is E's score, plus the mean of those of A's row, plus the mean of
those of B's column.

Averages from zero are all too small by one factor as long as all components are of one age, as AdaLoRA's are. Those
that an event has added are younger, so a component's score is divided by (1 - beta_1^n) (1 - beta_2^n) after n steps.

The gradient is heard where autograd puts it down, before any engine takes it: at that moment a parameter is whole under
every engine, and so is its gradient, of this process's micro-batch. |w g| of a sum over processes is |sum of w g|: one
sum of one flat vector, of the adapter's size, a listened step. Averages are then the same on every process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora_scale.config.schema import SensitivityConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.sharded import whole_shape
from tsqlora_scale.model.adapters.lora import ADAPTER, has_factors, lora_layers
from tsqlora_scale.model.adapters.svd import diagonals_of
from tsqlora_scale.ranks.policies.policy import Plan
from tsqlora_scale.ranks.schedule import leads_up
from tsqlora_scale.tasks.packing import Packing

#: beta_2 where only its power matters: without uncertainty there is nothing to correct.
NONE = 0.0


class ImportanceTracker:
    """Hears the gradients of the factors and keeps their elements' averages; memory for three copies of the adapter.

    Calls are those of :class:`~.sensitivity.SensitivityTracker`, and :meth:`follow` at every resize.
    """

    def __init__(self, cfg: SensitivityConfig, *, events: Sequence[int]) -> None:
        """Of a run in which importances are wanted after ``events`` finished steps, ascending."""
        self._cfg = cfg
        self._events = events
        self._handles: list[Any] = []
        #: (layer, part) -> the parameter, part being one of A, B and E.
        self._params: dict[tuple[str, str], nn.Parameter] = {}
        self._layers: tuple[str, ...] = ()
        # By layer and part, one row a component: (r, d_in), (r, d_out), (r, 1).
        self._mean: dict[str, dict[str, Tensor]] = {}
        self._deviation: dict[str, dict[str, Tensor]] = {}
        #: By layer, steps that each component was heard in, (r,) float64.
        self._age: dict[str, Tensor] = {}
        #: w g of this process in this step, of the parameter's shape.
        self._products: dict[tuple[str, str], Tensor] = {}
        self._listening = False
        self._scale = 1.0

    def attach(self, model: nn.Module) -> None:
        """Hook the factors of ``model``; may be called again, after a resize for instance."""
        self.detach()
        layers = lora_layers(model)
        self._layers = tuple(layers)
        for name, layer in layers.items():
            parts = {"A": layer.lora_A, "B": layer.lora_B, "E": diagonals_of(layer)}
            for part, modules in parts.items():
                if modules is None or not has_factors(layer):
                    continue
                self._params[name, part] = modules[ADAPTER].weight  # type: ignore[assignment]
        for key, param in self._params.items():
            self._handles.append(param.register_hook(partial(self._hear, key)))  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._params, self._products = [], {}, {}
        self._listening = False

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """See :meth:`.SensitivityTracker.start_step`."""
        cfg = self._cfg
        self._listening = leads_up(step, self._events, every=cfg.every, window=cfg.window)
        self._scale = loss_scale
        self._products = {}

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """Nothing to do: gradients are sums."""

    @torch.no_grad()
    def _hear(self, key: tuple[str, str], gradient: Tensor) -> None:
        if not self._listening:
            return
        product = self._params[key].detach().float() * gradient.float()
        self._products[key] = self._products[key] + product if key in self._products else product

    @torch.no_grad()
    def end_step(self, *, taken: bool) -> None:
        """The step's last backward pass is over. In a listened step that was taken, a collective.

        Args:
            taken: whether the optimizer has stepped; what was heard in a step that it left out does not count.
        """
        heard, self._products = self._products, {}
        if not (self._listening and taken and self._params):
            self._listening = False
            return
        self._listening = False
        device = next(iter(heard.values())).device if heard else next(iter(self._params.values())).device
        shapes = {key: whole_shape(param) for key, param in self._params.items()}
        flat = torch.cat(
            [heard[k].flatten() if k in heard else torch.zeros(s.numel(), device=device) for k, s in shapes.items()]
        )
        total = World.current(device).sum(flat) / self._scale
        for (key, shape), part in zip(shapes.items(), total.split([s.numel() for s in shapes.values()]), strict=True):
            self._take(*key, part.view(shape).abs())
        for layer in {name for name, _ in shapes}:
            self._age[layer] = self._age.get(layer, torch.zeros(shapes[layer, "A"][0], dtype=torch.float64)) + 1

    def _take(self, layer: str, part: str, importance: Tensor) -> None:
        """A step's importances of a parameter into its averages."""
        rows = importance.T if part == "B" else importance.view(len(importance), -1)
        beta, beta_2 = self._cfg.beta, self._cfg.uncertainty
        mean = _of(self._mean, layer, part, rows)
        self._mean[layer][part] = mean = beta * mean + (1 - beta) * rows
        if beta_2 is not None:
            deviation = _of(self._deviation, layer, part, rows)
            self._deviation[layer][part] = beta_2 * deviation + (1 - beta_2) * (rows - mean).abs()

    def reduce(self, world: World) -> dict[str, tuple[float, ...]]:
        """The importance of every component, r numbers a layer, rank 0's on every process; 0 of one that was never
        heard. A collective."""
        found = {name: self._scores(name) for name in self._layers}
        flat = world.broadcast_tensor(torch.cat([torch.zeros(0, dtype=torch.float64), *found.values()]))
        parts = flat.split([len(scores) for scores in found.values()])
        return {name: tuple(part.tolist()) for name, part in zip(found, parts, strict=True)}

    def _scores(self, layer: str) -> Tensor:
        """(r,) float64 on the CPU."""
        if (layer, "A") not in self._params:
            return torch.zeros(0, dtype=torch.float64)
        if layer not in self._mean:
            return torch.zeros(whole_shape(self._params[layer, "A"])[0], dtype=torch.float64)
        total = torch.zeros(len(self._age[layer]), dtype=torch.float64)
        for part, mean in self._mean[layer].items():
            score = mean if self._cfg.uncertainty is None else mean * self._deviation[layer][part]
            total += score.mean(1).double().cpu()
        age = self._age[layer]
        correction = (1 - self._cfg.beta**age) * (1 - (self._cfg.uncertainty or NONE) ** age)
        return torch.where(age > 0, total / correction.clamp_min(1e-300), 0.0)

    def follow(self, plan: Plan, ranks: Mapping[str, int]) -> None:
        """The components of a plan that was carried out, with ``ranks`` before: averages go along with those that stay,
        new ones begin. Of a layer that was shrunk into other components, all are new.
        """
        for name in plan.changed(ranks):
            rank, before = plan.ranks[name], ranks[name]
            keep = list(plan.keep.get(name, range(before) if rank >= before else ()))
            for table in (self._mean, self._deviation):
                if name in table:
                    table[name] = {part: _rearranged(rows, keep, rank) for part, rows in table[name].items()}
            if name in self._age:
                self._age[name] = _rearranged(self._age[name], keep, rank)

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU: the same on all processes, and right for any number."""
        tables = {"mean": self._mean, "deviation": self._deviation}
        state: dict[str, Any] = {
            key: {name: {part: rows.cpu() for part, rows in parts.items()} for name, parts in table.items()}
            for key, table in tables.items()
        }
        return {**state, "age": dict(self._age)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, on every process."""
        self._mean, self._deviation = (
            {n: dict(parts) for n, parts in state[key].items()} for key in ("mean", "deviation")
        )
        self._age = dict(state["age"])


def _of(table: dict[str, dict[str, Tensor]], layer: str, part: str, like: Tensor) -> Tensor:
    """An average, on the device of ``like``; zeros at first."""
    parts = table.setdefault(layer, {})
    return parts[part].to(like.device) if part in parts else torch.zeros_like(like)


def _rearranged(rows: Tensor, keep: list[int], rank: int) -> Tensor:
    """The rows of ``keep``, and zeros up to ``rank``."""
    kept = rows[torch.tensor(keep, dtype=torch.long, device=rows.device)]
    return torch.cat([kept, rows.new_zeros(rank - len(keep), *rows.shape[1:])])
