"""Public functional ops of soundwave_fast; importing them needs torch and numpy alone."""

from soundwave_fast.ops.ctc_loss import ctc_loss
from soundwave_fast.ops.linear_argmax import linear_argmax
from soundwave_fast.ops.linear_ctc_loss import linear_ctc_loss
from soundwave_fast.ops.modules import CTCLoss, LinearCTCLoss
from soundwave_fast.ops.peak_gather import ctc_peaks, peak_gather
from soundwave_fast.ops.peak_times import PeakTimes, peak_times
from soundwave_fast.ops.prompt_counts import PromptCounts
from soundwave_fast.ops.splice import Spliced, splice
from soundwave_fast.ops.varlen_cross_attention import varlen_cross_attention
from soundwave_fast.packed import Packed

__all__ = [
    "CTCLoss",
    "LinearCTCLoss",
    "Packed",
    "PeakTimes",
    "PromptCounts",
    "Spliced",
    "ctc_loss",
    "ctc_peaks",
    "linear_argmax",
    "linear_ctc_loss",
    "peak_gather",
    "peak_times",
    "splice",
    "varlen_cross_attention",
]
