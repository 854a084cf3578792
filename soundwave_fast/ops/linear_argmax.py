"""linear_argmax: the best class of every frame and its log-probability, without the (B, T, V) logits.

Shape legend: B utterances, T frames, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soundwave_fast.ops.backend import refuse_dtensor
from soundwave_fast.ops.compact import Lengths, compact_targets, lengths_tensor
from soundwave_fast.ops.linear_ctc_parts import Frames, Head, checked_head
from soundwave_fast.ops.linear_ctc_passes import best_classes


def linear_argmax(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    input_lengths: Lengths | None = None,  # (B,) tensor, list or tuple; None: all frames count
    blank: int = 0,
    *,
    blank_row: Tensor | None = None,  # (D,)
) -> tuple[Tensor, Tensor]:
    """`log_softmax(hidden @ weight.T).max(-1)`: what greedy CTC decoding and `peak_gather` need of a CTC head.

    Returns the class, (B, T) int64, the lowest among equals, and its log-probability, (B, T) float32 (float64 for
    float64 input). Past a length they are `blank` and 0. The classes are those that `linear_ctc_loss` returns with
    return_argmax; with blank_row the blank is class V, scored by that row, and blank must be V.

    One GEMM over the vocabulary in chunks, each read once more. Lengths on the host (a list, a CPU tensor) also save
    the work on what lies past them. Nothing waits for an accelerator. Under autocast hidden is cast to its dtype, and
    weight always to hidden's, a chunk at a time. Not differentiable: the results need no gradient. A frame of NaN gets
    NaN and some class.

    Raises ValueError for shapes that disagree, lengths out of range (not looked at on an accelerator) and a blank that
    is no class; TypeError for dtypes, and for a DTensor.
    """
    refuse_dtensor("linear_argmax", hidden=hidden, weight=weight, blank_row=blank_row)
    hidden, blank_row = checked_head(hidden, weight, blank_row, blank, one_dtype=False)
    input_lengths = None if input_lengths is None else lengths_tensor(input_lengths)
    with torch.no_grad():
        return _best(hidden, weight, blank_row, input_lengths, blank)


@torch.library.custom_op("soundwave_fast::linear_argmax", mutates_args=())
def _best(
    hidden: Tensor, weight: Tensor, blank_row: Tensor | None, input_lengths: Tensor | None, blank: int
) -> tuple[Tensor, Tensor]:
    B, T, _ = hidden.shape
    with torch.autocast(hidden.device.type, enabled=False):
        lengths = torch.full((B,), T, dtype=torch.int64) if input_lengths is None else input_lengths
        nothing = torch.zeros(B, 0, dtype=torch.int64, device=hidden.device)
        compact = compact_targets(nothing, lengths, nothing.sum(1), B, T, len(weight), blank, hidden.device)
        frames = Frames.of(hidden, compact, lengths)
        class_N, log_prob_N = best_classes(frames, Head(weight, blank_row, blank))
        if frames.valid_N is not None:
            class_N.masked_fill_(~frames.valid_N, blank)
            log_prob_N.masked_fill_(~frames.valid_N, 0.0)
        return frames.put_back(class_N, blank), frames.put_back(log_prob_N, 0.0)


@_best.register_fake
def _(hidden, weight, blank_row, input_lengths, blank):
    shape = hidden.shape[:2]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=dtype)
