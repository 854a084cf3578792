"""Triton kernels of splice: two launches forward, one for each side that needs a gradient backward."""

from csrc_triton.splice.backward import splice_audio_backward, splice_text_backward
from csrc_triton.splice.forward import plan_splice, splice_rows
