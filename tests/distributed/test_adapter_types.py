"""Types that are not PEFT's, and starts that touch the base, on engines: the losses of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import WORKER, launch
from tests.runs import go, losses_of, result_of, run_tree, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1500)]

#: name -> the tiny model, and the section
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "loratrf": ("bart", {"method": "loratrf"}),
    "bitfit": ("deberta", {"method": "bitfit"}),
    "houlsby": ("llama", {"method": "houlsby"}),
    "pfeiffer": ("bert", {"method": "pfeiffer"}),
    "prompt": ("t5", {"method": "prompt"}),
    "prefix": ("bart", {"method": "prefix"}),
    "full": ("t5", {"method": "full"}),
    "pissa": ("llama", {"method": "lora", "init": "pissa"}),
    "dora": ("bert", {"method": "dora"}),
    "rslora": ("llama", {"method": "rslora"}),
    "eva": ("bert", {"method": "lora", "init": "eva", "init_samples": 5}),
}
STEPS, MIDDLE = 3, 1


def tree_of(method: str, folder: Path, models: Path, name: str) -> dict[str, Any]:
    train = {"max_steps": STEPS, "checkpoint_every": MIDDLE, "checkpoint_keep": 9, "micro_batch_size": 3}
    kind, adapter = KINDS[method]
    return run_tree(kind, folder, models, name, adapter=adapter, train=train)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    for method in KINDS:
        go(tree_of(method, folder, models_dir, method))
    return folder / "runs"


#: On ZeRO-3, which shards what trains, all but EVA, which is not for it; on DDP those in which a parameter without a
#: gradient would be found late; on ZeRO-2 the others.
LATE = ["bitfit", "prompt", "full", "dora"]
ON = {
    "ddp-2": [*LATE, "eva"],
    "zero2-2": [name for name in KINDS if name not in (*LATE, "eva")],
    "zero3-2": [name for name in KINDS if name != "eva"],
}
SHARDED = "zero3-2"


@pytest.mark.parametrize("engine", ON)
def test_an_engine_trains_them_alike(tmp_path: Path, models_dir: Path, plain: Path, engine: str) -> None:
    configs = []
    for method in ON[engine]:
        configs.append(str(write_config(tmp_path / f"{method}.yaml", tree_of(method, tmp_path, models_dir, method))))
        if engine != SHARDED:
            continue
        on = tree_of(method, plain.parent, models_dir, f"{method}-on")  # the data are its checkpoint's
        on["run"]["output_dir"] = str(tmp_path / "runs")
        goes_on = write_config(tmp_path / f"{method}-on.yaml", on)
        configs.append(f"{goes_on}={plain / method / 'checkpoints' / f'step-{MIDDLE:08d}'}")
    launch(engine, WORKER, configs, tmp_path)
    for method in ON[engine]:
        run, expected = tmp_path / "runs" / method, losses_of(plain / method)
        assert result_of(run)["engine"] == engine.rpartition("-")[0]
        assert losses_of(run) == pytest.approx(expected, abs=1e-5), method
        assert result_of(run)["trainable_parameters"] == result_of(plain / method)["trainable_parameters"]
        assert result_of(run)["metrics"] == pytest.approx(result_of(plain / method)["metrics"], abs=1e-6)
        # a checkpoint of one process goes on where everything is sharded, and any engine's own in one process
        if engine == SHARDED:
            assert losses_of(tmp_path / "runs" / f"{method}-on") == pytest.approx(expected[MIDDLE:], abs=1e-5), method
        resumed = tree_of(method, tmp_path, models_dir, f"{method}-alone")
        go(resumed, resume=str(run / "checkpoints" / f"step-{MIDDLE:08d}"))
        assert losses_of(tmp_path / "runs" / f"{method}-alone") == pytest.approx(expected[MIDDLE:], abs=1e-5), method
