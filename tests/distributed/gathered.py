"""What is left of gathered 4-bit weights between a forward and a backward pass: ``… gathered.py CONFIG OUT``."""

import gc
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tsqlora_scale.common.quiet import prepare_environment
from tsqlora_scale.config.load import load_config
from tsqlora_scale.run import preflight


def packed_bytes() -> int:
    """Of storages that tensors of packed 4-bit numbers keep alive, shards aside."""
    import torch

    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and item.dtype == torch.uint8]
    shards = {p.ds_tensor.untyped_storage().data_ptr() for p in tensors if hasattr(p, "ds_tensor")}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in shards)


def main() -> int:
    prepare_environment()
    checked = preflight.check(load_config(sys.argv[1]))
    from tests.steps import take_step
    from tsqlora_scale.run.build import build_run

    run = build_run(checked)
    backward, before, found = run.engine.backward, packed_bytes(), []

    def watched(*args):
        found.append(packed_bytes() - before)
        return backward(*args)

    run.engine.backward = watched
    take_step(run)  # DeepSpeed's first: later it may leave parameters whole until they are used again
    weights = [p for p in run.engine.module.parameters() if p.dtype.is_floating_point is False]
    if run.is_main:
        whole = sum(p.ds_numel for p in weights)
        Path(sys.argv[2]).write_text(json.dumps({"engine": run.engine.name, "whole": whole, "left": found}))
    run.engine.close()
    import torch.distributed as dist

    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
