"""Resize many times in a row and write down what each rank holds after each: ``… resizing.py CONFIG OUT COUNT``."""

import gc
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.traffic import bytes_sent
from tsqlora_scale.common.quiet import prepare_environment
from tsqlora_scale.config.load import load_config
from tsqlora_scale.run import preflight

#: Ranks that layers take in turn. With 32 inputs a factor is below, at and above a threshold of 128 elements, and most
#: are no multiple of 3 ranks.
RANKS = (1, 7, 2, 4, 5, 3, 6)


def holdings(module) -> dict[str, int]:
    """Counts of everything that a rebuild could leave behind."""
    import torch

    hooks = 0
    for part in module.modules():
        hooks += sum(len(value) for name, value in part.__dict__.items() if name.endswith("_hooks") and value)
        hooks += sum(name in part.__dict__ for name in ("pre_bwd_fn", "post_bwd_fn"))
    for param in module.parameters():
        hooks += len(param._backward_hooks or ()) + len(param._post_accumulate_grad_hooks or ())
    gc.collect()
    # of a DTensor its shard counts; it has no memory of its own
    everything = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    tensors = [item for item in everything if not hasattr(item, "_local_tensor")]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "hooks": hooks,
        "threads": threading.active_count(),
        "system_threads": int(status["Threads"]),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "resident_bytes": int(status["RssAnon"].split()[0]) * 1024,
        "tensors": len(tensors),
        "tensor_bytes": sum(storages.values()),
    }


def main() -> int:
    prepare_environment()
    checked = preflight.check(load_config(sys.argv[1]))
    from tests.steps import take_step
    from tsqlora_scale.ranks import Plan, current_ranks
    from tsqlora_scale.run.build import build_run

    run = build_run(checked)
    plan = Plan(ranks=current_ranks(run.engine.module), phi=1.0, budget=0, sensitivity={}, reasons={})
    lines, losses = [], []
    for number in range(int(sys.argv[3])):
        losses.append(take_step(run))
        ranks = {layer: RANKS[(number + place) % len(RANKS)] for place, layer in enumerate(plan.ranks)}
        sent = bytes_sent()
        run.ranks.carry_out(replace(plan, ranks=ranks), run.engine, run.step)
        sent = bytes_sent() - sent
        lines.append(holdings(run.engine.module) | {"sent_bytes": sent})
    world = run.engine.world
    everyone = world.gather_objects(lines)
    if world.is_main:
        result = {"engine": run.engine.name, "ranks": everyone, "losses": losses}
        Path(sys.argv[2]).write_text(json.dumps(result))
    run.engine.close()
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
