"""How a GPU computes: fast or the same every time, with all bits of float32 or with TF32's."""

from __future__ import annotations

import os
import warnings

import torch

#: What cuBLAS needs to be deterministic; the 32 MiB are what it takes on an H100 anyway.
CUBLAS_WORKSPACE = ":4096:8"
#: Unit roundoff of TF32, which has 10 bits of mantissa.
TF32_EPS = 2.0**-10


class _Switched:
    """Whether the process has been made deterministic by us, and not by who has started it."""

    on = False


def set_arithmetic(*, deterministic: bool, tf32: bool) -> None:
    """Choose the kernels of this process, until they are chosen anew. Before the first product on a GPU.

    Args:
        deterministic: the same bits in every run on the same kind and number of GPUs; an operation that has no such
            kernel raises. bitsandbytes' kernels are not asked.
        tf32: round the factors of float32 products to 10 bits of mantissa; sums stay float32. A CPU does not know it.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    if deterministic or _Switched.on:
        torch.use_deterministic_algorithms(deterministic)
        # else torch.empty is filled with NaN, which costs time and is for those who look for reads of it
        torch.utils.deterministic.fill_uninitialized_memory = not deterministic  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic = deterministic
        _Switched.on = deterministic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases have other names for it, and older ones these alone
        tf32 = tf32 and torch.cuda.is_available()
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32  # torch's own default is on for convolutions, off for products


def unit_roundoff(dtype: torch.dtype) -> float:
    """How far a product of this type may be off, relative to its factors."""
    if dtype == torch.float32:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if torch.backends.cuda.matmul.allow_tf32:
                return TF32_EPS
    return float(torch.finfo(dtype).eps)
