"""Every benchmark still runs: smallest sizes, in a process of its own, and its table has numbers in it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.runs import go, result_of, run_tree, write_config
from tests.tiny import tiny_model
from tests.warm import warm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
#: Benchmark -> its arguments; words in capitals are filled in.
COMMANDS = {
    "cheaper_scores": "--config CONFIG --out OUT --variant short:scoring.max_length=4",
    "gpu": "--smoke --out OUT --sections llama,logits,nf4,resumed,offloaded",
    "growth": "--config CONFIG --out OUT --seeds 0 --event 4 --steps 2",
    "memory": "--ranks 0 2 --bases fp32 --hidden 64 --layers 1",
    "noise scores": "scores --config CONFIG --out OUT --seeds 0 --warmup 0",
    "noise train": "train --config CONFIG --out OUT --seeds 0 --arm ours train.max_steps=9",
    "online cost": "cost --model MODEL --batch 4 --length 8 --repeats 2",
    "online agreement": "agreement --config CONFIG --out OUT --seeds 0 schedule.start=8",
    "overhead": "--model MODEL --batch 4 --length 8 --repeats 2 --steps 1",
    "overhead --agreement": "--model MODEL --batch 4 --length 8 --agreement --agreement-steps 4 --agreement-every 4",
    "planned_memory": "--cases encoder-plain --tiny",
    "pool": "--out OUT --sizes 1e3 --batch 16 --shard 500",
    "redundancy": "--config CONFIG --out OUT --seeds 0 --power 1 train.max_steps=9",
    "sampler": "--out OUT --sizes 1e4 --seconds 0.1",
    "scoring": "--model MODEL --batch 4 --length 8 --repeat 2 --loop-repeat 1",
    "tokens": "--out OUT --sizes 40 --workers 1 --words 60 --length 64 --vocabulary 400",
    "throughput": "--encoder MODEL --causal DECODER --batch 4 --micro-batch 2 --max-length 24 --rows 40 --steps 1 "
    "--repeats 1",
}
#: The first is run below, three need the original package, a folder of data and TRL; the others are parts of others.
NOT_RUN = {
    *("cut_ranks", "make_movie_snippets", "audit", "chat_masks"),
    *("policies", "random_models", "steps", "traffic", "watch"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_it_runs(name: str, tmp_path: Path, models_dir: Path) -> None:
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "benchmark"))
    words = {"CONFIG": config, "OUT": tmp_path / "out", "MODEL": tiny_model("bert", models_dir)}
    words["DECODER"] = tiny_model("llama", models_dir)
    (tmp_path / "out").mkdir()
    arguments = [str(words.get(word, word)) for word in COMMANDS[name].split()]
    check_table(run_script(name.split()[0], *arguments))


def run_script(name: str, *arguments: str) -> list[str]:
    """The lines of a benchmark's tables."""
    done = warm().run([str(FOLDER / f"{name}.py"), *arguments], timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith("|")]


def check_table(lines: list[str]) -> None:
    """Heads, and numbers in every row."""
    headed = {place for place, line in enumerate(lines[1:]) if line.startswith("|---")}
    rows = [line for place, line in enumerate(lines) if place not in headed and not line.startswith("|---")]
    assert headed
    assert rows
    assert all(re.search(r"\d", line) for line in rows)


def test_cuts_beside_what_was_trained_at_their_rank(tmp_path: Path, models_dir: Path) -> None:
    """Of a run's four ranks two and three; the seed that one arm alone has, and what tuning has run, do not count."""
    for arm, rank, seed in (("double", 4, 0), ("double", 4, 1), ("half", 2, 0)):
        tree = run_tree("bert", tmp_path, models_dir, f"seed{seed}", adapter={"r": rank, "method": "lora"})
        tree["run"] |= {"output_dir": str(tmp_path / "out" / "runs" / "words" / arm), "seed": seed}
        tree["train"]["max_steps"] = 3
        go({key: tree[key] for key in ("run", "model", "task", "adapter", "train")})
    arm = tmp_path / "out" / "runs" / "words" / "double"
    shutil.copytree(arm / "seed1", arm / "tuning-lr0.01-seed0")
    arguments = ["--task", "words", "--arm", "double", "--ranks", "2,3", "--against", "half"]
    lines = run_script("cut_ranks", str(tmp_path / "out"), *arguments)
    check_table(lines)
    assert "seeds 0 " in lines[0]
    ((_, whole),) = result_of(arm / "seed0")["metrics"].items()
    assert float(lines[2].split("|")[3]) == pytest.approx(whole, abs=1e-4)
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        *("double", "cut to 2, uniform", "cut to 2, total", "half, trained", "cut to 3, uniform", "cut to 3, total")
    ]
    sizes = [float(line.split("|")[2].replace(",", "")) for line in lines[2:]]
    assert sizes[1] == sizes[3] == sizes[0] / 2


def test_none_is_left_out() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {name.split()[0] for name in COMMANDS} | NOT_RUN
