"""peak_gather: keep one frame of every run of equal CTC tokens, packed over the batch.

Shape legend: B utterances, T frames, D width, N packed rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from soundwave_fast.ops.backend import implementation, refuse_dtensor, shortcut
from soundwave_fast.packed import Packed

_CAPACITY_STEP = 256
_SCORES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ctc_peaks(
    tokens: Tensor,  # (B, T) integers, e.g. the argmax of the CTC head
    lengths: Tensor | Sequence[int] | None = None,  # (B,); None: T everywhere
    blank: int | None = None,
    drop_blank: bool = False,
    select: str = "first",
    scores: Tensor | None = None,  # (B, T), for select="peak"
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Flat positions b * T + t of the kept frames, (capacity,) int64 filled up with -1, and cu_seqlens (B + 1,) int32.

    Among the first lengths[b] frames, t is kept iff t == 0 or tokens[b, t] != tokens[b, t - 1] (Soundwave,
    section 2.3; its released code also keeps frames of the padding, this does not). select="peak" keeps, of each
    such run, the frame with the highest score instead of the first (the earlier one on a tie, NaN below all).
    drop_blank drops runs of `blank`, judged on the raw sequence: "a blank a" keeps two frames. An utterance with
    frames but nothing to keep keeps its frame 0; one of length 0 keeps nothing.

    Shapes depend on B, T and capacity alone (default: B * T rounded up to 256) and nothing waits for an accelerator,
    so it can stand in a CUDA graph. There, peaks beyond a capacity that is too small are lost and cu_seqlens[-1] >
    capacity says so; lengths outside 0..T count as the nearer of the two.

    Raises ValueError for shapes, lengths outside 0..T or a capacity that is too small (values are checked on the CPU,
    under torch.compile too), TypeError for tokens that are not integers, scores that are not floating point and
    DTensors.
    """
    lengths_B = _check("ctc_peaks", tokens, lengths, blank, drop_blank, select, scores)
    if capacity is None:
        capacity = -(-tokens.numel() // _CAPACITY_STEP) * _CAPACITY_STEP
    elif capacity < 0:
        raise ValueError(f"capacity must not be negative, got {capacity}")
    return _find_peaks(tokens, lengths_B, blank, drop_blank, scores if select == "peak" else None, capacity)


def peak_gather(
    features: Tensor,  # (B, T, D)
    tokens: Tensor,  # (B, T)
    lengths: Tensor | Sequence[int] | None = None,  # (B,)
    blank: int | None = None,
    drop_blank: bool = False,
    *,
    select: str = "first",
    scores: Tensor | None = None,  # (B, T)
    capacity: int | None = None,
) -> Packed:
    """The rows of features that `ctc_peaks` keeps, as a Packed of data (total, D) with `index` (total,) int64.

    By default the number of rows is exact: the peak counts are copied to the host (`Packed.host_lengths` keeps them),
    the one place where this waits for an accelerator. With `capacity` nothing waits: data is (capacity, D), rows past
    cu_seqlens[-1] are 0, index is -1 there, and max_len is T. On an accelerator, peaks beyond a capacity that is too
    small are lost: cu_seqlens stops at the capacity, lengths do not, and `Packed.overflowed()` tells.

    Differentiable through features: backward writes every row once, kept rows their gradient and others 0.
    Errors as in ctc_peaks, and ValueError when features do not go with tokens.
    """
    refuse_dtensor("peak_gather", features=features, tokens=tokens)
    if features.dim() != 3 or features.shape[:2] != tokens.shape:
        raise ValueError(f"features must be (B, T, D) with (B, T) = {tuple(tokens.shape)}, got {tuple(features.shape)}")
    if features.device != tokens.device:
        raise ValueError(f"features must be on tokens' device {tokens.device}, got {features.device}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must not be negative, got {capacity}")
    lengths_B = _check("peak_gather", tokens, lengths, blank, drop_blank, select, scores)
    scores = scores.detach() if select == "peak" else None
    data, index, cu_seqlens, counts, longest, host = _gather(
        features, tokens, lengths_B, blank, drop_blank, scores, capacity
    )
    host = host if _reads_counts(tokens, capacity) else None
    return Packed.unchecked(data, cu_seqlens, counts, longest.shape[0], index, host)


def _reads_counts(tokens: Tensor, capacity: int | None) -> bool:
    """Whether peak_gather copies the counts to the host from somewhere else."""
    return capacity is None and tokens.device.type != "cpu"


def _check(
    op: str,
    tokens: Tensor,
    lengths: Tensor | Sequence[int] | None,
    blank: int | None,
    drop_blank: bool,
    select: str,
    scores: Tensor | None,
) -> Tensor | None:
    """Raises what the public ops promise; lengths as a tensor on tokens' device, or None."""
    refuse_dtensor(op, tokens=tokens, lengths=lengths, scores=scores)
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be (B, T), got {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if drop_blank and blank is None:
        raise ValueError("blank must be given with drop_blank")
    if select not in ("first", "peak"):
        raise ValueError(f"select must be 'first' or 'peak', got {select!r}")
    if select == "peak":
        if scores is None or scores.shape != tokens.shape or scores.device != tokens.device:
            got = None if scores is None else f"{tuple(scores.shape)} on {scores.device}"
            raise ValueError(f"scores must be {tuple(tokens.shape)} on {tokens.device} with select='peak', got {got}")
        if scores.dtype not in _SCORES:
            raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if lengths is None:
        return None
    lengths_B = torch.as_tensor(lengths)
    if not isinstance(lengths, Tensor) and not len(lengths):
        lengths_B = lengths_B.long()  # torch takes an empty list for floating point
    if lengths_B.shape != tokens.shape[:1]:
        raise ValueError(f"lengths must be ({tokens.shape[0]},), got {tuple(lengths_B.shape)}")
    if lengths_B.is_floating_point() or lengths_B.is_complex() or lengths_B.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths_B.dtype}")
    if lengths_B.device.type == "cpu" and tokens.device.type != "cpu":
        if not torch.compiler.is_compiling():
            _check_lengths(lengths_B, tokens.shape[1])
        return lengths_B.to(tokens.device, non_blocking=True)  # waits for nothing: the source is staged
    return lengths_B.to(tokens.device)


def _check_lengths(lengths_B: Tensor | None, frames: int) -> None:
    """Raises ValueError for values out of range; on an accelerator they are not read."""
    if lengths_B is None or lengths_B.device.type != "cpu":
        return
    host = lengths_B.tolist()
    if host and not (0 <= min(host) and max(host) <= frames):
        raise ValueError(f"lengths must lie in 0..{frames}, got {host}")


def _check_capacity(counts_B: Tensor, capacity: int) -> None:
    if counts_B.device.type == "cpu" and (kept := sum(counts_B.tolist())) > capacity:
        raise ValueError(f"capacity is {capacity}, but {kept} frames are kept")


@torch.library.custom_op("soundwave_fast::ctc_peaks", mutates_args=())
def _ctc_peaks(
    tokens: Tensor,
    lengths: Tensor | None,
    blank: int | None,
    drop_blank: bool,
    scores: Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    _check_lengths(lengths, tokens.shape[1])
    ops = implementation("peak_gather", tokens)
    kept, counts = ops.scan_peaks(tokens, lengths, blank, drop_blank, scores)
    _check_capacity(counts, capacity)
    return ops.gather_peaks(None, kept, counts, tokens.shape[1], capacity)[1:]


@_ctc_peaks.register_fake
def _(tokens, lengths, blank, drop_blank, scores, capacity):
    return tokens.new_empty(capacity, dtype=torch.int64), tokens.new_empty(tokens.shape[0] + 1, dtype=torch.int32)


@torch.library.custom_op("soundwave_fast::peak_gather", mutates_args=())
def _peak_gather(
    features: Tensor,
    tokens: Tensor,
    lengths: Tensor | None,
    blank: int | None,
    drop_blank: bool,
    scores: Tensor | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, index, cu_seqlens, counts, an empty tensor as long as the longest utterance can be, and the counts once
    more, on the host, if they had to be copied there (else empty).
    """
    T = tokens.shape[1]
    _check_lengths(lengths, T)
    ops = implementation("peak_gather", tokens)
    kept, counts = ops.scan_peaks(tokens, lengths, blank, drop_blank, scores)
    longest, host = T, torch.empty(0, dtype=torch.int32)
    if _reads_counts(tokens, capacity):
        host = counts.cpu()  # the one copy to the host: what follows needs the number of rows
    if capacity is None:
        kept_B = (host if len(host) else counts).tolist()
        capacity, longest = sum(kept_B), max(kept_B, default=0)
    else:
        _check_capacity(counts, capacity)
    rows, index, cu_seqlens = ops.gather_peaks(features, kept, counts, T, capacity)
    return rows, index, cu_seqlens, counts, torch.empty(longest, 0), host


@_peak_gather.register_fake
def _(features, tokens, lengths, blank, drop_blank, scores, capacity):
    B, T = tokens.shape
    longest, host = T, torch.empty(B if _reads_counts(tokens, capacity) else 0, dtype=torch.int32)
    if capacity is None:
        context = torch.library.get_ctx()
        capacity, longest = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        features.new_empty(capacity, features.shape[2]),
        tokens.new_empty(capacity, dtype=torch.int64),
        tokens.new_empty(B + 1, dtype=torch.int32),
        tokens.new_empty(B, dtype=torch.int32),
        torch.empty(longest, 0),
        host,
    )


@torch.library.custom_op("soundwave_fast::peak_gather_backward", mutates_args=())
def _peak_gather_backward(grad: Tensor, index: Tensor, cu_seqlens: Tensor, batch: int, frames: int) -> Tensor:
    return implementation("peak_gather", grad).gather_peaks_backward(grad, index, cu_seqlens, batch, frames)


@_peak_gather_backward.register_fake
def _(grad, index, cu_seqlens, batch, frames):
    return grad.new_empty(batch, frames, grad.shape[1])


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # or zeros would be made for every output that is not differentiable
    ctx.save_for_backward(output[1], output[2])
    ctx.frames = inputs[1].shape
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    out = None
    if grad is not None and ctx.needs_input_grad[0]:
        out = _scatter(grad, *ctx.saved_tensors, *ctx.frames)
    return out, None, None, None, None, None, None


_peak_gather.register_autograd(_backward, setup_context=_save)
_find_peaks = shortcut(_ctc_peaks)
_gather = shortcut(_peak_gather, _save, _backward, native=True)
_scatter = shortcut(_peak_gather_backward)
