"""peak_times by hand, where there is no peak, and what it refuses."""

import pytest
import torch

from soundwave_fast.ops import ctc_peaks, peak_gather, peak_times


def test_peak_times_by_hand():
    tokens = torch.tensor([[5, 5, 0, 7], [0, 6, 6, 6]])
    log_probs = torch.tensor([[0.9, 0.5, 0.4, 0.25], [0.1, 0.2, 0.75, 0.3]]).log()
    x = torch.zeros(2, 4, 1)
    packed = peak_gather(x, tokens, blank=0, drop_blank=True, select="peak", scores=log_probs)
    assert packed.cu_seqlens.tolist() == [0, 2, 3]
    times = peak_times(packed.index, tokens, log_probs)
    torch.testing.assert_close(times.seconds, torch.tensor([0.0, 0.12, 0.08]))
    assert times.tokens.tolist() == [5, 7, 6]
    torch.testing.assert_close(times.probabilities, torch.tensor([0.9, 0.25, 0.75]))
    index, _ = ctc_peaks(tokens, [1, 0], capacity=2)
    times = peak_times(index, tokens, log_probs, frame_seconds=0.02)
    assert times.tokens.tolist() == [5, -1] and times.seconds.tolist() == [0, -1] and times.probabilities[1] == 0
    assert peak_times(torch.full((3,), -1), tokens[:, :0], log_probs[:, :0]).tokens.tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match="index"):
        peak_times(index[None], tokens, log_probs)
    with pytest.raises(ValueError, match="log_probs"):
        peak_times(index, tokens, log_probs[:, :2])
