"""What the documentation's figures show is what the ops compute."""

import pytest
import torch

from bench import figures
from soundwave_fast.ops.backend import implementation


@pytest.mark.parametrize("labels", [[3], [3, 5, 5, 2], [1, 1, 1]], ids=str)
def test_the_lattice_is_the_ops(labels):
    T, K = 14, len(labels) + 1
    log_probs = torch.randn(T, 8, dtype=torch.float64).log_softmax(-1)
    emissions = log_probs[:, [0, *labels]]
    alpha, beta, gamma = figures._lattice(emissions, labels)
    first = torch.tensor([[0, *(1 + labels.index(label) for label in labels)]])
    lengths = torch.tensor([T]), torch.tensor([K - 1])
    with torch.no_grad():
        nll, ours = implementation("alpha_beta", emissions).alpha_beta(emissions[:, None], first, *lengths, True)
    assert torch.allclose((alpha + beta).logsumexp(1), -nll)  # the same through every frame
    folded = torch.zeros(T, K, dtype=torch.float64)
    for s in range(2 * K - 1):
        folded[:, 0 if s % 2 == 0 else first[0, s // 2 + 1]] += gamma[:, s]
    torch.testing.assert_close(folded, ours[:, 0].double())


def test_errors_are_measured():
    (row,) = figures.measure((40,))
    assert row["S"] == 8
    assert 0 < row["ours, torch path"] < 1e-6 < row["F.ctc_loss, float32"] < 1e-2
    assert 0 < row["ours, Triton kernel"] < row["F.ctc_loss, float32"]
