"""Plain-torch truth of every op, slow and short: what the tests compare against, and the specification to read."""

from soundwave_fast.ops.reference.ctc_loss import ctc_loss
from soundwave_fast.ops.reference.linear_ctc_loss import linear_ctc_loss
from soundwave_fast.ops.reference.peak_gather import ctc_peaks, peak_gather
from soundwave_fast.ops.reference.splice import splice
from soundwave_fast.ops.reference.varlen_cross_attention import varlen_cross_attention

__all__ = ["ctc_loss", "ctc_peaks", "linear_ctc_loss", "peak_gather", "splice", "varlen_cross_attention"]
