"""Packed: packing and unpacking by hand, gradients, and what its checks refuse."""

import pytest
import torch

from soundwave_fast.packed import Packed, pack


def example() -> Packed:
    return pack(torch.arange(12.0).view(3, 4, 1), [2, 0, 3])


def test_from_padded_by_hand():
    p = example()
    assert p.data.squeeze(1).tolist() == [0, 1, 8, 9, 10]
    assert p.cu_seqlens.tolist() == [0, 2, 2, 5] and p.cu_seqlens.dtype == torch.int32
    assert p.lengths.tolist() == [2, 0, 3] and p.max_len == 3 and p.total == 5 and len(p) == 3
    assert p.index.tolist() == [0, 1, 8, 9, 10]
    assert p.segment_ids().tolist() == [0, 0, 2, 2, 2]
    assert p.positions().tolist() == [0, 1, 0, 1, 2]


def test_to_padded_both_sides():
    p = example()
    right = [[0, 1, -1], [-1, -1, -1], [8, 9, 10]]
    assert p.to_padded(-1).squeeze(2).tolist() == right
    assert p.unpad(-1).squeeze(2).tolist() == right
    assert p.to_padded(-1, side="left").squeeze(2).tolist() == [[-1, 0, 1], [-1, -1, -1], [8, 9, 10]]
    assert p.mask().tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert p.mask("left").tolist() == [[False, True, True], [False] * 3, [True] * 3]


@pytest.mark.parametrize("lengths", [[0, 0], [1, 0], [3, 5]])
def test_list_round_trip(lengths):
    parts = [torch.randn(n, 2, 3) for n in lengths]
    p = pack(parts)
    assert p.max_len == max(lengths)
    for got, want in zip(p.unbind(), parts):
        assert torch.equal(got, want)
    again = Packed.from_padded(p.to_padded(), p.lengths)
    assert torch.equal(again.data, p.data) and torch.equal(again.cu_seqlens, p.cu_seqlens)


def test_gradients_flow_through_data():
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: Packed.from_padded(x, [2, 3]).to_padded(side="left"), (x,))
    x.grad = None
    Packed.from_padded(x, [1, 0]).data.sum().backward()
    assert x.grad.sum().item() == 2 and x.grad[1].abs().max() == 0


def test_from_padded_with_sizes_the_host_knows():
    """Bounds in place of exact sizes: rows of nobody are 0 and owned by nobody, and unpack to nothing."""
    x = torch.arange(12.0).view(3, 4, 1).requires_grad_()
    p = Packed.from_padded(x, torch.tensor([2, 0, 3]), total=8, max_len=4)
    assert p.data.squeeze(1).tolist() == [0, 1, 8, 9, 10, 0, 0, 0] and p.max_len == 4
    assert p.index.tolist() == [0, 1, 8, 9, 10, -1, -1, -1] and not p.overflowed()
    assert p.segment_ids().tolist() == [0, 0, 2, 2, 2, 3, 3, 3]
    assert p.to_padded(-1).squeeze(2).tolist() == [[0, 1, -1, -1], [-1] * 4, [8, 9, 10, -1]]
    assert p.to_padded(-1, side="left").squeeze(2).tolist() == [[-1, -1, 0, 1], [-1] * 4, [-1, 8, 9, 10]]
    assert [part.squeeze(1).tolist() for part in p.unbind()] == [[0, 1], [], [8, 9, 10]]
    assert p.mask().sum(1).tolist() == [2, 0, 3]
    (grad,) = torch.autograd.grad(p.data.sum() + p.to_padded().sum(), x)
    assert grad.squeeze(2).tolist() == [[2, 2, 0, 0], [0] * 4, [2, 2, 2, 0]]
    nothing = Packed.from_padded(torch.zeros(2, 0, 3), torch.tensor([0, 0]), total=2, max_len=0)
    assert nothing.data.shape == (2, 3) and nothing.to_padded().shape == (2, 0, 3)


def test_overflowed_tells_rows_that_are_missing():
    short = Packed(torch.zeros(4, 1), torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([2, 2]), 2)
    assert not short.overflowed()
    object.__setattr__(short, "lengths", torch.tensor([2, 3]))  # as an accelerator reports it, unchecked
    assert short.overflowed()


def test_under_compile():
    def road(x, lengths):
        p = Packed.from_padded(x, lengths, total=12, max_len=5)
        return p.with_data(p.data * 2).to_padded(side="left"), p.segment_ids(), p.positions(), p.overflowed()

    compiled = torch.compile(road, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, T in ((2, 5), (4, 3), (3, 4)):
        x, lengths = torch.randn(B, T, 2), torch.randint(0, T + 1, (B,))
        assert all(torch.equal(a, b) for a, b in zip(compiled(x, lengths), road(x, lengths)))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_where_sizes_are_known():
    x, lengths = torch.randn(3, 4, 2, device="cuda"), torch.tensor([2, 0, 3], device="cuda")
    p = Packed.from_padded(x, [2, 0, 3])  # allocates, compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        packs = [
            Packed.from_padded(x, lengths, total=6, max_len=4),
            Packed.from_padded(x, [2, 0, 3]),
            pack([x[0], x[1]]),
        ]
        padded = [packed.to_padded(side=side) for packed in packs for side in ("left", "right")]
        rest = [(packed.segment_ids(), packed.positions(), packed.mask(), packed.overflowed()) for packed in packs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(packs[0].data[:5], p.data) and len(padded) == 2 * len(rest)


def test_with_data_and_to():
    p = example()
    assert p.with_data(torch.zeros(5, 7)).data.shape == (5, 7)
    half = p.to(torch.bfloat16)
    assert half.data.dtype == torch.bfloat16 and half.cu_seqlens.dtype == torch.int32
    with pytest.raises(ValueError, match="data"):
        p.with_data(torch.zeros(4, 7))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32)}, ValueError, "cu_seqlens"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, "cu_seqlens"),
        ({"lengths": torch.tensor([3, 2])}, ValueError, "lengths"),
        ({"lengths": torch.tensor([2.0, 3.0])}, TypeError, "lengths"),
        ({"lengths": torch.tensor([2])}, ValueError, "lengths"),
        ({"max_len": 2}, ValueError, "max_len"),
        ({"index": torch.arange(4)}, ValueError, "index"),
        ({"data": torch.zeros(4, 1)}, ValueError, "cu_seqlens"),
        ({"data": torch.zeros(())}, ValueError, "data"),
        ({"lengths": torch.tensor([2, 3], device="meta")}, ValueError, "lengths must be on data's device"),
    ],
)
def test_refuses(change, error, name):
    good = {
        "data": torch.zeros(5, 1),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
        "lengths": torch.tensor([2, 3]),
        "max_len": 3,
    }
    Packed(**good)
    with pytest.raises(error, match=name):
        Packed(**{**good, **change})


def test_pack_refuses():
    x = torch.zeros(2, 3, 1)
    for lengths in ([1], [1, 4], [-1, 2]):
        with pytest.raises(ValueError, match="lengths"):
            pack(x, lengths)
        with pytest.raises(ValueError, match="lengths"):
            Packed.from_padded(x, torch.tensor(lengths), total=6, max_len=3)
    with pytest.raises(ValueError, match="total is 3, but lengths add up to 4"):
        Packed.from_padded(x, [1, 3], total=3)
    with pytest.raises(ValueError, match="lengths"):
        pack(x)
    with pytest.raises(ValueError, match="sequences"):
        pack([])
    with pytest.raises(ValueError, match=r"sequences\[1\]"):
        pack([torch.zeros(1, 2), torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="side"):
        example().to_padded(side="middle")
