"""The forward-backward behind both CTC losses, on both backends: against every path, the recursion, and each other."""

import itertools

import numpy as np
import pytest
import torch

from soundwave_fast.ops import reference
from soundwave_fast.ops.backend import implementation
from tests.ops.backends import DEVICE

T, C = 12, 6
TARGETS = [[1, 1, 2, 1], [], [3], [5, 5, 5], [4, 2, 4, 2, 4]]
INPUT_LENGTHS = [12, 5, 1, 7, 9]


def compact(log_probs: torch.Tensor, targets: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Emissions (T, B, K) and first columns (B, K) on the tests' device, written a label at a time."""
    B, K = len(targets), max(map(len, targets), default=0) + 1
    columns = [[0] + t + [0] * (K - 1 - len(t)) for t in targets]
    first = torch.tensor([[row.index(c) for c in row] for row in columns]).view(B, K)
    index = torch.tensor(columns, dtype=torch.int64).view(B, K).expand(len(log_probs), -1, -1)
    return log_probs.gather(2, index).to(DEVICE), first.to(DEVICE)


def run(log_probs, targets, input_lengths, need=True, target_lengths=None):
    emissions, first = compact(log_probs, targets)
    lengths = torch.tensor(input_lengths, dtype=torch.int64, device=DEVICE)
    target_lengths = [len(t) for t in targets] if target_lengths is None else target_lengths
    target_lengths = torch.tensor(target_lengths, dtype=torch.int64, device=DEVICE)
    nll, gamma = implementation("alpha_beta", emissions).alpha_beta(emissions, first, lengths, target_lengths, need)
    assert nll.dtype == torch.float64
    return nll.cpu(), None if gamma is None else gamma.cpu().double()


def make(frames: int, batch: int, classes: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(frames, batch, classes, generator=generator, dtype=torch.float64)
    return (std * logits).log_softmax(-1)


def occupancy(log_probs, targets, input_lengths) -> torch.Tensor:
    """gamma (T, B, K) as minus the gradient of the recursion, columns of repeated labels empty; 0 where it is inf."""
    x = log_probs.clone().requires_grad_()
    nll = reference.ctc_loss(x, targets, input_lengths)
    (grad,) = torch.autograd.grad(nll[nll.isfinite()].sum(), x)
    K = max(map(len, targets)) + 1
    gamma = torch.zeros(len(x), len(targets), K, dtype=torch.float64)
    for b, target in enumerate(targets):
        for k, c in enumerate([0, *target]):
            if c not in [0, *target][:k]:
                gamma[:, b, k] = -grad[:, b, c]
    return gamma


@pytest.mark.parametrize("target", [[], [1], [1, 2], [1, 1], [1, 2, 1], [2, 2, 2]])
@pytest.mark.parametrize("frames", [1, 2, 4, 5])
def test_against_every_path(backend, poison, target, frames):
    log_probs = make(frames, 1, 3)
    paths = {}
    for path in itertools.product(range(3), repeat=frames):
        collapsed = [c for i, c in enumerate(path) if c and (i == 0 or path[i - 1] != c)]
        if collapsed == target:
            paths[path] = sum(log_probs[t, 0, c] for t, c in enumerate(path)).exp()
    nll, gamma = run(log_probs, [target], [frames])
    assert gamma.shape == (frames, 1, len(target) + 1)
    if not paths:
        assert nll.tolist() == [torch.inf] and not gamma.any()
        return
    total = sum(paths.values())
    torch.testing.assert_close(nll[0], -total.log())
    for t in range(frames):
        for k, c in enumerate([0, *target]):
            want = sum(p for path, p in paths.items() if path[t] == c) / total
            want = 0.0 if c in [0, *target][:k] else float(want)
            assert gamma[t, 0, k].item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_recursion(backend, poison, dtype):
    log_probs = make(T, len(TARGETS), C).to(dtype)
    want = reference.ctc_loss(log_probs.double(), TARGETS, INPUT_LENGTHS)
    nll, gamma = run(log_probs, TARGETS, INPUT_LENGTHS)
    accuracy = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 3e-6}
    torch.testing.assert_close(nll, want, **accuracy)
    torch.testing.assert_close(gamma, occupancy(log_probs.double(), TARGETS, INPUT_LENGTHS), **accuracy)
    for b, frames in enumerate(INPUT_LENGTHS):
        torch.testing.assert_close(gamma[:frames, b].sum(1), torch.ones(frames).double(), **accuracy)
        assert not gamma[frames:, b].any()
    only, none = run(log_probs, TARGETS, INPUT_LENGTHS, need=False)
    assert none is None and torch.equal(only, nll)


def test_garbage_past_the_length_is_not_read(backend, poison):
    log_probs = make(T, len(TARGETS), C)
    want = run(log_probs, TARGETS, INPUT_LENGTHS)
    for b, (frames, garbage) in enumerate(zip(INPUT_LENGTHS, (0, torch.nan, torch.inf, -torch.inf, torch.nan))):
        log_probs[frames:, b] = garbage
    assert all(torch.equal(a, b) for a, b in zip(want, run(log_probs, TARGETS, INPUT_LENGTHS)))


def test_any_strides(backend):
    log_probs = make(T, len(TARGETS), C)
    emissions, first = compact(log_probs, TARGETS)
    lengths = [torch.tensor(x, device=DEVICE) for x in (INPUT_LENGTHS, [len(t) for t in TARGETS])]
    alpha_beta = implementation("alpha_beta", emissions).alpha_beta
    want = alpha_beta(emissions, first, *lengths, True)
    for order in ((1, 2, 0), (2, 0, 1)):
        back = tuple(order.index(i) for i in range(3))
        strided = torch.nn.functional.pad(emissions.permute(order), (1, 2))[..., 1:-2].permute(back)
        assert all(torch.equal(a, b) for a, b in zip(want, alpha_beta(strided, first, *lengths, True)))


def test_nothing_to_do(backend, poison):
    for frames, targets, input_lengths, want in (
        (0, [[1], []], [0, 0], [torch.inf, 0.0]),
        (3, [], [], []),
        (3, [[1, 1], [], [1]], [2, 0, 0], [torch.inf, 0.0, torch.inf]),
    ):
        nll, gamma = run(make(frames, len(targets), C), targets, input_lengths)
        assert nll.tolist() == want and not gamma.any() and len(gamma) == frames


def test_lengths_out_of_range_read_nothing_and_give_nan(backend, poison):
    log_probs = make(T, 6, C)
    targets = [[1, 2]] * 6
    good, good_gamma = run(log_probs, targets, [12] * 6)
    nll, gamma = run(log_probs, targets, [12, -1, 13, 2**40, 12, 12], target_lengths=[2, 2, 2, 2, -1, 3])
    assert nll.isnan().tolist() == [False, True, True, True, True, True]
    assert nll[0] == good[0] and torch.equal(gamma[:, 0], good_gamma[:, 0]) and not gamma[:, 1:].any()


@pytest.mark.parametrize("seed", range(4))
def test_impossible_frames_and_improbable_targets(backend, poison, seed):
    """-inf emissions, and logits so far apart that probabilities leave float64: never NaN, inf where and only where."""
    log_probs = make(20, 4, C, seed, std=300.0)
    log_probs[torch.rand(20, 4, C, generator=torch.Generator().manual_seed(seed)) < 0.1] = -torch.inf
    log_probs[:, 3, 2] = -torch.inf
    targets = [[1, 2, 3], [4, 4], [], [1, 2]]
    input_lengths = [20, 9, 20, 20]
    want = reference.ctc_loss(log_probs, targets, input_lengths)
    nll, gamma = run(log_probs, targets, input_lengths)
    assert nll[3] == torch.inf and torch.equal(nll.isinf(), want.isinf()) and not gamma.isnan().any()
    torch.testing.assert_close(nll, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(gamma, occupancy(log_probs, targets, input_lengths), rtol=1e-4, atol=1e-4)


def test_long_targets_in_several_blocks(backend, poison, monkeypatch):
    """What targets of thousands of labels go through, at a size the interpreter can do."""
    if backend == "triton":
        import csrc_triton.alpha_beta
        import csrc_triton.occupancy

        width = 4  # a multiple of it, one less: where a target's last state sits in its chunk matters
        monkeypatch.setattr(csrc_triton.alpha_beta, "block", lambda n, least=1, most=1: width)
        monkeypatch.setattr(csrc_triton.occupancy, "_TILE", width)
    targets = [[1, 2, 2, 3, 4, 1, 2, 3], [1] * 4, [2, 1, 1]]
    input_lengths = [13, 9, 6]
    log_probs = make(13, len(targets), C, std=3.0).float()
    want = reference.ctc_loss(log_probs.double(), targets, input_lengths)
    nll, gamma = run(log_probs, targets, input_lengths)
    assert want.isfinite().all()
    torch.testing.assert_close(nll, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gamma, occupancy(log_probs.double(), targets, input_lengths), rtol=1e-5, atol=1e-5)
    only, _ = run(log_probs, targets, input_lengths, need=False)
    assert torch.equal(only, nll)


def peaked(frames: int, labels: int, classes: int, seed: int, wrong: bool) -> tuple[torch.Tensor, list[int]]:
    """Emissions of a model sure of itself: blank but for one frame a label; `wrong`, of another transcript."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(frames, 1, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(1, classes, (labels,), generator=generator)
    spoken = torch.randint(1, classes, (labels,), generator=generator) if wrong else target
    logits[..., 0] += 12
    logits[torch.randperm(frames, generator=generator)[:labels].sort().values, 0, spoken] += 24
    return logits.log_softmax(-1), target.tolist()


@pytest.mark.parametrize(
    ("frames", "labels", "kind"),
    [(100, 20, "even"), (160, 30, "random"), (100, 20, "sure"), (100, 20, "wrong")],
)
def test_float32_is_as_close_as_promised(backend, frames, labels, kind):
    """Relative error of the occupancies of float32 emissions, against the native op in float64."""
    if kind in ("sure", "wrong"):
        log_probs, target = peaked(frames, labels, 50, 1, kind == "wrong")
    else:
        log_probs = make(frames, 1, 50, 1, std=1.0 if kind == "random" else 0.0)
        target = torch.randint(1, 50, (labels,), generator=torch.Generator().manual_seed(2)).tolist()
    log_probs = log_probs.float()
    x = log_probs.double().requires_grad_()
    loss = torch.nn.functional.ctc_loss(x, torch.tensor([target]), [frames], [labels], reduction="sum")
    truth = x.detach().exp() - torch.autograd.grad(loss, x)[0]
    nll, gamma = run(log_probs, [target], [frames])
    torch.testing.assert_close(nll, loss.detach()[None], rtol=2e-6, atol=2e-6)
    index = torch.tensor([0, *target])
    dense = torch.zeros(frames, 50, dtype=torch.float64).index_add_(1, index, gamma[:, 0])
    assert (dense - truth[:, 0]).norm() <= 1e-4 * (x.detach().exp() - truth).norm()


def test_the_lattice_knows_what_it_does_not_know():
    """The torch path works in probabilities; whatever it claims to be sure of agrees with the native op in logarithms.

    It must be sure of ordinary cases, and must not be where underflow has taken the answer.
    """
    from soundwave_fast.ops.pure_torch import alpha_beta as module

    def lattice(log_probs, target):
        emissions, first = compact(log_probs, [target])
        lengths = torch.tensor([len(log_probs)]), torch.tensor([len(target)])
        with np.errstate(all="ignore"):
            nll, gamma, sure = module._lattice(emissions.cpu(), first.cpu(), *(n.numpy() for n in lengths), True)
        want, want_gamma = module._native(emissions.cpu(), first.cpu(), *lengths, True)
        if sure:
            torch.testing.assert_close(nll, want, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(gamma, want_gamma, rtol=1e-9, atol=1e-9)
        return bool(sure)

    target = torch.randint(1, 50, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    assert lattice(make(300, 1, 50), target) and lattice(make(700, 1, 50), target)  # the second needs the finer bound
    assert lattice(make(700, 1, 50, std=0.0), target)
    assert lattice(*peaked(700, 60, 50, 0, wrong=False))
    assert not lattice(*peaked(700, 200, 50, 0, wrong=True))
    assert not lattice(make(100, 1, 50, std=100.0), target)
    sure = [lattice(make(t, 1, 50, t, std=std), target[:30]) for t in range(60, 200, 20) for std in (1, 5, 15, 30, 60)]
    assert any(sure) and not all(sure)
