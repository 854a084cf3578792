"""PromptCounts: what the host must know of the prompts for splice, fetched while the audio side computes.

Shape legend: B prompts, L text positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soundwave_fast.ops.splice import check_prompts, check_values
from soundwave_fast.packed import Packed

_IGNORE = -100


class PromptCounts:
    """Text tokens, placeholders and labels of each prompt, on their way to the host without anybody waiting.

    The length of a spliced batch is text plus audio. The audio's share comes to the host when `peak_gather` waits for
    its counts. Made before the audio side runs, this has the text's there by then, so that

        counts = PromptCounts(placeholder_mask, attention_mask, labels)
        audio = peak_gather(...)                                      # the one wait of the batch
        splice(..., layout=layout, max_length=counts.max_length(audio, layout))

    waits once, where `splice` without max_length waits a second time.
    """

    def __init__(
        self,
        placeholder_mask: Tensor,  # (B, L) bool
        attention_mask: Tensor | None = None,  # (B, L), non-zero marks text
        labels: Tensor | None = None,  # (B, L), -100 where nothing is to be predicted
    ) -> None:
        """Raises TypeError or ValueError, naming the argument, as `splice` does for dtypes, shapes and devices."""
        if placeholder_mask.dim() != 2:
            raise ValueError(f"placeholder_mask must be (B, L), got {tuple(placeholder_mask.shape)}")
        check_prompts(placeholder_mask, attention_mask, labels, placeholder_mask.shape, placeholder_mask.device)
        valid = torch.ones_like(placeholder_mask) if attention_mask is None else attention_mask != 0
        text = valid & ~placeholder_mask
        labelled = torch.zeros_like(text) if labels is None else text & (labels != _IGNORE)
        counted = torch.stack([text, placeholder_mask, placeholder_mask & ~valid, labelled]).sum(2)
        # To pinned memory, behind what the stream has to do; the event says when the numbers are there.
        self._counts_4B = counted.to("cpu", non_blocking=counted.is_cuda)
        self._copied = None
        if counted.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(counted.device))

    def _read(self) -> list[list[int]]:
        if self._copied is not None:
            self._copied.synchronize()  # long there, if the audio's counts have been read since
        return self._counts_4B.tolist()

    def placeholders(self) -> list[int]:
        """Placeholders in each prompt."""
        return self._read()[1]

    def labels(self) -> int:
        """Labels of the text, other than -100, in all prompts: at least as many as a spliced batch predicts."""
        return sum(self._read()[3])

    def max_length(self, audio: Packed, layout: str = "right") -> int | None:
        """The spliced length M with these segments: of the longest prompt or, packed, of all; what `splice` needs.

        Given as max_length it is also what `Spliced.max_len` says, which for a packed batch is no tight bound.

        None where the host does not know the audio's lengths: splice has to ask the accelerator then.

        Raises ValueError for what `splice` finds in the values: a number of placeholders other than the number of
        segments, a placeholder outside attention_mask.
        """
        lengths = audio.known_lengths()
        if lengths is None:
            return None
        text, placeholders, outside, _ = self._read()
        check_values(placeholders, outside, len(audio))
        segments = iter(lengths.tolist())
        totals = [words + sum(next(segments) for _ in range(n)) for words, n in zip(text, placeholders, strict=True)]
        return sum(totals) if layout == "packed" else max(totals, default=0)
