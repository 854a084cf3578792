"""splice on both backends: exact cases written by hand, random ones against a loop, gradients and refusals."""

import pytest
import torch

from soundwave_fast.model.losses import next_token_loss
from soundwave_fast.ops import reference, splice
from soundwave_fast.ops.backend import implementation, use_backend
from soundwave_fast.ops.splice import Spliced, _splice, _splice_audio_backward, _splice_text_backward
from soundwave_fast.packed import Packed, pack
from tests.ops.backends import DEVICE, DTensor, TorchOps

A, E = True, False  # placeholder or not
LAYOUTS = ("right", "left", "packed")


def here(rows) -> torch.Tensor:
    return torch.tensor(rows, device=DEVICE)


def embeds(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=DEVICE)[..., None]


def segments(*rows) -> Packed:
    return pack([torch.tensor(r, dtype=torch.float32, device=DEVICE).view(-1, 1) for r in rows])


def case(layout, max_length=None):
    """Two prompts: `1 <audio> 2`, and `<audio> 3 <audio>` padded by one; segments of 2, 0 and 1 rows."""
    return splice(
        embeds([[1, 0, 2, 9], [0, 3, 0, 9]]),
        segments([10, 11], [], [12]),
        here([[E, A, E, E], [A, E, A, E]]),
        here([[1, 1, 1, 1], [1, 1, 1, 0]]),
        here([[-100, 51, 52, 53], [54, 55, 56, 57]]),
        layout,
        max_length,
    )


def test_right_by_hand(backend, poison):
    out = case("right")
    assert out.inputs_embeds.squeeze(2).tolist() == [[1, 10, 11, 2, 9], [3, 12, 0, 0, 0]]
    assert out.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert out.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert out.labels.tolist() == [[-100, -100, -100, 52, 53], [55, -100, -100, -100, -100]]
    assert out.cu_seqlens.tolist() == [0, 5, 7] and out.cu_seqlens.dtype == torch.int32
    assert out.lengths.tolist() == [5, 2] and not out.overflowed()


def test_left_by_hand(backend, poison):
    out = case("left")
    assert out.inputs_embeds.squeeze(2).tolist() == [[1, 10, 11, 2, 9], [0, 0, 0, 3, 12]]
    assert out.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert out.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert out.labels.tolist() == [[-100, -100, -100, 52, 53], [-100, -100, -100, 55, -100]]


def test_packed_by_hand(backend, poison):
    out = case("packed")
    assert out.inputs_embeds.squeeze(2).tolist() == [[1, 10, 11, 2, 9, 3, 12]]
    assert out.attention_mask is None
    assert out.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert out.labels.tolist() == [[-100, -100, -100, 52, 53, -100, -100]]  # 55 would follow the other prompt's 53
    assert out.cu_seqlens.tolist() == [0, 5, 7]


def test_with_room_to_spare(backend, poison):
    exact, roomy = case("right"), case("right", 7)
    assert torch.equal(roomy.inputs_embeds, torch.nn.functional.pad(exact.inputs_embeds, (0, 0, 0, 2)))
    assert torch.equal(roomy.labels, torch.nn.functional.pad(exact.labels, (0, 2), value=-100))
    exact, roomy = case("left"), case("left", 7)
    assert torch.equal(roomy.inputs_embeds, torch.nn.functional.pad(exact.inputs_embeds, (0, 0, 2, 0)))
    assert torch.equal(roomy.attention_mask, torch.nn.functional.pad(exact.attention_mask, (2, 0)))
    exact, roomy = case("packed"), case("packed", 9)
    assert torch.equal(roomy.inputs_embeds, torch.nn.functional.pad(exact.inputs_embeds, (0, 0, 0, 2)))
    assert roomy.position_ids[0, 7:].tolist() == [0, 0] and roomy.labels[0, 7:].tolist() == [-100, -100]
    assert roomy.cu_seqlens.tolist() == [0, 5, 7] and not roomy.overflowed()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_longest(backend, layout):
    """The longest prompt as a number, exact without a max_length."""
    assert case(layout).max_len == 5 and type(case(layout).max_len) is int
    assert case(layout, 9).max_len == 9


@pytest.mark.parametrize("roomy", [None, 12])
def test_packed_prompts_score_what_padded_ones_do(backend, poison, roomy):
    """A prompt that begins with text does not have its first token predicted by the prompt before it."""
    ids = here([[5, 0, 6, 7], [8, 9, 0, 3], [0, 4, 0, 0], [0, 0, 0, 0]])
    placeholder = here([[E, A, E, E], [E, E, A, E], [A, E, E, E], [E, E, E, E]])
    valid = here([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    labels = ids.masked_fill(placeholder | (valid == 0), -100)
    audio = segments([1], [2, 3], [])
    padded, packed = (
        splice(embeds([[0] * 4] * 4), audio, placeholder, valid, labels, layout, length)
        for layout, length in (("right", None), ("packed", roomy))
    )
    counted = [row[row != -100].tolist() for row in padded.labels[:, 1:]]
    assert counted == [[6, 7], [9, 3], [], []]
    shifted = packed.labels[0, 1:]
    assert shifted[shifted != -100].tolist() == sum(counted, [])
    head = torch.nn.Linear(1, 11).to(DEVICE)
    losses = [next_token_loss(x.inputs_embeds, head, x.labels) for x in (padded, packed)]
    assert losses[0][1] == losses[1][1] == 4


def test_overflow_is_told():
    """A max_length that is too small, which only an accelerator lets pass: what the kernels then report."""
    for layout in LAYOUTS:
        text, audio = embeds([[1, 0, 2, 9], [0, 3, 0, 9]]), segments([10, 11], [], [12])
        mask, valid = here([[E, A, E, E], [A, E, A, E]]), here([[1, 1, 1, 1], [1, 1, 1, 0]])
        with use_backend("triton"):
            ops = implementation("splice", text)
            ends, segment, home, report = ops.plan_splice(mask, valid, audio.cu_seqlens)
            plan = (audio.cu_seqlens, ends, segment, home, report[0])
            for length, missing in ((4, True), (5, layout == "packed"), (7, False)):
                rows = ops.splice_rows(text, audio.data, *plan, None, None, layout, length)
                out = Spliced(rows[0], rows[1], rows[2], None, rows[4], report[0], length)
                assert out.overflowed().item() is missing


def test_padding_on_the_left_of_the_input(backend):
    out = splice(embeds([[9, 9, 1, 0]]), segments([7, 8]), here([[E, E, E, A]]), here([[0, 0, 1, 1]]))
    assert out.inputs_embeds.squeeze(2).tolist() == [[1, 7, 8]]
    assert out.attention_mask.tolist() == [[1, 1, 1]] and out.labels is None


def test_no_placeholder_and_no_text(backend, poison):
    none = pack([torch.zeros(0, 1, device=DEVICE)])
    none = Packed(none.data, none.cu_seqlens[:1], none.lengths[:0], 0)
    out = splice(embeds([[1, 2], [3, 4]]), none, here([[E, E], [E, E]]), here([[1, 1], [0, 0]]).bool())
    assert out.inputs_embeds.squeeze(2).tolist() == [[1, 2], [0, 0]]
    assert out.attention_mask.tolist() == [[True, True], [False, False]]
    for layout in LAYOUTS:
        out = splice(embeds([[0]]), segments([]), here([[A]]), layout=layout)
        assert out.inputs_embeds.shape == (1, 0, 1) and out.cu_seqlens.tolist() == [0, 0]
        nobody = torch.zeros(0, 3, 1, device=DEVICE)
        out = splice(nobody, none, torch.zeros(0, 3, dtype=torch.bool, device=DEVICE), layout=layout)
        assert out.inputs_embeds.numel() == 0 and out.cu_seqlens.tolist() == [0]


def random_case(seed: int, dtype: torch.dtype = torch.float32):
    """Text, audio with two rows of nobody, placeholders, mask, labels, and the audio as a list."""
    generator = torch.Generator().manual_seed(seed)
    B, L, D = seed % 3 + 1, seed * 7 % 40 + 2, 3
    text = torch.randn(B, L, D, generator=generator).to(dtype)
    valid = torch.rand(B, L, generator=generator) < 0.8
    placeholders = (torch.rand(B, L, generator=generator) < 0.4) & valid
    labels = torch.randint(0, 99, (B, L), generator=generator)
    parts = [torch.randn(i % 4, D, generator=generator).to(dtype) for i in range(int(placeholders.sum()))]
    parts_and_rest = pack([*parts, torch.full((2, D), float("nan"), dtype=dtype)])
    audio = Packed(parts_and_rest.data, parts_and_rest.cu_seqlens[:-1], parts_and_rest.lengths[:-1], 3).to(DEVICE)
    text, valid, placeholders, labels = (x.to(DEVICE) for x in (text, valid, placeholders, labels))
    return text, audio, placeholders, valid, labels, [part.to(DEVICE) for part in parts]


@pytest.mark.conformance
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("blocks", [None, 16])
def test_matches_the_loop(backend, poison, seed, blocks, monkeypatch):
    if blocks is not None and backend == "triton":  # prompts, segments and batches that reach over several blocks
        from csrc_triton.splice import backward, forward

        for kernels in (forward, backward):
            monkeypatch.setattr(kernels, "block", lambda n, most=0: blocks)
    text, audio, placeholders, valid, labels, parts = random_case(seed)
    for layout in ("right", "left"):
        out = splice(text, audio, placeholders, valid, labels, layout)
        want = reference.splice(text, parts, placeholders.tolist(), valid.tolist(), labels.tolist(), layout == "left")
        assert torch.equal(out.inputs_embeds, want[0])
        assert out.attention_mask.long().tolist() == want[1]
        assert out.position_ids.tolist() == want[2] and out.labels.tolist() == want[3]
    packed = splice(text, audio, placeholders, valid, labels, "packed")
    assert packed.max_len == out.max_len == max(out.lengths.tolist())
    *_, first_ignored = reference.splice(
        text, parts, placeholders.tolist(), valid.tolist(), labels.tolist(), left=True, packed=True
    )
    keep = out.attention_mask.bool()
    assert torch.equal(packed.inputs_embeds[0], out.inputs_embeds[keep])
    assert torch.equal(packed.position_ids[0], out.position_ids[keep])
    assert torch.equal(packed.labels[0], torch.tensor(first_ignored, device=DEVICE)[keep])


@pytest.mark.conformance
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [4, 5])
def test_gradients_against_the_loops(backend, poison, layout, seed):
    """A row's gradient is its own weight, moved: bit for bit, whatever the dtype."""
    text, audio, placeholders, valid, labels, parts = random_case(seed, torch.bfloat16)
    text.requires_grad_()
    rows = audio.data.detach().requires_grad_()
    out = splice(text, audio.with_data(rows), placeholders, valid, labels, layout)
    weight = torch.randn(out.inputs_embeds.shape, device=DEVICE).bfloat16()
    got = torch.autograd.grad((out.inputs_embeds * weight).sum(), (text, rows))
    leaves = [part.requires_grad_() for part in parts]
    want_embeds = reference.splice(
        text, leaves, placeholders.tolist(), valid.tolist(), labels.tolist(), layout == "left"
    )[0]
    if layout == "packed":
        keep = torch.zeros(want_embeds.shape[:2], dtype=torch.bool, device=DEVICE)
        keep = torch.arange(keep.shape[1], device=DEVICE) < out.lengths[:, None]
        want_embeds = want_embeds[keep][None]
    want = torch.autograd.grad((want_embeds * weight).sum(), (text, *leaves), allow_unused=True)
    assert torch.equal(got[0], torch.zeros_like(text) if want[0] is None else want[0])
    assert torch.equal(got[1][:-2], torch.cat([x for x in want[1:] if x is not None] or [rows[:0]]))
    assert got[1][-2:].eq(0).all()  # rows of nobody


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_reach_both_sides(backend, layout):
    text = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True, device=DEVICE)
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True, device=DEVICE)
    base = segments([0, 0], [0])
    mask = here([[E, A, E], [A, E, E]])
    valid = here([[1, 1, 1], [1, 1, 0]])

    def f(text, rows):
        return splice(text, base.with_data(rows), mask, valid, layout=layout).inputs_embeds

    torch.autograd.gradcheck(f, (text, rows))
    f(text, rows).sum().backward()
    assert rows.grad.eq(1).all()
    assert text.grad[..., 0].tolist() == [[1, 0, 1], [0, 1, 0]]


def test_audio_is_cast_and_garbage_in_padding_dropped(backend, poison):
    text = embeds([[1, 0, 5]]).bfloat16()
    text[0, 2] = float("nan")
    audio = segments([2.0])
    rows = audio.data.requires_grad_()
    out = splice(text, audio, here([[E, A, E]]), here([[1, 1, 0]]))
    assert out.inputs_embeds.dtype == torch.bfloat16 and out.inputs_embeds.squeeze(2).tolist() == [[1, 2]]
    out.inputs_embeds.sum().backward()
    assert rows.grad.dtype == torch.float32 and rows.grad.tolist() == [[1]]


def test_strides_and_a_width_past_a_block(backend, poison):
    text = torch.randn(1100, 3, 2, device=DEVICE).permute(2, 1, 0).requires_grad_()
    rows = torch.randn(1100, 3, device=DEVICE).t().requires_grad_()
    audio = segments([0, 0], [0]).with_data(rows)
    labels = torch.arange(6, device=DEVICE).view(3, 2).t()
    out = splice(text, audio, here([[E, A, E], [E, E, A]]), labels=labels)
    want = torch.stack(
        [torch.cat([text[0, :1], rows[:2], text[0, 2:]]), torch.cat([text[1, :2], rows[2:], text[1, :1] * 0])]
    )
    assert torch.equal(out.inputs_embeds, want)
    assert out.labels.tolist() == [[0, -100, -100, 4], [1, 3, -100, -100]]
    grads = torch.autograd.grad(out.inputs_embeds.sum(), (text, rows))  # an expanded scalar
    assert grads[0][:, :, 0].tolist() == [[1, 0, 1], [1, 1, 0]] and grads[1].eq(1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_nobody_looks_at_stays_inside(backend, poison, layout):
    """What an accelerator does with values that do not fit, below the check: left out, and never out of bounds."""
    ops = implementation("splice", embeds([[0]]))
    text, rows = embeds([[1, 0, 2, 0], [0, 3, 0, 9]]), embeds([10, 11, 12, 13])
    placeholder = here([[E, A, E, A], [A, E, A, E]])
    valid = here([[1, 1, 1, 0], [1, 1, 1, 1]])  # the second placeholder lies in padding, the fourth has no segment
    cu_audio = here([0, 2, 3, 4]).int()
    ends, segment, home, report = ops.plan_splice(placeholder, valid, cu_audio)
    assert ends.tolist() == [[1, 3, 4, 4], [1, 2, 2, 3]] and segment.tolist() == [[-1, 0, -1, -2], [2, -1, -2, -1]]
    assert home.tolist() == [1, -1, 4] and report.tolist() == [[4, 3], [2, 2], [1, 0]]
    if backend == "torch" and DEVICE == "cpu":
        return  # on a CPU plain torch relies on the check from here on
    mask_dtype = None if layout == "packed" else torch.int64
    arguments = (text, rows, cu_audio, ends, segment, home, report[0], None, mask_dtype, layout)
    full = {"right": [[1, 10, 11, 2], [13, 3, 9, 0]], "left": [[1, 10, 11, 2], [0, 13, 3, 9]]}
    full["packed"] = [[1, 10, 11, 2, 13, 3, 9]]
    short = {"right": [[1, 10], [13, 3]], "left": [[11, 2], [3, 9]], "packed": [[1, 10]]}
    for length, want in ((len(full[layout][0]), full[layout]), (2, short[layout])):
        out = ops.splice_rows(*arguments, length)
        assert out[0].squeeze(2).tolist() == want
        assert out[4].tolist()[-1] == sum(x != 0 for row in want for x in row)
        backward = (report[0], out[4], layout)
        grad = ops.splice_text_backward(out[0], ends, segment, *backward)
        assert grad.squeeze(2).tolist() == [
            [x if x in sum(want, []) and s == -1 else 0 for x, s in zip(*pair)]
            for pair in zip(text.squeeze(2).tolist(), segment.tolist())
        ]
        grad = ops.splice_audio_backward(out[0], cu_audio, ends, home, *backward, 4, torch.float32)
        assert grad.squeeze(1).tolist() == [x if x in sum(want, []) else 0 for x in (10, 11, 12, 13)]


def test_offsets_past_the_audio_read_nothing(poison):
    """An accelerator does not look at a Packed's values: rows that are not there come out as 0."""
    with use_backend("triton"):
        text, placeholder = embeds([[1, 0, 2]]), here([[E, A, E]])
        ops = implementation("splice", text)
        cu_audio = here([0, 3]).int()
        ends, segment, home, report = ops.plan_splice(placeholder, None, cu_audio)
        rows = torch.arange(10.0, 20.0, device=DEVICE).view(-1, 1)[:2]  # more memory lies behind the two rows
        out = ops.splice_rows(text, rows, cu_audio, ends, segment, home, report[0], None, None, "packed", 5)
        assert out[0].squeeze(2).tolist() == [[1, 10, 11, 0, 2]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_length", [None, 200])
def test_two_launches_forward_one_backward_a_side_and_nothing_beside(launches, layout, max_length):
    text, audio, placeholders, valid, labels, _ = random_case(5)
    with use_backend("triton"), TorchOps() as seen:
        out = _splice._init_fn(text, audio.data, audio.cu_seqlens, placeholders, valid, labels, layout, max_length)
        assert launches == ["_plan_kernel", "_rows_kernel"]
        grad, *_, cu_seqlens, lengths, ends, segment, home = out
        _splice_text_backward._init_fn(grad, ends, segment, lengths, cu_seqlens, layout)
        assert launches[2:] == ["_text_backward_kernel"]
        _splice_audio_backward._init_fn(
            grad, audio.cu_seqlens, ends, home, lengths, cu_seqlens, layout, audio.total, torch.float32
        )
        assert launches[3:] == ["_audio_backward_kernel"]
    assert len(seen.names) == (DEVICE == "cuda" and max_length is None)  # one copy to the host, or none


def test_a_frozen_side_costs_nothing(launches):
    text, audio, placeholders, valid, labels, _ = random_case(5)
    with use_backend("triton"):
        rows = audio.data.requires_grad_()
        splice(text, audio.with_data(rows), placeholders, valid, labels).inputs_embeds.sum().backward()
        assert launches[2:] == ["_audio_backward_kernel"]
        launches.clear()
        text.requires_grad_()
        splice(text, audio.with_data(rows.detach()), placeholders, valid, labels).inputs_embeds.sum().backward()
        assert launches[2:] == ["_text_backward_kernel"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(backend, layout):
    text, audio, placeholders, valid, labels, _ = random_case(1)
    text.requires_grad_()
    rows = audio.data.nan_to_num().requires_grad_()
    for rest in ((valid, labels, layout, None), (None, None, layout, 200)):
        torch.library.opcheck(_splice, (text, rows, audio.cu_seqlens, placeholders, *rest))
    with torch.no_grad():
        out = _splice(text, rows, audio.cu_seqlens, placeholders, valid, labels, layout, None)
    grad, *_, cu_seqlens, lengths, ends, segment, home = out
    torch.library.opcheck(_splice_text_backward, (grad, ends, segment, lengths, cu_seqlens, layout))
    torch.library.opcheck(
        _splice_audio_backward,
        (grad, audio.cu_seqlens, ends, home, lengths, cu_seqlens, layout, audio.total, torch.bfloat16),
    )


def test_refuses():
    text, mask = embeds([[1, 0], [1, 0]]).cpu(), torch.tensor([[E, A], [E, A]])
    one, two = segments([1]).to("cpu"), segments([1], [2]).to("cpu")
    with pytest.raises(ValueError, match="2 placeholders, but audio holds 1 segments; every row has 1$"):
        splice(text, one, mask)
    with pytest.raises(ValueError, match="with 1 a row, row 0 has 0$"):
        splice(text, two, torch.tensor([[E, E], [E, A]]))
    many = torch.zeros(30, 4, dtype=torch.bool)
    many[:, 1] = True
    for wrong, count, message in [
        ((20, 29), 30, "28 placeholders, but audio holds 30 segments; with 1 a row, row 20 has 0, row 29 has 0$"),
        ((20,), 31, "29 placeholders, but audio holds 31 segments; most rows have 1, row 20 has 0$"),
        (range(9, 20), 30, "row 16 has 0 and 3 rows more differ$"),
        (
            (),
            60,
            "30 placeholders, but audio holds 60 segments; with 2 a row, row 0 has 1, .* and 22 rows more differ$",
        ),
    ]:
        odd = many.clone()
        odd[list(wrong)] = False
        with pytest.raises(ValueError, match=message):
            splice(torch.zeros(30, 4, 1), segments(*[[1]] * count).to("cpu"), odd)
    with pytest.raises(ValueError, match="but audio holds 1 segments; there are no rows"):
        splice(torch.zeros(0, 4, 1), one, torch.zeros(0, 4, dtype=torch.bool))
    for max_length in (None, 4):
        with pytest.raises(ValueError, match="row 1 that attention_mask calls padding"):
            splice(text, two, mask, torch.tensor([[1, 1], [1, 0]]), max_length=max_length)
    for layout, needed in (("right", 2), ("left", 2), ("packed", 4)):
        with pytest.raises(ValueError, match=f"max_length is {needed - 1}, but {needed} positions are needed"):
            splice(text, two, mask, layout=layout, max_length=needed - 1)
    for error, name, change in [
        (ValueError, "layout", {"layout": "middle"}),
        (TypeError, "placeholder_mask", {"placeholder_mask": mask.long()}),
        (ValueError, "placeholder_mask", {"placeholder_mask": mask[:1]}),
        (ValueError, "attention_mask", {"attention_mask": mask[:1]}),
        (ValueError, "labels", {"labels": mask[:, :1].long()}),
        (ValueError, "text_embeds", {"text_embeds": text[0]}),
        (TypeError, "text_embeds", {"text_embeds": text.long()}),
        (ValueError, "audio", {"text_embeds": text.expand(2, 2, 3)}),
        (TypeError, "audio", {"audio": two.to(torch.int64)}),
        (TypeError, "text_embeds is a DTensor", {"text_embeds": text.as_subclass(DTensor)}),
        (TypeError, "audio is a DTensor", {"audio": two.with_data(two.data.as_subclass(DTensor))}),
        (TypeError, "placeholder_mask is a DTensor", {"placeholder_mask": mask.as_subclass(DTensor)}),
        (TypeError, "attention_mask is a DTensor", {"attention_mask": mask.long().as_subclass(DTensor)}),
        (TypeError, "labels is a DTensor", {"labels": mask.long().as_subclass(DTensor)}),
        (ValueError, "max_length", {"max_length": -1}),
    ]:
        arguments = {"text_embeds": text, "audio": two, "placeholder_mask": mask, **change}
        with pytest.raises(error, match=name):
            splice(**arguments)
