"""A random projection of per-sample gradients that keeps inner products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tsqlora_scale.common.random_streams import philox


class _Layout(NamedTuple):
    signs: Tensor  # (rows, columns), +-1, float32; of the most rows that have been asked for
    block: int  # columns of a row that stay together, at most the sketch's width
    pitch: int  # distance of two blocks in the folded buffer, coprime with the sketch's width
    offset: int  # where the factor's first entry lands


class Sketch:
    """Count sketch of the concatenated gradient: every entry goes, with a random sign, to one of ``dim`` slots.

    Inner products are unbiased over seeds, for the signs are independent; their standard deviation is about
    ``|x| |y| / sqrt(dim)``, and so the error of a cosine about ``1 / sqrt(dim)`` (0.044 for 512).

    A factor's rows (its shorter side, the rank) are cut into blocks of at most ``dim`` columns. The slot of column
    ``j`` of block ``b`` is ``offset + b * pitch + j (mod dim)``, with offset and pitch random per factor and pitch
    coprime with ``dim``. One column of different rows never shares a slot (below ``dim`` blocks), so the few input
    channels that dominate a transformer's gradients do not pile up, as they do in plain folding; and it is computed
    by a multiplication into a strided buffer and one sum, without scatter, gather or atomics. Measured on one CPU
    thread, 32 samples, 332k parameters, dim 512: this 7 ms, ``index_add_`` 9 ms (and not deterministic on GPUs),
    sparse CSR product 16 ms, permute and fold 18 ms; plain folding 4 ms.

    Everything is a function of (seed, parameter name, row, column), on every rank and device; no ``P x dim`` matrix
    exists. Signs take the memory of one float32 copy of theta, of the most rows that every factor has had.
    """

    def __init__(self, dim: int, *, seed: int) -> None:
        self.dim = dim
        self.seed = seed
        self._layouts: dict[tuple[str, int, torch.device], _Layout] = {}

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Gradients by parameter name, each (B, ...), to sketches (B, dim) float32. Absent parameters count as zero."""
        assert gradients, "nothing to sketch"
        first = next(iter(gradients.values()))
        sketch = torch.zeros(len(first), self.dim, device=first.device)
        for name in sorted(gradients):
            self.add(sketch, name, gradients[name])
        return sketch

    def add(self, sketch: Tensor, name: str, gradient: Tensor) -> None:
        """Add the part of one parameter, whose gradient is (B, ...), to sketches (B, dim), in place."""
        if gradient.dim() == 2:  # a bias
            gradient = gradient.unsqueeze(1)
        elif gradient.shape[1] > gradient.shape[2]:
            gradient = gradient.transpose(1, 2)
        batch, rows, columns = gradient.shape
        signs, block, pitch, offset = self._layout(name, rows, columns, gradient.device)
        blocks = math.ceil(columns / block)
        turns = math.ceil(rows * blocks * pitch / self.dim)
        buffer = torch.zeros(batch, turns * self.dim, device=gradient.device)
        slots = buffer[:, : rows * blocks * pitch].view(batch, rows, blocks, pitch)
        full = columns // block * block
        whole, signs_whole = gradient[..., :full].unflatten(2, (-1, block)), signs[:, :full].unflatten(1, (-1, block))
        torch.mul(whole, signs_whole, out=slots[:, :, : columns // block, :block])
        if full < columns:
            torch.mul(gradient[..., full:], signs[:, full:], out=slots[:, :, -1, : columns - full])
        sketch += buffer.view(batch, turns, self.dim).sum(1).roll(offset, 1)

    def _layout(self, name: str, rows: int, columns: int, device: torch.device) -> _Layout:
        key = (name, columns, device)
        known = self._layouts.get(key)
        if known is None or len(known.signs) < rows:
            generator = philox(self.seed, f"sketch/{name}")
            offset = int(generator.random() * self.dim)
            residues = [i for i in range(self.dim) if math.gcd(i, self.dim) == 1]
            residue = residues[int(generator.random() * len(residues))]
            block = math.ceil(columns / math.ceil(columns / self.dim))
            pitch = block + (residue - block) % self.dim
            signs = self.signs(name, rows, columns).to(device)
            known = self._layouts[key] = _Layout(signs, block, pitch, offset)
        return known._replace(signs=known.signs[:rows])

    def signs(self, name: str, rows: int, columns: int) -> Tensor:
        """Random signs of a parameter's entries, (rows, columns) float32."""
        # row by row, so that a factor that grows keeps the signs of its present rows
        width = -(-columns // 8)
        packed = np.frombuffer(philox(self.seed, f"sketch/{name}", 1).bytes(rows * width), np.uint8)
        bits = np.unpackbits(packed.reshape(rows, width), axis=1)[:, :columns]
        return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


def cosines(sketches: Tensor, direction: Tensor) -> Tensor:
    """Cosines (B,) float64 of sketches (B, dim) with one direction (dim,); 0 where either is zero, NaN stays NaN."""
    direction = direction.double()
    products = sketches.double() @ direction
    lengths = torch.linalg.vector_norm(sketches.double(), dim=1) * torch.linalg.vector_norm(direction)
    return torch.where(lengths > 0, products / lengths.clamp_min(torch.finfo(torch.float64).tiny), 0 * products)
