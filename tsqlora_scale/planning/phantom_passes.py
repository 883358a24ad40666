"""What a step, a scoring batch and an evaluation batch need: each gone through by a model without memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.quality_sections import (
    BLIND_SELECTORS,
    FORWARD_SELECTORS,
    GRADIENT_SELECTORS,
    MODEL_FREE_SELECTORS,
    SELECTORS,
)
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.planning.dataless_task import DatalessTask
from tsqlora_scale.planning.live_storages import FusedAttention, LiveStorages
from tsqlora_scale.planning.phantom import Phantom, build_phantom
from tsqlora_scale.quality.features.last_layer import LastLayerLook
from tsqlora_scale.quality.gradients.per_sample import PerSampleGradients
from tsqlora_scale.quality.gradients.sketch import Sketch
from tsqlora_scale.quality.query.looks import FeatureLook
from tsqlora_scale.tasks.metrics import needs_answers, needs_losses

#: How samples are looked at: not at all, by a forward pass, by their gradients, and by a second forward pass, too.
Look = Literal["none", "forward", "gradients", "exact"]
#: What attention and its kernels are those of.
Machine = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class PassNeeds:
    """Bytes on a rank beside parameters and what trains, and operations.

    Attributes:
        kept: activations that a backward pass waits for; of a scoring batch the gradients that a second forward does.
        logits: logits, and what the cross-entropy keeps of them.
        passing: what else is there at the worst moment.
        flops: multiplications and additions.
    """

    kept: int = 0
    logits: int = 0
    passing: int = 0
    flops: int = 0

    @property
    def peak(self) -> int:
        """All of it at the worst moment."""
        return self.kept + self.logits + self.passing


class PhantomPasses:
    """Passes of a run. Everything is counted once.

    Args:
        config: of the run.
        model_config: of :func:`.describe_model`.
        unreached: see :func:`.build_phantom`.
        machine: whose kernels of attention are taken.
    """

    def __init__(self, config: Config, model_config: Any, *, unreached: Collection[str], machine: Machine) -> None:
        self.config = config
        self.task = DatalessTask(config.task)
        self._model_config, self._unreached, self._machine = model_config, unreached, machine
        self._phantoms: dict[bool, Phantom] = {}
        self._known: dict[tuple[Any, ...], PassNeeds] = {}

    def phantom(self, *, checkpointing: bool) -> Phantom:
        """The model."""
        if checkpointing not in self._phantoms:
            self._phantoms[checkpointing] = self._tried(
                lambda: build_phantom(
                    self.config, self._model_config, checkpointing=checkpointing, unreached=self._unreached
                )
            )
        return self._phantoms[checkpointing]

    def step(self, rows: int, *, checkpointing: bool) -> PassNeeds:
        """Forward and backward of a micro-batch, on gradients that are there already."""
        return self._once(("step", rows, checkpointing), lambda: self._step(rows, checkpointing))

    def scoring(self, rows: int, *, checkpointing: bool) -> PassNeeds:
        """A scoring batch."""
        return self._once(("scoring", rows, checkpointing), lambda: self._scoring(rows, checkpointing))

    def evaluation(self) -> PassNeeds:
        """An evaluation batch: forward, or the cache of a generation at its longest."""
        return self._once(("evaluation",), self._evaluation)

    @property
    def look(self) -> Look:
        """How the selector looks at samples; ``auto`` and ``exact`` of the loss reduction take both forwards."""
        config, scoring = self.config, self.config.scoring
        selector = config.sampling.selector
        elsewhere = config.scores_online or config.scores_by_proxy or selector in MODEL_FREE_SELECTORS
        if selector in BLIND_SELECTORS or selector not in SELECTORS or elsewhere:
            return "none"
        if selector not in GRADIENT_SELECTORS:
            return "forward"
        return "exact" if selector == "quality" and scoring.delta_loss in ("auto", "exact") else "gradients"

    def _once(self, key: tuple[Any, ...], run: Callable[[], PassNeeds]) -> PassNeeds:
        if key not in self._known:
            self._known[key] = self._tried(run)
        return self._known[key]

    def _tried(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except UserError:
            raise
        except Exception as error:  # of whatever a model's code does
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"model.name_or_path={self.config.model.name_or_path!r}: a pass of this model cannot be tried without "
                f"its weights ({reason}); start a run of a few steps (train.max_steps) in the place of a plan"
            ) from None

    def _watched(self, model: Any, rows: int, extra: Collection[Tensor] = ()) -> LiveStorages:
        return LiveStorages([*model.parameters(), *model.buffers(), *extra], targets=rows * self.task.targets)

    def _kernels(self, stack: ExitStack) -> None:
        if self._machine == "gpu":
            stack.enter_context(FusedAttention())

    def _step(self, rows: int, checkpointing: bool) -> PassNeeds:
        phantom = self.phantom(checkpointing=checkpointing)
        model = phantom.model
        with ExitStack() as stack:
            stack.enter_context(phantom.mode)
            self._kernels(stack)
            model.train()
            batch = self.task.full_batch(rows)
            trained = [param for param in model.parameters() if param.requires_grad]
            gradients = [torch.empty_like(param) for param in trained]
            for param, gradient in zip(trained, gradients, strict=True):
                param.grad = gradient
            live = stack.enter_context(self._watched(model, rows, gradients))
            before_loss: list[int] = []
            stack.callback(model.register_forward_hook(_logits_noticed(before_loss, live)).remove)
            loss = self.task.losses(model, batch).sum() / rows
            kept = before_loss[0] if before_loss else live.now
            logits = live.now - kept
            loss.backward()
            for param in trained:
                param.grad = None
        return PassNeeds(kept, logits, live.peak - kept - logits, live.flops)

    def _scoring(self, rows: int, checkpointing: bool) -> PassNeeds:
        if self.look == "none":
            return PassNeeds()
        phantom = self.phantom(checkpointing=checkpointing)
        model, config = phantom.model, self.config
        if self.look == "forward":
            return self._looked_at(phantom, rows)
        theta = adapter_type(config.adapter.type).theta(model, include_head=config.scoring.include_head)
        gradients = PerSampleGradients(model, theta)
        with ExitStack() as stack:
            stack.enter_context(phantom.mode)
            self._kernels(stack)
            stack.enter_context(gradients)
            batch, losses = self.task.full_batch(rows, max_length=config.scoring.max_length), self.task.losses
            live = stack.enter_context(self._watched(model, rows))
            held = 0
            sketch = _SketchOfNothing(config.scoring.sketch_dim, seed=config.run.seed)
            if self.look == "gradients":
                gradients.folded(losses, batch, sketch=sketch)
            else:
                _, of_theta = gradients.per_sample(losses, batch)
                held = sum(gradient.nbytes for gradient in of_theta.values())
                with gradients.stepped(of_theta, 1.0):
                    losses(model, batch)
                sketch(of_theta)
        return PassNeeds(held, passing=live.peak - held, flops=live.flops)

    def _looked_at(self, phantom: Phantom, rows: int) -> PassNeeds:
        """A forward alone, with the hidden states of every layer where the selector looks at these."""
        model, config = phantom.model, self.config
        with ExitStack() as stack:
            stack.enter_context(phantom.mode)
            self._kernels(stack)
            stack.enter_context(torch.no_grad())
            model.eval()
            batch = self.task.full_batch(rows, max_length=config.scoring.max_length)
            live = stack.enter_context(self._watched(model, rows))
            see: Callable[..., Any]
            if config.sampling.selector in ("rds", "k_center"):
                see = LastLayerLook(by_position=config.sampling.selector == "rds")
            elif config.sampling.selector in FORWARD_SELECTORS:
                see = FeatureLook(self.task, seed=config.run.seed)
            else:
                see = self.task.losses
            see(model, batch)
        return PassNeeds(passing=live.peak, flops=live.flops)

    def _evaluation(self) -> PassNeeds:
        if not self.config.task.has_dev:
            return PassNeeds()
        config, metrics = self.config, self.config.task.metrics
        writes = config.task.type in ("causal", "seq2seq")
        found = [PassNeeds()]
        if not writes or needs_losses(metrics):
            found.append(self._forward(config.train.eval_batch_size, {}, losses=needs_losses(metrics)))
        if writes and needs_answers(metrics):
            found.append(self._forward(config.train.eval_batch_size * config.task.num_beams, {"use_cache": True}))
        return PassNeeds(passing=max(n.peak for n in found), flops=sum(n.flops for n in found))

    def _forward(self, rows: int, options: dict[str, Any], *, losses: bool = False) -> PassNeeds:
        """A forward without a graph; with ``use_cache`` over the prompts, whose cache then grows to whole rows.

        Args:
            losses: are taken of it.
        """
        phantom = self.phantom(checkpointing=False)
        model = phantom.model
        task, longest = self.task, self.task.longest
        prompt = max(longest - task.targets, 1) if options and not task.decoder else longest
        if options and "logits_to_keep" in inspect.signature(model.base_model.model.forward).parameters:
            options = options | {"logits_to_keep": 1}
        with ExitStack() as stack:
            stack.enter_context(phantom.mode)
            self._kernels(stack)
            model.eval()
            batch = task.full_batch(rows, max_length=prompt)
            live = stack.enter_context(self._watched(model, rows))
            stack.enter_context(torch.no_grad())
            outputs = model(**batch.inputs, **options) if options else task.outputs(model, batch)
            if losses:
                task.loss_sums(outputs, batch)
            peak, logits = live.peak, outputs.logits.nbytes
            if options:
                cache = (live.now - logits) * longest // prompt
                # without logits_to_keep the whole matrix is there, which a generation of token after token never has
                peak = max(peak - (0 if "logits_to_keep" in options else logits), cache)
            del outputs
        return PassNeeds(passing=peak, flops=live.flops * longest // prompt)


class _SketchOfNothing(Sketch):
    """A sketch whose signs are not drawn."""

    def signs(self, name: str, rows: int, columns: int) -> Tensor:
        """Signs without values, (rows, columns) float32."""
        return torch.empty(rows, columns)


def _logits_noticed(found: list[int], live: LiveStorages) -> Callable[..., None]:
    """A hook on the model that notes what was there when its forward ended, but for the logits."""

    def note(_module: Any, _args: Any, outputs: Any) -> None:
        found.append(live.now - outputs.logits.untyped_storage().nbytes())

    return note
