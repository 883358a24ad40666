"""The request for a plan: checks, the sizes of the data, and then the forecast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.quiet import prepare_environment
from tsqlora_scale.config.schema import Config
from tsqlora_scale.planning.data_sizes import DataSizes

if TYPE_CHECKING:
    from tsqlora_scale.planning.forecast import Forecast


def plan(
    config: Config,
    *,
    devices: int = 1,
    memory: float | None = None,
    tokens_per_second: float | None = None,
    link: float | None = None,
    machine: Literal["gpu", "cpu"] = "gpu",
    pool: int | None = None,
    dev: int | None = None,
) -> Forecast:
    """What a run will need, memory and time, from its config and the model's ``config.json``. Nothing is loaded.

    Args:
        devices: ranks, one on each.
        memory: GiB of one of them; an engine that fits is then proposed, or changes of the config that make one fit.
        tokens_per_second: that all devices train on, the base whole on each; gives hours.
        link: GB that a device receives of others in a second; gives hours under every engine.
        machine: whose kernels compute.
        pool: samples of the pool; without it the data are read.
        dev: held-out rows, beside ``pool``.

    Raises:
        UserError: naming the option, the key, the file, or a model that cannot be described or tried.
    """
    check_machine_size(devices, memory, tokens_per_second)
    if link is not None and not link > 0:
        raise UserError(f"--link {link:g} (link): give the GB that a device receives of others in a second")
    if machine not in ("gpu", "cpu"):
        raise UserError(f"--on {machine!r} (machine): choose 'gpu' or 'cpu'")
    prepare_environment()
    config, sizes = with_sizes(config, pool=pool, dev=dev)
    from tsqlora_scale.planning.forecast import forecast

    return forecast(
        config,
        sizes=sizes,
        devices=devices,
        memory=None if memory is None else int(memory * 2**30),
        tokens_per_second=tokens_per_second,
        link=None if link is None else link * 1e9,
        machine=machine,
    )


def check_machine_size(devices: int, memory: float | None, tokens_per_second: float | None) -> None:
    """What is said of the machine.

    Raises:
        UserError: naming the option.
    """
    if devices < 1:
        raise UserError(f"--devices {devices} (devices): a run has at least one; give their number")
    if memory is not None and not 0 < memory < float("inf"):
        raise UserError(f"--memory {memory:g} (memory): give the GiB of one device")
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise UserError(
            f"--tokens-per-second {tokens_per_second:g} (tokens_per_second): give the tokens that all devices train on"
        )


def with_sizes(config: Config, *, pool: int | None, dev: int | None) -> tuple[Config, DataSizes]:
    """The config with the classes of the data, and the sizes of pool and held-out sets.

    Raises:
        UserError: sizes that are none, or data that cannot be read.
    """
    if pool is not None:
        for name, size, least in (("pool", pool, 1), ("dev", dev or 0, 0)):
            if size < least:
                raise UserError(f"--{name} {size} ({name}): give a number of rows")
        return config, DataSizes(pool, held_out=dev or 0)
    if dev is not None:
        raise UserError(f"--dev {dev} (dev) goes with --pool (pool); without both the data are read")
    from tsqlora_scale.tasks import load_data

    try:
        data = load_data(config.task, seed=config.run.seed)
    except UserError as error:
        raise UserError(f"{error}; or give --pool N (pool), and no data are read") from None
    held_out = [data.dev, *data.more_dev.values()]
    whole = len(data.pool(with_query=config.task.train_on_query))
    judged = sum(len(rows) for rows in held_out if rows is not None)
    return config.with_labels(data.labels), DataSizes(whole, query=whole - len(data.train), held_out=judged)
