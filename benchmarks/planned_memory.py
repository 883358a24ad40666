#!/usr/bin/env python3
"""The plan of a run's memory (``launch/plan.py``) against real runs: every phase, as the operating system counts it.

    python benchmarks/planned_memory.py [--cases llama-plain bart-zero2 ...] [--tiny]

Every case is a run of its own on models of random weights that are made here: a MiniLM-like encoder, a BART-like model
of 60 million parameters and a Llama-like one of 90 million; on one process, under DDP, ZeRO-2, ZeRO-3 and FSDP2 on two
(the files of ``configs/accelerate/``), from a 4-bit base, and with checkpointed activations. Steps, a scoring pass and
an evaluation are taken, and the largest resident memory within each is read (Linux's ``VmHWM``, which is set back in
between; of the ranks the largest).

A process is large before it holds anything. So the same run is taken first with a model of next to no size, in the same
process: what it leaves behind are libraries, threads and their buffers, which are the column ``own``, measured, and no
part of a plan. ``measured`` is what comes on top of it, ``planned`` what the plan says, from the config alone; the last
ratio is that of all, with ``own`` on both sides. The C library is told to give freed memory back at once: by itself it
keeps what the largest batch has taken (and a scoring pass tells it to), in pieces that depend on what was freed when.
And all of the base is read once: on a CPU it is the file itself, of which rows that no token asks for may stay on the
disk.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
#: Of glibc: allocations from that size on have pages of their own, which go back when they are freed.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
SHARED = ("ddp", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        kind: of the model.
        engine: as a run records it.
        model: keys of the config's section.
    """

    kind: str
    engine: str
    model: dict[str, Any] = field(default_factory=dict)


CASES = {
    f"{kind}-{engine}": Case(kind, engine) for kind in ("encoder", "bart", "llama") for engine in ("plain", *SHARED)
}
CASES |= {
    "encoder-checkpointing": Case("encoder", "plain", {"gradient_checkpointing": True}),
    "bart-checkpointing": Case("bart", "plain", {"gradient_checkpointing": True}),
    "llama-checkpointing": Case("llama", "plain", {"gradient_checkpointing": True}),
    "llama-bf16": Case("llama", "plain", {"dtype": "bf16"}),
    "llama-nf4": Case("llama", "plain", {"quantization": "nf4"}),
    "llama-nf4-zero3": Case("llama", "zero3", {"quantization": "nf4"}),
}


def of_process(key: str) -> int:
    """A line of Linux's ``/proc/self/status``, bytes: ``VmRSS``, what is resident, ``VmHWM``, the most that was."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def settled() -> int:
    """Resident bytes after everything that is free went back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return of_process("VmRSS")


def highest_in(call: Callable[[], Any]) -> int:
    """The most resident bytes within a call."""
    settled()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    call()
    return of_process("VmHWM")


def model_config(kind: str, *, small: bool) -> Any:
    """A model's description; ``small`` is the same of next to no size."""
    from transformers import BartConfig, BertConfig, LlamaConfig

    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "encoder":
        width, layers, heads, inner = (64, 1, 2, 64) if small else (384, 12, 12, 1536)
        return BertConfig(
            vocab_size=100 if small else 30522, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=inner, pad_token_id=0,
        )  # fmt: skip
    if kind == "llama":
        width, layers, heads, inner = (64, 1, 2, 64) if small else (640, 10, 10, 1728)
        return LlamaConfig(
            vocab_size=100 if small else 32000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=inner, **tokens,
        )  # fmt: skip
    width, layers, heads, inner = (64, 1, 2, 64) if small else (512, 4, 8, 2048)
    return BartConfig(
        vocab_size=100 if small else 50265, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=inner, decoder_ffn_dim=inner,
        decoder_start_token_id=2, forced_eos_token_id=2, **tokens,
    )  # fmt: skip


def write_model(kind: str, folder: Path, *, small: bool, length: int) -> None:
    """Weights, tokenizer, and rows that are as long as the limits allow, but for one of four."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    classes = {"encoder": AutoModel, "bart": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}
    torch.manual_seed(0)
    classes[kind].from_config(model_config(kind, small=small)).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    lines = []  # of held-out ones some batches a rank: engines gather ahead what they have gathered before
    for number in range(16):
        text = " ".join(f"w{(number + place) % 60}" for place in range(length if number % 4 else length // 2))
        lines.append(json.dumps({"text": text, "label": ("no", "yes")[number % 2], "target": text}))
    for name, count in (("train", 8), ("dev", 16)):
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")


def tree_of(case: Case, folder: Path, out: Path, *, length: int, micro: int) -> dict[str, Any]:
    """A run's config."""
    task: dict[str, Any] = {
        "dataset": {"path": str(folder), "train_file": "train.jsonl", "dev_file": "dev.jsonl"}, "max_length": length,
    }  # fmt: skip
    if case.kind == "encoder":
        task |= {"type": "classification", "text": ["text"], "label": "label", "labels": ["no", "yes"]}
        task |= {"metrics": ["accuracy"]}
    else:
        task |= {"type": "seq2seq" if case.kind == "bart" else "causal", "source": "text", "target": "target"}
        task |= {"max_target_length": length // 2, "metrics": ["perplexity"]}
    return {
        "run": {"name": "run", "output_dir": str(out)},
        "model": {"name_or_path": str(folder), **case.model},
        "task": task,
        "adapter": {"r": 16, "alpha": 32},
        "scoring": {"batch_size": 4, "warmup_steps": 90, "delta_loss": "exact", "refresh": "none"},
        "sensitivity": {"every": 1},
        "schedule": {"start": 2, "end": 2, "every": 2},
        "train": {"max_steps": 100, "batch_size": 2 * micro, "micro_batch_size": micro, "eval_batch_size": 4},
    }


def phases_of(run: Any) -> dict[str, int]:
    """The most resident bytes in a step, in a scoring pass and in an evaluation."""
    import torch

    from benchmarks.steps import adapt, bare_step
    from tsqlora_scale.engine.sharded import held_part

    for param in run.engine.module.parameters():
        held_part(param).view(torch.uint8).count_nonzero()  # reads it
    bare_step(run)  # moments come with the first
    adapt(run)
    bare_step(run)  # and engines find out what they need
    with mock.patch("tsqlora_scale.quality.scores.measurer.reuse_freed_memory"):
        return {
            "step": highest_in(lambda: bare_step(run)),
            "scoring": highest_in(lambda: run.selector.score(run.engine.module, run.step)),
            "evaluation": highest_in(run.evaluate),
        }


def measure(paths: list[str]) -> None:
    """The small run and the real one, whose configs are files, in the processes of a launcher; rank 0 prints JSON."""
    sys.path[0] = str(ROOT)
    from tsqlora_scale.common.quiet import prepare_environment

    prepare_environment()
    from tsqlora_scale.common.failures import leave_group
    from tsqlora_scale.config.load import load_config
    from tsqlora_scale.run import preflight
    from tsqlora_scale.run.build import build_run

    imported = settled()
    checked = [preflight.check(load_config(path)) for path in paths[:2]]
    small = build_run(checked[0])
    phases_of(small)
    engine = small.engine.name
    small.engine.close()
    del small
    before = settled()
    run = build_run(checked[1])
    assert run.engine.name == engine == paths[2], (run.engine.name, paths[2])
    mine = {"own": before - imported, **{phase: peak - before for phase, peak in phases_of(run).items()}}
    everyone = run.engine.world.gather_objects(mine)
    if run.is_main:
        print(json.dumps({key: max(one[key] for one in everyone) for key in mine}), flush=True)
    run.engine.close()
    leave_group(0)


def planned(case: Case, config: Path) -> Any:
    """What the plan says of the engine."""
    sys.path[0] = str(ROOT)
    from tsqlora_scale.config.load import load_config
    from tsqlora_scale.planning.planner import plan

    devices = 1 if case.engine == "plain" else 2
    found = plan(load_config(config), devices=devices, machine="cpu")
    return next(memory for memory in found.engines if memory.engine == case.engine)


def launched(case: Case, configs: list[Path]) -> dict[str, int]:
    """What :func:`measure` prints, from processes of its own."""
    command = [sys.executable]
    if case.engine == "ddp":
        command += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    elif case.engine != "plain":
        settings = ROOT / "configs" / "accelerate" / f"{case.engine}.yaml"
        command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(settings)]
        command += ["--main_process_port", "0"]
    command += [__file__, "--one", *map(str, configs), case.engine]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | GIVES_BACK
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"own"')]
    if done.returncode or not lines:
        raise SystemExit(f"{case} failed:\n{done.stdout[-3000:]}{done.stderr[-6000:]}")
    found: dict[str, int] = json.loads(lines[-1])
    return found


def table(names: list[str], *, tiny: bool, verbose: bool) -> None:
    """Launch the cases, and print their rows."""
    import yaml

    print("| run | phase | own MB | planned MB | measured MB | planned / measured | with own |")
    print("|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as name:
        for case_name in names:
            case, configs = CASES[case_name], []
            for size in ("small", "real"):
                small = size == "small" or tiny
                folder = Path(name) / f"{case.kind}-{size}"
                length, micro = (16, 2) if small else (64, 8) if case.kind == "encoder" else (32, 4)
                if not folder.exists():
                    write_model(case.kind, folder, small=small, length=length)
                tree = tree_of(case, folder, Path(name) / f"runs-{case_name}-{size}", length=length, micro=micro)
                configs.append(Path(name) / f"{case_name}-{size}.yaml")
                configs[-1].write_text(yaml.safe_dump(copy.deepcopy(tree)), encoding="utf-8")
            memory, measured = planned(case, configs[1]), launched(case, configs)
            if verbose:
                print(json.dumps(memory.parts), file=sys.stderr)
            for phase, size_planned in memory.phases.items():
                own, seen = measured["own"], measured[phase]
                ratio, of_all = size_planned / seen, (size_planned + own) / (seen + own)
                numbers = f"{own / 1e6:.0f} | {size_planned / 1e6:.1f} | {seen / 1e6:.1f}"
                print(f"| {case_name} | {phase} | {numbers} | {ratio:.3f} | {of_all:.3f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="default: all")
    parser.add_argument("--tiny", action="store_true", help="models of next to no size, to try this out")
    parser.add_argument("--parts", action="store_true", help="print the plan's parts, too, to stderr")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one)
    else:
        table(options.cases, tiny=options.tiny, verbose=options.parts)


if __name__ == "__main__":
    main()
