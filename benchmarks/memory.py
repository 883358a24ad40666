#!/usr/bin/env python3
"""What a rank holds of a frozen base under ZeRO-3 with 1, 2 and 4 ranks: fp32, bf16, and nf4 with bf16 beside it.

    python benchmarks/memory.py [--ranks 1 2 4] [--bases fp32 bf16 nf4] [--hidden 1024 --layers 12]

Every row is a training of its own: a Llama of random weights made here, two steps, one rank event, two steps. Base
bytes are what a rank holds between uses. Resident memory (Linux) is the largest over the ranks, less what a process
holds once it has imported the libraries: between steps, and the largest number seen within the last two. The C library
is told to give freed memory back at once, which by itself it does not do.

ZeRO-3 leaves up to a billion gathered parameters standing between a forward and a backward pass
(``stage3_max_live_parameters``), which is all of a model this small; here it is a hundredth of the model, so that what
is seen is what sharding does to a large one.

Whether that is what a plan says beforehand: ``benchmarks/planned_memory.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LAUNCH = Path(__file__).resolve().parents[1]
VOCABULARY = 2_000
PARAMETERS_ALIVE = 1_000_000
#: Of glibc: allocations from that size on have pages of their own, which go back when they are freed.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@contextmanager
def watched() -> Iterator[list[int]]:
    """The largest :func:`resident` meanwhile, looked at every few milliseconds, is the list's only item in the end."""
    found, over = [resident()], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            found[0] = max(found[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """A Llama of random weights, a word-level tokenizer, and rows, as ordinary files."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(60))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    rows = [{"source": f"w{n % 60} w{n % 7}", "target": f"w{n % 5}"} for n in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measured_pass(run: Any, micro: int) -> dict[str, int]:
    """Bytes of a micro-batch's forward and backward pass of pool rows 1, 2, …, on gradients that are there already: at
    its most, and what the backward pass waits for.
    """
    import torch

    from tsqlora_scale.quality.gradients.batch_memory import LiveBytes, bytes_kept

    module, task = run.engine.module, run.task
    module.train()
    batch = task.batch(range(1, 1 + micro)).to(run.engine.world.device)
    trained = [param for param in module.parameters() if param.requires_grad]
    gradients = [torch.zeros_like(param) for param in trained]
    for param, gradient in zip(trained, gradients, strict=True):
        param.grad = gradient
    kept = bytes_kept(module, lambda: task.losses(module, batch).sum())
    with LiveBytes([*module.parameters(), *module.buffers(), *gradients]) as live:
        task.losses(module, batch).sum().backward()
    for param in trained:
        param.grad = None
    return {"pass": live.peak, "kept": kept}


def train(folder: Path, base: str, *, checkpointing: bool = False) -> None:
    """One row, in the processes that the launcher started; rank 0 prints it as JSON."""
    from tsqlora_scale.common.quiet import prepare_environment

    prepare_environment()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.steps import adapt, bare_step
    from tsqlora_scale.config.load import parse_config
    from tsqlora_scale.ranks.controller import AdaptiveRanks
    from tsqlora_scale.run import preflight
    from tsqlora_scale.run.build import build_run

    nothing = resident()
    tree: dict[str, Any] = {
        "run": {"name": "memory", "output_dir": str(folder / f"runs-{base}-{os.environ.get('WORLD_SIZE', '1')}")},
        "model": {"name_or_path": str(folder / "model"), "dtype": "fp32" if base == "fp32" else "bf16"},
        "task": {
            "type": "causal", "dataset": {"path": str(folder), "train_file": "train.jsonl"},
            "source": "source", "target": "target", "max_length": 32, "max_target_length": 8,
            "metrics": ["rougeL"],
        },
        "adapter": {"r": 8, "alpha": 16},
        "sampling": {"selector": "full"},
        "schedule": {"start": 2, "end": 2, "every": 2},
        "train": {"max_steps": 4, "batch_size": 4, "micro_batch_size": 1, "lr": 1e-3},
    }  # fmt: skip
    tree["model"]["gradient_checkpointing"] = checkpointing
    if base == "nf4":
        tree["model"]["quantization"] = "nf4"
    checked = preflight.check(parse_config(tree))
    run = build_run(checked)
    for _ in range(2):
        bare_step(run)
    adapt(run)
    with watched() as peak:
        for _ in range(2):
            bare_step(run)
    held = run.engine.frozen_parameters()
    assert isinstance(run.ranks, AdaptiveRanks)
    tracker = run.ranks.tracker
    mine = {
        "base": sum(held["bytes"].values()),
        "adapter": sum(
            getattr(p, "ds_numel", p.numel()) * 4 for p in run.engine.module.parameters() if p.requires_grad
        ),
        "statistics": 8 * sum(len(table) for table in tracker.state_dict().values() if isinstance(table, dict)),
        "resident": resident() - nothing,
        "peak": peak[0] - nothing,
    }
    everyone = run.engine.world.gather_objects(mine)
    if run.is_main:
        print(json.dumps({key: max(one[key] for one in everyone) for key in mine}), flush=True)
    run.engine.close()
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def launch(folder: Path, base: str, ranks: int, options: argparse.Namespace) -> dict[str, int]:
    """A row in fresh processes under ZeRO-3; 0 ranks: one process without DeepSpeed."""
    command = [sys.executable]
    if ranks:
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = folder / "zero3.json"
        few = PARAMETERS_ALIVE
        zero = {"stage": 3, "stage3_max_live_parameters": few, "stage3_max_reuse_distance": few}
        zero |= {"stage3_prefetch_bucket_size": few, "reduce_bucket_size": few}
        config.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(sizes, "auto")}), encoding="utf-8")
        command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--use_deepspeed"]
        command += ["--deepspeed_config_file", str(config), "--num_processes", str(ranks), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        command += ["--zero3_init_flag", "true"]
    command += [__file__, "--one", base, "--folder", str(folder), *["--checkpointing"] * options.checkpointing]
    done = subprocess.run(command, capture_output=True, text=True, cwd=LAUNCH, check=False, env=os.environ | GIVES_BACK)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{base} on {ranks} ranks failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    row: dict[str, int] = json.loads(lines[-1])
    return row


def main() -> None:
    """Launch every row and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 1, 2, 4], help="0: without DeepSpeed")
    parser.add_argument("--bases", nargs="+", default=["fp32", "bf16", "nf4"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.folder, options.one, checkpointing=options.checkpointing)
        return
    heads = ["base MB a rank", "adapter MB", "statistics kB", "resident MB", "peak in a step MB"]
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), options.hidden, options.layers)
        print(f"| base | ranks | {' | '.join(heads)} |")
        print("|---" * (2 + len(heads)) + "|")
        for base in options.bases:
            for ranks in options.ranks:
                row = launch(Path(name), base, ranks, options)
                cells = [row["base"] / 1e6, row["adapter"] / 1e6, row["statistics"] / 1e3]
                cells += [row["resident"] / 1e6, row["peak"] / 1e6]
                shown = " | ".join(f"{cell:.1f}" for cell in cells)
                print(f"| {base} | {ranks or 'plain'} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
