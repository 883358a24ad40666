"""Faults that raise nothing by themselves, put into one engine one after another: ``… injected.py CONFIG OUT``."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tsqlora_scale.common.quiet import prepare_environment
from tsqlora_scale.config.load import load_config
from tsqlora_scale.run import preflight


def caught(work) -> str:
    """What the ranks say of each other."""
    from tsqlora_scale.engine.replicas import ReplicasDiffer

    try:
        work()
    except ReplicasDiffer as error:
        return str(error)
    return "nothing"


def used(engine, name: str):
    """What this rank computes with: its shard under ZeRO-3."""
    param = dict(engine.module.named_parameters())[name]
    return (param.ds_tensor if engine.name == "zero3" else param).data


def forget(*_args) -> None:
    """Restore nothing."""


def main() -> int:
    prepare_environment()
    checked = preflight.check(load_config(sys.argv[1]))
    from peft import LoraConfig

    from tests.steps import take_step
    from tsqlora_scale.engine import ddp, fsdp, zero_internals
    from tsqlora_scale.engine.engine import start_engine
    from tsqlora_scale.run.build import build_run

    run = build_run(checked)
    for _ in range(3):
        take_step(run)
    engine, world = run.engine, run.engine.world
    names = list(engine.gather().params)
    found = {"names": names, "engine": engine.name, "whole": caught(run.save_checkpoint)}

    # one rank's part of a factor is another
    before = used(engine, names[3]).clone()
    used(engine, names[3]).add_(0.5 * world.rank)
    found["value"] = caught(run.save_checkpoint)
    used(engine, names[3]).copy_(before)
    found["healed"] = caught(run.save_checkpoint)

    # an adapter that is attached after the engine has sharded its model
    model = engine.module
    model.base_model.peft_config["late"] = LoraConfig(r=2, target_modules=["query"])
    model.base_model.inject_adapter(model.base_model.model, "late")
    model.base_model.set_adapter(["default", "late"])
    found["attached"] = caught(run.save_checkpoint)
    model.base_model.set_adapter("default")
    model.base_model.delete_adapter("late")
    found["detached"] = caught(run.save_checkpoint)

    # one rank's part of a checkpoint: it was given less than the others, or has restored less than it was given
    state = engine.gather()
    originals = ddp.restore_moments, zero_internals._set_moment
    if world.rank == 1:
        ddp.restore_moments = fsdp.restore_moments = zero_internals._set_moment = forget
    found["event"] = caught(lambda: engine.rebuild(lambda _, state: state))
    ddp.restore_moments = fsdp.restore_moments = originals[0]
    zero_internals._set_moment = originals[1]
    engine.close()
    if world.rank == 1:
        for entry in list(state.params.values())[:2]:
            entry.exp_avg.zero_()
    options = {"train": checked.config.train, "micro_batch_size": checked.plan.micro_batch_size}
    found["resume"] = caught(lambda: start_engine(engine.accelerator, model, **options, state=state))
    everyone = world.gather_objects(found)
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(everyone), encoding="utf-8")
    import torch.distributed as dist

    dist.barrier()
    from tsqlora_scale.common.failures import leave_group

    leave_group(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
