"""The one ragged type: rows of several sequences laid end to end, with the offsets that separate them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """B sequences of different lengths in one tensor, sequence b being `data[cu_seqlens[b]:cu_seqlens[b + 1]]`.

    data:       (total, ...) rows, in order; gradients flow through it. Rows past cu_seqlens[-1] belong to nobody: a
                buffer whose size was fixed before the lengths were known has some, filled with 0.
    cu_seqlens: (B + 1,) int32 offsets, from 0, on data's device (flash-attn's varlen layout).
    lengths:    (B,) int32 or int64, equal to cu_seqlens.diff() unless `overflowed`.
    max_len:    the longest length, or a bound on it where the host does not know; an int.
    index:      None, or (total,) the flat position b * T + t each row was taken from, -1 for rows of nobody.
    host_lengths: None, or a copy of lengths on the CPU, where data is elsewhere and the host knows them nevertheless.

    Raises TypeError / ValueError naming the field that does not fit. Offsets that live on an accelerator are not
    read back, so only their shapes are checked there (and under torch.compile).
    """

    data: Tensor  # (total, ...)
    cu_seqlens: Tensor  # (B + 1,)
    lengths: Tensor  # (B,)
    max_len: int
    index: Tensor | None = None  # (total,)
    host_lengths: Tensor | None = None  # (B,)

    def __post_init__(self) -> None:
        if self.data.dim() < 1:
            raise ValueError("data must have at least one dimension, (total, ...)")
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() < 1:
            raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(self.cu_seqlens.shape)}")
        if self.cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens must be int32, got {self.cu_seqlens.dtype}")
        if self.lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths must be int32 or int64, got {self.lengths.dtype}")
        if self.lengths.shape != (self.cu_seqlens.numel() - 1,):
            raise ValueError(
                f"lengths must have shape ({self.cu_seqlens.numel() - 1},) to go with cu_seqlens, "
                f"got {tuple(self.lengths.shape)}"
            )
        if self.index is not None and self.index.shape != self.data.shape[:1]:
            raise ValueError(f"index must have shape ({self.data.shape[0]},), got {tuple(self.index.shape)}")
        if self.host_lengths is not None:
            if self.host_lengths.device.type != "cpu" or self.host_lengths.shape != self.lengths.shape:
                given = f"{tuple(self.host_lengths.shape)} on {self.host_lengths.device}"
                raise ValueError(f"host_lengths must be {tuple(self.lengths.shape)} on the CPU, got {given}")
        for name, x in (("cu_seqlens", self.cu_seqlens), ("lengths", self.lengths), ("index", self.index)):
            if x is not None and x.device != self.data.device:
                raise ValueError(f"{name} must be on data's device {self.data.device}, got {x.device}")
        on_host = self.cu_seqlens.device.type == "cpu" and self.lengths.device.type == "cpu"
        if on_host and not torch.compiler.is_compiling():
            self._check_values()

    @classmethod
    def unchecked(cls, *fields: Any) -> Packed:
        """Packed(*fields) from an op that vouches for them; looking at them takes as long as a small op."""
        if torch.compiler.is_compiling():
            return cls(*fields)
        packed = object.__new__(cls)
        packed.__dict__.update(zip(cls.__dataclass_fields__, fields, strict=True))
        return packed

    def _check_values(self) -> None:
        offsets, lengths = self.cu_seqlens.tolist(), self.lengths.tolist()
        if offsets[0] != 0 or offsets[-1] > self.data.shape[0]:
            raise ValueError(
                f"cu_seqlens must run from 0 and stay in data's {self.data.shape[0]} rows, "
                f"got {offsets[0]} to {offsets[-1]}"
            )
        if any(end - start != n or n < 0 for (start, end), n in zip(pairwise(offsets), lengths)):
            raise ValueError("lengths must be the non-negative differences of cu_seqlens")
        if self.max_len < max(lengths, default=0):
            raise ValueError(f"max_len is {self.max_len}, but the longest of lengths is {max(lengths)}")

    def __len__(self) -> int:
        return self.lengths.numel()

    @property
    def total(self) -> int:
        """Number of rows of data, those of nobody included."""
        return self.data.shape[0]

    @classmethod
    def from_list(cls, sequences: Sequence[Tensor]) -> Packed:
        """Pack B tensors (n_b, ...) that agree in everything but their length; at least one is needed."""
        if len(sequences) == 0:
            raise ValueError("sequences must hold at least one tensor: an empty list has no row shape or dtype")
        first = sequences[0]
        for i, x in enumerate(sequences):
            if x.dim() < 1 or x.shape[1:] != first.shape[1:] or x.dtype != first.dtype or x.device != first.device:
                raise ValueError(
                    f"sequences[{i}] has shape {tuple(x.shape)}, {x.dtype}, {x.device}; sequences[0] has "
                    f"{tuple(first.shape)}, {first.dtype}, {first.device}: only the length may differ"
                )
        lengths = [x.shape[0] for x in sequences]
        return cls._from_lengths(torch.cat(list(sequences)), lengths)

    @classmethod
    def from_padded(
        cls, x: Tensor, lengths: Tensor | Sequence[int], total: int | None = None, max_len: int | None = None
    ) -> Packed:
        """Pack the first lengths[b] rows of each x[b]; x is (B, T, ...), padded on the right. `index` is filled in.

        Lengths on an accelerator are copied to the host once, unless both `total`, the number of rows of data, and
        `max_len` are given: bounds will do, rows of nobody are 0, and whatever a total too small leaves out is
        `overflowed`.

        Raises ValueError when a length lies outside 0..T or they add up to more than total (where they can be read).
        """
        if x.dim() < 2:
            raise ValueError(f"x must be padded, (B, T, ...), got {tuple(x.shape)}")
        B, T = x.shape[:2]
        if not isinstance(lengths, Tensor):
            lengths = torch.tensor(lengths, dtype=torch.int64)
        if lengths.shape != (B,):
            raise ValueError(f"lengths must be {B} numbers in 0..{T}, got {tuple(lengths.shape)}")
        bounded = total is not None and max_len is not None
        if not bounded or (lengths.device.type == "cpu" and not torch.compiler.is_compiling()):
            host = lengths.tolist()
            if any(not 0 <= n <= T for n in host):
                raise ValueError(f"lengths must be {B} numbers in 0..{T}, got {host}")
            total = sum(host) if total is None else total
            max_len = max(host, default=0) if max_len is None else max_len
            if total < sum(host):
                raise ValueError(f"total is {total}, but lengths add up to {sum(host)}")
        lengths_B = lengths.to(x.device, torch.int32, non_blocking=True).clamp(0, T)
        cu_seqlens = F.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0)).clamp(max=total)
        row = torch.arange(total, dtype=torch.int32, device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:], row, right=True)
        nobody = row >= cu_seqlens[-1]
        flat = torch.where(nobody, 0, sequence * T + row - cu_seqlens[sequence])
        data = x.reshape(B * T, *x.shape[2:]).index_select(0, flat) if B * T else x.new_zeros(total, *x.shape[2:])
        if bounded:
            data = data.masked_fill(nobody.view(-1, *[1] * (x.dim() - 2)), 0)
        return cls(data, cu_seqlens, lengths_B, max_len, torch.where(nobody, -1, flat))

    @classmethod
    def _from_lengths(cls, data: Tensor, lengths: list[int]) -> Packed:
        lengths_B = torch.tensor(lengths, dtype=torch.int32)
        cu_seqlens = F.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0))
        device = data.device
        return cls(
            data,
            cu_seqlens.to(device, non_blocking=True),
            lengths_B.to(device, non_blocking=True),
            max(lengths, default=0),
            host_lengths=None if device.type == "cpu" else lengths_B,
        )

    def with_data(self, data: Tensor) -> Packed:
        """The same offsets over other rows, (total, ...)."""
        if data.shape[0] != self.total:
            raise ValueError(f"data must have {self.total} rows, got {data.shape[0]}")
        return dataclasses.replace(self, data=data)

    def to(self, *args, **kwargs) -> Packed:
        """`data.to(...)`, with the offsets following it to its device but keeping their integer dtypes."""
        data = self.data.to(*args, **kwargs)
        index = None if self.index is None else self.index.to(data.device)
        cu_seqlens, lengths = self.cu_seqlens.to(data.device), self.lengths.to(data.device)
        host = None if data.device.type == "cpu" else self.known_lengths()
        return Packed(data, cu_seqlens, lengths, self.max_len, index, host)

    def known_lengths(self) -> Tensor | None:
        """lengths on the CPU, if they are known there; None where reading them would wait for an accelerator."""
        return self.lengths if self.lengths.device.type == "cpu" else self.host_lengths

    def overflowed(self) -> Tensor:
        """() bool on data's device: whether a buffer was too small for all rows. No host sync."""
        return self.lengths.sum() > self.cu_seqlens[-1]

    def segment_ids(self) -> Tensor:
        """(total,) int64: the sequence each row belongs to, B for rows of nobody. No host sync."""
        row = torch.arange(self.total, dtype=torch.int32, device=self.data.device)
        return torch.searchsorted(self.cu_seqlens[1:], row, right=True)

    def positions(self) -> Tensor:
        """(total,) int64: the place of each row within its own sequence, from 0. No host sync."""
        return torch.arange(self.total, device=self.data.device) - self.cu_seqlens[self.segment_ids()]

    def mask(self, side: str = "right") -> Tensor:
        """(B, max_len) bool: True where `to_padded` puts a row."""
        self._check_side(side)
        slot = torch.arange(self.max_len, device=self.data.device)
        return (slot if side == "right" else self.max_len - 1 - slot) < self.cu_seqlens.diff()[:, None]

    def to_padded(self, value: float = 0.0, side: str = "right") -> Tensor:
        """(B, max_len, ...): the rows of each sequence, filled up with `value` on `side` ("right" or "left").

        No host sync.
        """
        self._check_side(side)
        B, L = len(self), self.max_len
        segment = self.segment_ids()
        slot = segment * L + torch.arange(self.total, device=self.data.device) - self.cu_seqlens[segment]
        if side == "left":
            slot = slot + (L - F.pad(self.cu_seqlens.diff(), (0, 1)))[segment]
        slot = slot.where(segment < B, B * L)  # the last slot is thrown away
        out = self.data.new_full((B * L + 1, *self.data.shape[1:]), value)
        return out.index_copy(0, slot, self.data)[:-1].view(B, L, *self.data.shape[1:])

    unpad = to_padded  # flash-attn users look for this pair of names

    def unbind(self) -> list[Tensor]:
        """B tensors (n_b, ...), views of data. Copies the lengths to the host, unless they are known there."""
        known = self.known_lengths()
        lengths = (self.cu_seqlens.diff() if known is None else known).tolist()
        return list(self.data[: sum(lengths)].split(lengths))

    @staticmethod
    def _check_side(side: str) -> None:
        if side not in ("right", "left"):
            raise ValueError(f"side must be 'right' or 'left', got {side!r}")


def pack(x: Tensor | Sequence[Tensor], lengths: Tensor | Sequence[int] | None = None) -> Packed:
    """`Packed.from_list(x)` for a list of (n_b, ...); `Packed.from_padded(x, lengths)` for a padded (B, T, ...)."""
    if isinstance(x, Tensor):
        if lengths is None:
            raise ValueError("lengths is needed to pack a padded tensor")
        return Packed.from_padded(x, lengths)
    if lengths is not None:
        raise ValueError("lengths must be None when x is a list: each tensor has its own length")
    return Packed.from_list(x)
