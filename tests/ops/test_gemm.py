"""Products of every layout through every library the chunked ops may meet."""

import pytest
import torch

from soundwave_fast.ops import gemm
from soundwave_fast.ops.gemm import add_mm, mm
from tests.ops.backends import DEVICE

M, K, N = 13, 21, 10


@pytest.fixture(params=["preferred library", "torch.mm"], autouse=True)
def library(request, monkeypatch):
    if request.param == "torch.mm":
        monkeypatch.setattr(gemm, "_prefers_onednn", lambda a, b: False)


def operands(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((M, K), (K, N)))
    if layout == "transposed":
        return a.t().contiguous().t(), b.t().contiguous().t()
    if layout == "slices":
        return torch.cat([a, a], 1)[:, :K], torch.cat([b, b])[K:]
    if layout == "strided":
        return torch.stack([a, a], 2).flatten(1)[:, ::2], torch.stack([b, b], 2).flatten(1)[:, 1::2]
    return a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "slices", "strided"])
def test_products(dtype, layout):
    a, b = operands(dtype, layout)
    wide = torch.promote_types(dtype, torch.float32)
    want = a.double() @ b.double()
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps * float(want.abs().max())}
    room = torch.full((M, N + 3), 7.0, dtype=dtype, device=DEVICE)
    got = mm(a, b, out=room[:, :N])
    torch.testing.assert_close(got.double(), want, **tolerance)
    assert (room[:, N:] == 7).all()

    start, scale_N1 = torch.full((M, N), 2.0, dtype=wide, device=DEVICE), torch.rand(M, 1, dtype=wide, device=DEVICE)
    for scale, overwrite in ((None, False), (None, True), (scale_N1, False), (scale_N1, True)):
        out = start.clone()
        add_mm(out, a, b, scale, overwrite)
        expected = (0 if overwrite else start.double()) + want * (1 if scale is None else scale.double())
        torch.testing.assert_close(out.double(), expected, **tolerance)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_nothing_to_multiply(shape):
    m, k, n = shape
    assert torch.equal(mm(torch.ones(m, k), torch.ones(k, n)), torch.zeros(m, n))
