"""Truth of ctc_peaks and peak_gather: a loop over utterances and runs."""

import torch
from torch import Tensor


def ctc_peaks(
    tokens: list[list[int]],
    lengths: list[int],
    blank: int | None = None,
    drop_blank: bool = False,
    scores: list[list[float]] | None = None,  # given: the best frame of each run; not given: the first
) -> list[list[int]]:
    """The kept frames of every utterance."""
    kept = []
    for b, n in enumerate(lengths):
        runs: list[list[int]] = []
        for t in range(n):
            if t == 0 or tokens[b][t] != tokens[b][t - 1]:
                runs.append([])
            runs[-1].append(t)
        content = [run for run in runs if not (drop_blank and tokens[b][run[0]] == blank)]
        frames = [run[0] if scores is None else max(run, key=lambda t, b=b: scores[b][t]) for run in content]
        kept.append(frames or ([0] if n else []))
    return kept


def peak_gather(features: Tensor, kept: list[list[int]]) -> Tensor:
    """(total, D): the kept rows of features (B, T, D), in order."""
    rows = [features[b, t] for b, frames in enumerate(kept) for t in frames]
    return torch.stack(rows) if rows else features.new_zeros(0, features.shape[2])
