"""Truth of ctc_loss: the alpha recursion of Graves 2006 (eq. 6-8), one utterance and one frame at a time."""

import torch
from torch import Tensor


def ctc_loss(
    log_probs: Tensor,  # (T, B, C)
    targets: list[list[int]],
    input_lengths: list[int],
    blank: int = 0,
) -> Tensor:
    """(B,) float64 negative log-likelihoods. Its autograd gradient is -occupancy, the derivative in log_probs
    themselves; F.ctc_loss and the op return exp(log_probs) - occupancy, so compare behind a log_softmax.
    """
    losses = []
    for b, target in enumerate(targets):
        states = [blank]
        for label in target:
            states += [label, blank]
        zero = log_probs.new_tensor(-torch.inf, dtype=torch.float64)
        # Before the first frame all mass lies just left of state 0, which may be stepped into or skipped.
        alpha = [zero] * len(states)
        for t in range(input_lengths[b]):
            emit = log_probs[t, b].double()
            new = []
            for s, state in enumerate(states):
                if t == 0:
                    into = emit.new_zeros(()) if s < 2 else zero
                else:
                    ways = [alpha[s]] + ([alpha[s - 1]] if s >= 1 else [])
                    if s >= 2 and state != blank and state != states[s - 2]:
                        ways.append(alpha[s - 2])
                    ways = [w for w in ways if w > -torch.inf]
                    into = torch.stack(ways).logsumexp(0) if ways else zero
                new.append(into + emit[state])
            alpha = new
        if input_lengths[b] == 0:
            losses.append(zero.abs() if target else zero.new_zeros(()))
        else:
            ends = [a for a in alpha[-2:] if a > -torch.inf]
            losses.append(-torch.stack(ends).logsumexp(0) if ends else zero.abs())
    return torch.stack(losses)
