"""Passes of a sharded model in which rank 1 alone runs out of memory: ``… scoring_memory.py CONFIG OUT PLACE …``."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tsqlora_scale.common.quiet import prepare_environment
from tsqlora_scale.config.load import load_config
from tsqlora_scale.run import preflight

#: Where it can.
PLACES = (
    "before the pass", "in the forward pass", "after the forward pass", "backward", "before the second pass",
    "in the second pass", "after the pass",
)  # fmt: skip


def main() -> int:
    prepare_environment()
    checked = preflight.check(load_config(sys.argv[1]))
    import torch

    from tests.steps import take_step
    from tsqlora_scale.quality.gradients.sketch import Sketch
    from tsqlora_scale.run.build import build_run

    run = build_run(checked)
    take_step(run)
    run.selector.scorer._parts_folder = None
    scorer, module, world = run.selector.scorer, run.engine.module, run.engine.world
    measurer, losses, sketch = scorer._measurer, scorer._measurer.losses, Sketch.__call__
    layers = [part for name, part in module.named_modules() if name.endswith("layers.1.mlp.up_proj")]
    (layer,) = layers
    state = {"place": None, "size": 0, "raised": 0}

    def fail(place, size):
        if world.rank == 1 and state["place"] == place and size > 2:
            state["raised"] += 1
            raise torch.OutOfMemoryError("injected")

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.size = len(x)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            fail("backward", ctx.size)
            return gradient

    def of_batch(module, batch):
        state["size"] = batch.size
        fail("before the pass" if torch.is_grad_enabled() else "before the second pass", batch.size)
        found = losses(module, batch)
        fail("after the forward pass", batch.size)
        return found

    def of_layer(part, args, output):
        fail("in the forward pass" if torch.is_grad_enabled() else "in the second pass", len(output))
        return Backward.apply(output)

    def of_sketch(self, gradients):
        fail("after the pass", state["size"])
        return sketch(self, gradients)

    measurer.losses, Sketch.__call__ = of_batch, of_sketch
    layer.register_forward_hook(of_layer)
    found = {}
    for place in (None, *sys.argv[3:]):
        state |= {"place": place, "raised": 0}
        scorer.table, scorer.passes = None, 0
        scorer._standardisation.std[:] = 0
        measurer._fits = measurer.one_at_a_time = scorer._kind.kind = None
        measurer.batch_size = None if run.config.scoring.batch_size == "auto" else run.config.scoring.batch_size
        table = scorer.score(module)
        take_step(run)  # training goes on after it; on uniform draws, as the run itself has not scored yet
        found[str(place)] = {
            "raised": world.gather_objects(state["raised"]),
            "fits": world.gather_objects(measurer._fits),
            "batch_size": measurer.batch_size,
            "one_at_a_time": measurer.one_at_a_time,
            "loss": table.loss.tolist(),
            "grad_norm": table.grad_norm.tolist(),
        }
    state |= {"place": "nowhere"}
    if run.is_main:
        Path(sys.argv[2]).write_text(json.dumps({"engine": run.engine.name, "passes": found}))
    run.engine.close()
    import torch.distributed as dist

    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
