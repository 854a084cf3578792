"""The arguments both CTC losses take: what is refused, what is marked instead of looked at, and no wait for a GPU."""

import pytest
import torch

from soundwave_fast.ops import ctc_loss
from soundwave_fast.ops.compact import _compact_op, _mark
from tests.ops.backends import DEVICE, TorchOps
from tests.ops.ctc_cases import (
    INPUT_LENGTHS,
    TARGET_LENGTHS,
    TARGETS,
    B,
    C,
    T,
    make_log_probs,
    padded,
    same,
    value_and_grad,
)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"targets": torch.tensor([[1, 7]])}, ValueError, "targets"),
        ({"targets": torch.tensor([[1, -1]])}, ValueError, "targets"),
        ({"targets": torch.tensor([[1, 0]])}, ValueError, "blank"),
        ({"targets": torch.tensor([1, 2, 3])}, ValueError, "targets"),
        ({"targets": torch.tensor([[[1, 2]]])}, ValueError, "targets"),
        ({"targets": torch.tensor([[1.0, 2.0]])}, TypeError, "targets"),
        ({"targets": torch.tensor([[1, 2]] * 2)}, ValueError, "targets"),
        ({"input_lengths": [5]}, ValueError, "input_lengths"),
        ({"input_lengths": [-1]}, ValueError, "input_lengths"),
        ({"input_lengths": [4, 4]}, ValueError, "input_lengths"),
        ({"input_lengths": torch.tensor([4.0])}, TypeError, "input_lengths"),
        ({"target_lengths": [3]}, ValueError, "target_lengths"),
        ({"target_lengths": torch.tensor([-1])}, ValueError, "target_lengths"),
        ({"blank": 7}, ValueError, "blank"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"log_probs": torch.zeros(4)}, ValueError, "log_probs"),
        ({"log_probs": torch.zeros(4, 1, 7).long()}, TypeError, "log_probs"),
    ],
)
def test_refuses(change, error, name):
    good = {
        "log_probs": torch.zeros(4, 1, 7),
        "targets": torch.tensor([[1, 2]]),
        "input_lengths": [4],
        "target_lengths": [2],
    }
    ctc_loss(**good)
    with pytest.raises(error, match=name):
        ctc_loss(**{**good, **change})


def test_refuses_a_dtensor():
    DTensor = type("DTensor", (torch.Tensor,), {})
    x = torch.zeros(4, 1, 7).as_subclass(DTensor)
    with pytest.raises(TypeError, match="log_probs is a DTensor"):
        ctc_loss(x, torch.tensor([[1, 2]]), [4], [2])


@pytest.mark.gpu
@pytest.mark.parametrize("concatenated", [False, True])
def test_lengths_on_the_gpu_are_not_waited_for(concatenated):
    targets = torch.tensor(sum(TARGETS, [])) if concatenated else padded()
    lengths = torch.tensor(INPUT_LENGTHS), torch.tensor(TARGET_LENGTHS)
    x = make_log_probs(torch.float32)
    want = value_and_grad(lambda x: ctc_loss(x, targets, *lengths), x)
    value_and_grad(lambda x: ctc_loss(x, targets.cuda(), *(n.cuda() for n in lengths)), x)  # compile first
    forms = [
        (targets.cuda(), *(n.cuda() for n in lengths)),
        (targets.cuda(), INPUT_LENGTHS, lengths[1].cuda()),
        (targets, *lengths),
    ]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [value_and_grad(lambda x, a=a: ctc_loss(x, *a), x) for a in forms]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same(want, g) for g in got)


@pytest.mark.gpu
def test_values_out_of_range_on_the_gpu_give_nan():
    x = make_log_probs(torch.float32)
    bad = padded().cuda()
    bad[0, 2], bad[4, 0] = C, 0
    input_lengths = torch.tensor([12, 5, 13, 7, 9]).cuda()
    target_lengths = torch.tensor([4, 0, 1, 6, 2]).cuda()
    loss, grad = value_and_grad(lambda x: ctc_loss(x, bad, input_lengths, target_lengths, reduction="none"), x)
    assert loss.isnan().tolist() == [True, False, True, True, True]
    assert grad[:, [0, 2, 3, 4]].abs().sum() == 0 and grad[:, 1].isfinite().all() and grad[:, 1].abs().sum() > 0
    flat = torch.tensor(sum(TARGETS, []), device="cuda")
    loss = ctc_loss(x, flat[:-1], torch.tensor(INPUT_LENGTHS).cuda(), torch.tensor(TARGET_LENGTHS).cuda(), 0, "none")
    assert loss.isnan().all()


def test_what_cannot_be_looked_at_is_marked():
    """Lengths and labels on an accelerator, computed here as if these tensors lay there: nothing asks for a value."""

    def build(targets, input_lengths, target_lengths, longest):
        lengths = torch.tensor(input_lengths), torch.tensor(target_lengths)
        with TorchOps() as seen:
            columns, first, *out = _mark(targets, *lengths, longest, T, C, 0)
        assert not {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"} & set(seen.names)
        assert columns.shape == (len(input_lengths), longest + 1)
        assert columns.min() >= 0 and columns.max() < C and first.min() >= 0 and first.max() <= longest
        return [x.tolist() for x in (columns, *out)]

    bad = padded()
    bad[0, 2], bad[4, 0] = C, 0
    columns, input_lengths, target_lengths = build(bad, [12, 5, 13, 7, 9], [4, 0, 1, 6, 2], 5)
    assert input_lengths == [0, 5, 0, 0, 0] and target_lengths == [-1, 0, -1, -1, -1]
    columns, *out = build(padded(), INPUT_LENGTHS, TARGET_LENGTHS, 3)  # cut to 3, say because there are 2 frames
    assert out == [INPUT_LENGTHS, [3, 0, 1, 3, 2]] and columns[0] == [0, 1, 1, 2]
    flat = torch.tensor(sum(TARGETS, []))
    columns, *out = build(flat, INPUT_LENGTHS, TARGET_LENGTHS, flat.numel())
    assert out == [INPUT_LENGTHS, TARGET_LENGTHS]
    assert [row[1 : n + 1] for row, n in zip(columns, TARGET_LENGTHS)] == TARGETS
    for wrong in (flat[:-1], flat[:0]):
        assert build(wrong, INPUT_LENGTHS, TARGET_LENGTHS, len(wrong))[2] == [-1] * B
    assert build(flat, INPUT_LENGTHS, [-4, 4, 2**40, 3, 2], flat.numel())[2] == [-1] * B


def test_compiled_checks_values():
    f = torch.compile(ctc_loss, fullgraph=True, backend="aot_eager")
    x, lengths = torch.zeros(4, 1, 7), (torch.tensor([4]), torch.tensor([2]))
    f(x, torch.tensor([[1, 2]]), *lengths)
    with pytest.raises(ValueError, match="targets"):
        f(x, torch.tensor([[1, 7]]), *lengths)
    with pytest.raises(ValueError, match="input_lengths"):
        f(x, torch.tensor([[1, 2]]), torch.tensor([5]), lengths[1])


def test_opcheck():
    lengths, device = (torch.tensor(INPUT_LENGTHS), torch.tensor(TARGET_LENGTHS)), torch.device(DEVICE)
    flat = torch.tensor(sum(TARGETS, []), device=DEVICE)
    for targets in (padded(), padded().to(DEVICE), flat):
        torch.library.opcheck(_compact_op, (targets, *lengths, targets.shape[-1], T, C, 0, device))
