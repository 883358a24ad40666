"""The plan of a run: its memory under every engine, an engine that fits, and its time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM

from tsqlora_scale.config.locations import resolve
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.base_model import can_checkpoint
from tsqlora_scale.model.describe import describe_model
from tsqlora_scale.model.dropouts import set_layer_drop, set_no_rescaling
from tsqlora_scale.model.probe import run_probe
from tsqlora_scale.planning.data_sizes import DataSizes
from tsqlora_scale.planning.engine_memory import EngineMemory, engine_memory, engines_for
from tsqlora_scale.planning.exchange import received_bytes
from tsqlora_scale.planning.held_bytes import HeldWeights, held_weights
from tsqlora_scale.planning.phantom_passes import Machine, PassNeeds, PhantomPasses
from tsqlora_scale.planning.remedies import Remedy, find_remedies
from tsqlora_scale.planning.run_times import RunTimes, run_times
from tsqlora_scale.quality.features.forward_pass import BATCH
from tsqlora_scale.quality.gradients.batch_memory import fitting_batch
from tsqlora_scale.run.plan import RunPlan, plan_run
from tsqlora_scale.tasks.objective_names import objective_class
from tsqlora_scale.tasks.objectives.prompted import prompt_base

#: Tokens of the pass that tells which layers text does not reach.
PROBE_TOKENS = 12


@dataclass(frozen=True)
class Forecast:
    """What a run will need.

    Attributes:
        config: of the run.
        plan: its steps.
        engines: memory of a rank under every engine, as the config says.
        proposal: the first that fits; None: none does, or nothing was said of the memory that there is.
        least: what needs least, where none fits; None otherwise.
        remedies: changes of the config that would make it fit, where none does.
        memory: bytes of a device; None: unknown.
        times: phases in steps.
        hours: the same in hours; None without a number of tokens in a second.
        received: bytes of the whole run that a rank receives of others, by engine and phase.
        link: bytes that it receives in a second; None: unknown.
        trained: elements that train.
        base_elements: of the base's storage.
    """

    config: Config
    plan: RunPlan
    engines: list[EngineMemory]
    proposal: EngineMemory | None
    least: EngineMemory | None
    remedies: list[Remedy]
    memory: int | None
    times: RunTimes
    hours: dict[str, float] | None
    received: dict[str, dict[str, int]]
    link: float | None
    trained: int
    base_elements: int

    @property
    def notes(self) -> list[str]:
        """What the plan leaves out of this run."""
        notes = []
        if self.config.scores_by_proxy:
            notes.append("scoring is that of scoring.proxy_model, which is no part of this plan: plan it by itself")
        if self.config.scores_online:
            notes.append("what scoring.source=online listens to in the steps is not counted")
        if self.config.pretrains:
            notes.append("the pretraining (pretrain) is not counted")
        if self.config.train.average_last is not None:
            notes.append("snapshots of train.average_last lie in the host's memory, and are not counted")
        if self.config.train.distill is not None:
            notes.append("train.distill: its forward pass, and a copy of what trains, are not counted")
        for section, name in (("allocation", "file"), ("adapter", "init_from")):
            if getattr(getattr(self.config, section), name) is not None:
                notes.append(f"the ranks of {section}.{name} are not read: adapter.r is counted in every layer")
        return notes

    @property
    def hours_by_engine(self) -> dict[str, dict[str, float]] | None:
        """Hours of every phase under every engine, nothing of an exchange hidden behind computing: at most, that is.
        None where tokens in a second or the link are unknown."""
        if self.hours is None or self.link is None:
            return None
        seconds = 3600 * self.link
        return {
            engine: {phase: hours + received.get(phase, 0) / seconds for phase, hours in self.hours.items()}
            for engine, received in self.received.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, sizes in bytes."""

        def told(found: EngineMemory) -> dict[str, Any]:
            return asdict(found) | {"total": found.total, "fits": self.memory is None or found.total <= self.memory}

        return {
            "model": self.config.model.name_or_path,
            "base_elements": self.base_elements,
            "trained_parameters": self.trained,
            "memory": self.memory,
            "engines": [told(found) for found in self.engines],
            "proposal": None if self.proposal is None else told(self.proposal),
            "remedies": [remedy.to_json() for remedy in self.remedies],
            "notes": self.notes,
            "time": {
                "steps": self.times.steps,
                "tokens_per_step": self.times.tokens_per_step,
                "flops_per_step": self.times.flops_per_step,
                "hours": self.hours,
                "received": self.received,
                "hours_by_engine": self.hours_by_engine,
            },
        }


def forecast(
    config: Config,
    *,
    sizes: DataSizes,
    devices: int = 1,
    memory: int | None = None,
    tokens_per_second: float | None = None,
    link: float | None = None,
    machine: Machine = "gpu",
) -> Forecast:
    """Plan a run.

    Args:
        sizes: of the data.
        devices: ranks, one on each.
        memory: bytes of one of them.
        tokens_per_second: that all of them train on, the base whole on each.
        link: bytes that a rank receives of others in a second.
        machine: whose kernels are taken.

    Raises:
        UserError: a model that cannot be described or tried, batch sizes that do not divide, a schedule that never
            fires.
    """
    plan = plan_run(config, sizes.pool, devices, query_rows=sizes.query)
    forecaster = Forecaster(config, plan, memory=memory, machine=machine)
    engines = [forecaster.memory_of(name, plan.micro_batch_size) for name in engines_for(config, devices)]
    checkpointing = config.model.gradient_checkpointing
    scored = forecaster.scoring_rows(engines[0].engine, checkpointing)
    times = run_times(
        config,
        plan,
        forecaster.passes.phantom(checkpointing=checkpointing),
        step=forecaster.step(plan.micro_batch_size, checkpointing),
        scoring=(forecaster.scoring_of(scored, checkpointing), scored),
        evaluation=forecaster.passes.evaluation(),
        dev_size=sizes.held_out,
    )
    proposal, least, remedies = forecaster.proposal(), None, []
    if memory is not None and proposal is None:
        least = forecaster.least()
        remedies = find_remedies(
            config,
            devices=devices,
            memory=memory,
            least=least,
            plans=_Replanned(forecaster, sizes=sizes, memory=memory, machine=machine),
        )
    return Forecast(
        config=config,
        plan=plan,
        engines=engines,
        proposal=proposal,
        least=least,
        remedies=remedies,
        memory=memory,
        times=times,
        hours=None if tokens_per_second is None else times.hours(tokens_per_second),
        received={one.engine: forecaster.received(one.engine, scored, sizes.held_out) for one in engines},
        link=link,
        trained=forecaster.weights.trained_elements,
        base_elements=sum(weight.elements for weight in forecaster.weights.frozen),
    )


class Forecaster:
    """Memory of a run under engines, micro-batches and with or without checkpointing.

    Args:
        passes: of the same config; none: they are made here.
    """

    def __init__(
        self,
        config: Config,
        plan: RunPlan,
        *,
        memory: int | None,
        machine: Machine,
        passes: PhantomPasses | None = None,
    ) -> None:
        self.config, self.plan = config, plan
        self._memory, self._machine = memory, machine
        self.passes = self._new_passes() if passes is None else passes

    def _new_passes(self) -> PhantomPasses:
        config = self.config
        model_config = describe_model(config, resolve(config.model.name_or_path, key="model.name_or_path"))
        self.config = config = config.with_task(prompt_base=prompt_base(config.task, model_config))
        set_no_rescaling(model_config)
        set_layer_drop(model_config)
        return PhantomPasses(
            config, model_config, unreached=unreached_layers(config, model_config), machine=self._machine
        )

    @cached_property
    def weights(self) -> HeldWeights:
        """The parameters."""
        return held_weights(self.config, self.passes.phantom(checkpointing=self.config.model.gradient_checkpointing))

    def step(self, rows: int, checkpointing: bool) -> PassNeeds:
        """A micro-batch's needs: tried at the config's size and at 1, in between by a line."""
        largest = self.plan.micro_batch_size
        if rows == 1:
            return self.passes.step(1, checkpointing=checkpointing)
        full = self.passes.step(largest, checkpointing=checkpointing)
        if rows == largest:
            return full
        one = self.passes.step(1, checkpointing=checkpointing)
        share = (rows - 1) / (largest - 1)
        between = {key: round(value + share * (getattr(full, key) - value)) for key, value in asdict(one).items()}
        return PassNeeds(**between)

    def scoring_of(self, rows: int, checkpointing: bool) -> PassNeeds:
        """A scoring batch's needs, in proportion to one that was tried."""
        if rows == 0:
            return PassNeeds()
        tried = self._tried_rows
        needs = self.passes.scoring(tried, checkpointing=checkpointing)
        kept, passing, flops = (size * rows // tried for size in (needs.kept, needs.passing, needs.flops))
        return PassNeeds(kept, passing=passing, flops=flops)

    def scoring_rows(self, engine: str, checkpointing: bool) -> int:
        """Samples of a scoring batch; ``auto`` is what fits beside what the engine holds."""
        if self.passes.look == "none":
            return 0
        size = self.config.scoring.batch_size
        if size != "auto":
            return size
        looks = self.passes.look == "forward"
        if self._memory is None:
            return BATCH if looks else self._tried_rows
        nothing = {"step": PassNeeds(), "scoring": PassNeeds(), "evaluation": PassNeeds()}
        held = self._put_together(engine, 1, checkpointing, nothing).total
        one = self.scoring_of(self._tried_rows, checkpointing).peak / self._tried_rows
        device = torch.device("cuda" if self._machine == "gpu" else "cpu")
        fitting = fitting_batch(one, max(self._memory - held, 0), device)
        return min(fitting, BATCH) if looks else fitting  # which begins with as many, and halves them as it must

    def received(self, engine: str, scoring_rows: int, dev_size: int) -> dict[str, int]:
        """See :func:`.received_bytes`."""
        return received_bytes(
            engine,
            self.config,
            self.plan,
            self.weights,
            look=self.passes.look,
            scoring_rows=scoring_rows,
            dev_size=dev_size,
        )

    @property
    def _tried_rows(self) -> int:
        size = self.config.scoring.batch_size
        return min(size if size != "auto" else 4, 8)

    def memory_of(self, engine: str, micro: int, checkpointing: bool | None = None) -> EngineMemory:
        """Memory under one engine.

        Args:
            micro: samples of a micro-batch.
            checkpointing: of activations; None: as the config says.
        """
        checkpointing = self.config.model.gradient_checkpointing if checkpointing is None else checkpointing
        passes = {
            "step": self.step(micro, checkpointing),
            "scoring": self.scoring_of(self.scoring_rows(engine, checkpointing), checkpointing),
            "evaluation": self.passes.evaluation(),
        }
        return self._put_together(engine, micro, checkpointing, passes)

    def _put_together(self, engine: str, micro: int, checkpointing: bool, passes: dict[str, PassNeeds]) -> EngineMemory:
        return engine_memory(
            engine,
            self.config,
            self.weights,
            devices=self.plan.world_size,
            micro_batch_size=micro,
            checkpointing=checkpointing,
            passes=passes,
            machine=self._machine,
        )

    def proposal(self) -> EngineMemory | None:
        """What fits and costs least: first without checkpointing, which takes a pass more, then the engine that
        exchanges least, then the largest micro-batch."""
        if self._memory is None:
            return None
        for checkpointing, engine, micro in self._candidates():
            found = self.memory_of(engine, micro, checkpointing)
            if found.total <= self._memory:
                return found
        return None

    def least(self) -> EngineMemory:
        """The candidate that needs least: as few samples at once as may be, with checkpointing where the model can."""
        micro, engines = micro_batch_sizes(self.config, self.plan)[-1], engines_for(self.config, self.plan.world_size)
        found = [self.memory_of(engine, micro, self._can_checkpoint) for engine in engines]
        return min(found, key=lambda memory: memory.total)

    @property
    def _can_checkpoint(self) -> bool:
        return can_checkpoint(self.passes.phantom(checkpointing=False).model)

    def _candidates(self) -> Iterator[tuple[bool, str, int]]:
        choices = [True] if self.config.model.gradient_checkpointing else [False, True]
        for checkpointing in choices if self._can_checkpoint else [False]:
            for engine in engines_for(self.config, self.plan.world_size):
                for micro in micro_batch_sizes(self.config, self.plan):
                    yield checkpointing, engine, micro


class _Replanned:
    """Plans under changed configs, and on other numbers of devices, whose passes are those of the same config."""

    def __init__(self, first: Forecaster, *, sizes: DataSizes, memory: int, machine: Machine) -> None:
        self._passes = {first.config.model_dump_json(): first.passes}
        self._sizes, self._memory, self._machine = sizes, memory, machine

    def least(self, config: Config, devices: int) -> EngineMemory:
        """See :class:`.Plans`."""
        return self._forecaster(config, devices).least()

    def proposal(self, config: Config, devices: int) -> EngineMemory | None:
        """See :class:`.Plans`."""
        return self._forecaster(config, devices).proposal()

    def _forecaster(self, config: Config, devices: int) -> Forecaster:
        key = config.model_dump_json()
        plan = plan_run(config, self._sizes.pool, devices, query_rows=self._sizes.query)
        known = self._passes.get(key)
        forecaster = Forecaster(config, plan, memory=self._memory, machine=self._machine, passes=known)
        self._passes[key] = forecaster.passes
        return forecaster


def micro_batch_sizes(config: Config, plan: RunPlan) -> list[int]:
    """The config's, and smaller ones that divide a rank's share of the batch, the largest first; where groups of
    samples are listened to, of whole groups."""
    share, group = config.train.batch_size // plan.world_size, config.sensitivity.group_size
    whole = group if config.adapts_ranks and isinstance(group, int) else 1
    return [size for size in range(plan.micro_batch_size, 0, -1) if share % size == 0 and size % whole == 0]


def unreached_layers(config: Config, model_config: Any) -> Collection[str]:
    """Linear layers that text gives no gradient to."""
    ids = torch.arange(PROBE_TOKENS)[None] % max(int(model_config.get_text_config().vocab_size), 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    auto_class = objective_class(config.task).auto_class
    if auto_class is AutoModelForSeq2SeqLM:
        inputs["decoder_input_ids"] = ids
    trust = config.model.trust_remote_code
    return run_probe(auto_class, model_config, inputs, trust_remote_code=trust).unreached
