"""Whether the temporary files of a large pool find room, before anything is computed (:mod:`~.disk_arrays`)."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from pathlib import Path

from tsqlora_scale.common.disk_arrays import IN_MEMORY
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_here, launched_rank
from tsqlora_scale.config.schema import Config

log = logging.getLogger("tsqlora_scale")

#: Bytes that all ranks of a machine together may take unasked.
SMALL_POOL = 2**30
#: Bytes of a sample's row in the table of scores; of its length in the data set and of whether it was seen.
TABLE, ALWAYS = 57, 5
#: File systems that lie in memory.
MEMORY_KINDS = ("tmpfs", "ramfs")


def data_bytes(config: Config, pool_size: int) -> int:
    """What the ids, labels and weights of a sample take in temporary files, at most."""
    weights = 16 if config.task.is_weighted else 0  # beside the text, and in the selector
    ids = 0 if config.task.dataset.id_column else 4 + len(str(pool_size))
    if config.task.mixture:  # ids begin with the set's name, and every row has its number
        ids += 3 + max(len(each.name) for each in config.task.mixture)
    return ids + weights + {"classification": 8, "regression": 4}.get(config.task.type, 0)


def score_bytes(config: Config, pool_size: int) -> int:
    """What the scores of a sample take in temporary files at the fullest moment, of a rank, rounded up.

    Numbers are of 8 bytes, the stratum of 4, members of 1; see the columns that live side by side in
    :meth:`.QualityScorer.score` and :meth:`.QualitySelector.score`.
    """
    sampling, scoring = config.sampling, config.scoring
    kept = sampling.most_kept
    discounted = 8 if sampling.redundancy else 0
    weighted = 8 if config.task.is_weighted else 0  # probabilities times weights
    sampler = 8 * kept if sampling.draws_evenly and not weighted else (32 if sampling.replacement else 16) * kept
    importance = 8 if sampling.weighs_losses else 0
    pool = 32 if weighted else 8  # the even sampler of the warm-up
    scored = 8 * min(1.0, (scoring.max_samples or pool_size) / pool_size)
    first = pool + scored + max(1 + 2 * scored, discounted + 8 + 8 + 1)  # the rounding of terms; log p, keys and S
    refreshed = 8 * kept * scoring.refresh_fraction
    refresh = TABLE + sampler + importance + refreshed + max(1 + 2 * refreshed, discounted + 8)
    # p, which an even sampler does not hold; or what p is within the shares of a mixture, where losses are weighed
    within = sampling.use == "weight" and bool(config.task.mixture)
    beside = 8 * kept if within or (sampling.draws_evenly and not weighted) else 0
    draw = max(28 * kept, sampler + weighted * kept + (8 + 8 * kept if sampling.weighs_losses else 0) + beside)
    stratum = 4 if config.stratifies else 0
    most = max(first, draw, refresh if config.refreshes_scores else 0)
    visits = 4 if config.scores_online else 0
    return TABLE + ALWAYS + stratum + visits + math.ceil(most)


def check_space(config: Config, pool_size: int) -> None:
    """Whether the scores of a pool that is too large for memory find room for temporary files.

    Rank 0 warns where these lie in memory after all.

    Raises:
        UserError: naming TMPDIR.
    """
    if not config.scores_data:
        return
    ranks = launched_here()
    # ids and labels of this rank are there already, those of the others may not be
    needed = pool_size * (score_bytes(config, pool_size) * ranks + data_bytes(config, pool_size) * (ranks - 1))
    if 8 * pool_size > IN_MEMORY and not config.scores_by_proxy:  # of which the proxy's own check has spoken
        warn_of_memory(temporary_folder())
    if needed <= SMALL_POOL:
        return
    folder = temporary_folder()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"TMPDIR={folder!r}: has {free / 1e9:.3g} GB of room, and the scores of {pool_size} samples take "
            f"{needed / 1e9:.3g} GB{f' on the {ranks} ranks here' if ranks > 1 else ''}; set TMPDIR to a folder on a "
            "larger disk, or sampling.selector: full"
        )


def temporary_folder() -> str:
    """Where temporary files go.

    Raises:
        UserError: nowhere.
    """
    try:
        return tempfile.gettempdir()
    except OSError as error:
        raise UserError(f"TMPDIR: {error.strerror or error}; set it to a folder on a disk") from None


def warn_of_memory(folder: str) -> None:
    """Say so where files in ``folder`` take memory."""
    kind = file_system(folder)
    if kind in MEMORY_KINDS and launched_rank() == 0:
        log.warning(
            "TMPDIR=%r lies in memory (%s), and so will the scores of the pool; set TMPDIR to a folder on a disk",
            folder,
            kind,
        )


def file_system(folder: str, mounts: Path = Path("/proc/mounts")) -> str | None:
    """The type of the file system that ``folder`` lies in; None where the system does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    place, found, longest = Path(folder).resolve(), None, -1
    for line in lines:
        _, point, kind = line.split(" ")[:3]
        for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            point = point.replace(code, character)
        if place.is_relative_to(point) and len(point) >= longest:  # of two at one point the later hides the earlier
            found, longest = kind, len(point)
    return found
