"""The commands around a run: usage, exit codes, and what a mistake leaves untouched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import losses_of, run_tree, write_config
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path, models_dir: Path) -> Path:
    return write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["trian"], 2), (["--help"], 0), (["-h"], 0)])
def test_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == code
    assert capsys.readouterr().err.startswith(
        "usage: tsqlora {train,score,evaluate,predict,export,advise,plan,compare}"
    )


def test_main_passes_arguments_on(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", str(config), "--dry-run", "run.seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_an_interrupt_is_no_traceback(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tsqlora_scale.commands.train.load_config", interrupted)
    assert cli.train(["--config", str(config)]) == 130


def test_a_mistake_with_overwrite_deletes_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = config.parent / "runs" / "run" / "result.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("weeks of work")
    assert cli.train(["--config", str(config), "--overwrite", "task.text=[texxt]"]) == 2
    assert "texxt" in capsys.readouterr().err
    assert kept.read_text() == "weeks of work"


def test_overwrite_deletes_nothing_before_the_model_is_loaded(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = config.parent / "runs" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("of the old run")

    def no_weights(*_: object, **__: object) -> None:
        raise UserError("no weights here")

    monkeypatch.setattr("tsqlora_scale.run.adapted_model.load_base", no_weights)
    assert cli.train(["--config", str(config), "--overwrite"]) == 2
    assert "no weights here" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_text() == "of the old run"


def test_overwrite_starts_from_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = config.parent / "runs" / "run"
    (run_dir / "scores").mkdir(parents=True)
    (run_dir / "config.yaml").write_text("of the old run")
    (run_dir / "scores" / "pass-099.parquet").write_text("of the old run")
    (run_dir / "notes.txt").write_text("of the user")
    overrides = ["adapter.method=lora", "train.max_steps=2"]
    assert cli.train(["--config", str(config), "--overwrite", *overrides]) == 0
    assert "accuracy before -> after" in capsys.readouterr().out
    assert not (run_dir / "scores").exists()
    assert (run_dir / "notes.txt").exists()
    assert len(losses_of(run_dir)) == 2


def test_overwrite_leaves_what_a_link_points_to(config: Path, tmp_path: Path) -> None:
    """Checkpoints are often on another disk."""
    run_dir = config.parent / "runs" / "run"
    run_dir.mkdir(parents=True)
    elsewhere = tmp_path / "scratch"
    elsewhere.mkdir()
    (elsewhere / "step-00000099").write_text("of another run")
    (run_dir / "checkpoints").symlink_to(elsewhere)
    overrides = ["adapter.method=lora", "train.max_steps=1"]
    assert cli.train(["--config", str(config), "--overwrite", *overrides]) == 0
    assert (elsewhere / "step-00000099").exists()
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_checkpoint_that_is_none(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tsqlora_scale.run.adapted_model.load_base", lambda *_, **__: pytest.fail("the model was loaded")
    )
    assert cli.train(["--config", str(config), "--resume", "./step-1"]) == 2
    error = capsys.readouterr().err
    assert (
        error.splitlines()[-1] == "error: --resume './step-1' is no checkpoint folder; give 'auto' or a step-… folder"
    )
    assert not (config.parent / "runs").exists()


def test_the_script_ends_with_2_before_torch(config: Path) -> None:
    """From another folder, as a user may call it; a module named torch that cannot be imported stands in the way."""
    trap = config.parent / "trap"
    trap.mkdir()
    for name in ("torch", "transformers", "peft", "accelerate", "datasets"):
        (trap / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(config), "train.lr=-1"],
        capture_output=True, text=True, cwd=config.parent, check=False,
        env=os.environ | {"PYTHONPATH": str(trap)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "train.lr=-1" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


PRODUCTS = """
import hashlib
from tsqlora_scale.common.quiet import prepare_environment
prepare_environment()
import torch
digest = hashlib.sha256()
generator = torch.Generator().manual_seed(0)
for m, k, n in [(592, 384, 11), (336, 384, 5), (5, 336, 384), (384, 336, 5)]:
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    for product in (a @ b, b.t() @ a.t()):
        digest.update(product.contiguous().numpy().tobytes())
print(torch.get_num_threads(), digest.hexdigest())
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available() or os.cpu_count() == 1, reason="one thread, or no MKL")
def test_products_do_not_depend_on_the_number_of_threads() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}

    def digest(threads: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", PRODUCTS],
            capture_output=True, text=True, check=True, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": threads},
        )  # fmt: skip
        return done.stdout.split()

    (one, alone), (two, together) = digest("1"), digest("2")
    assert (one, two) == ("1", "2")
    assert alone == together
