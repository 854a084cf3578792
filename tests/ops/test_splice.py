"""splice: exact cases written by hand, random ones against a loop, gradients and refusals."""

import pytest
import torch

from soundwave_fast.ops import reference, splice
from soundwave_fast.packed import Packed, pack

A, E = True, False  # placeholder or not


def embeds(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)[..., None]


def segments(*rows) -> Packed:
    return pack([torch.tensor(r, dtype=torch.float32).view(-1, 1) for r in rows])


def case(layout):
    """Two prompts: `1 <audio> 2`, and `<audio> 3 <audio>` padded by one; segments of 2, 0 and 1 rows."""
    return splice(
        embeds([[1, 0, 2, 9], [0, 3, 0, 9]]),
        segments([10, 11], [], [12]),
        torch.tensor([[E, A, E, E], [A, E, A, E]]),
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        torch.tensor([[-100, 51, 52, 53], [54, 55, 56, 57]]),
        layout,
    )


def test_right_by_hand():
    out = case("right")
    assert out.inputs_embeds.squeeze(2).tolist() == [[1, 10, 11, 2, 9], [3, 12, 0, 0, 0]]
    assert out.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert out.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert out.labels.tolist() == [[-100, -100, -100, 52, 53], [55, -100, -100, -100, -100]]
    assert out.cu_seqlens.tolist() == [0, 5, 7] and out.cu_seqlens.dtype == torch.int32


def test_left_by_hand():
    out = case("left")
    assert out.inputs_embeds.squeeze(2).tolist() == [[1, 10, 11, 2, 9], [0, 0, 0, 3, 12]]
    assert out.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert out.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert out.labels.tolist() == [[-100, -100, -100, 52, 53], [-100, -100, -100, 55, -100]]


def test_packed_by_hand():
    out = case("packed")
    assert out.inputs_embeds.squeeze(2).tolist() == [[1, 10, 11, 2, 9, 3, 12]]
    assert out.attention_mask is None
    assert out.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert out.labels.tolist() == [[-100, -100, -100, 52, 53, 55, -100]]
    assert out.cu_seqlens.tolist() == [0, 5, 7]


def test_padding_on_the_left_of_the_input():
    out = splice(embeds([[9, 9, 1, 0]]), segments([7, 8]), torch.tensor([[E, E, E, A]]), torch.tensor([[0, 0, 1, 1]]))
    assert out.inputs_embeds.squeeze(2).tolist() == [[1, 7, 8]]
    assert out.attention_mask.tolist() == [[1, 1, 1]] and out.labels is None


def test_no_placeholder_and_no_text():
    none = pack([torch.zeros(0, 1)])
    none = Packed(none.data, none.cu_seqlens[:1], none.lengths[:0], 0)
    out = splice(embeds([[1, 2], [3, 4]]), none, torch.zeros(2, 2).bool(), torch.tensor([[1, 1], [0, 0]]).bool())
    assert out.inputs_embeds.squeeze(2).tolist() == [[1, 2], [0, 0]]
    assert out.attention_mask.tolist() == [[True, True], [False, False]]
    out = splice(embeds([[0]]), segments([]), torch.tensor([[A]]))
    assert out.inputs_embeds.shape == (1, 0, 1) and out.cu_seqlens.tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(12))
def test_matches_the_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    B, L, D = seed % 3 + 1, seed % 5 + 2, 3
    text = torch.randn(B, L, D, generator=generator)
    valid = torch.rand(B, L, generator=generator) < 0.8
    placeholders = (torch.rand(B, L, generator=generator) < 0.4) & valid
    labels = torch.randint(0, 99, (B, L), generator=generator)
    parts = [torch.randn(i % 4, D, generator=generator) for i in range(int(placeholders.sum()))]
    audio = pack([*parts, torch.zeros(0, D)])
    audio = Packed(audio.data, audio.cu_seqlens[:-1], audio.lengths[:-1], audio.max_len)
    for layout in ("right", "left"):
        out = splice(text, audio, placeholders, valid, labels, layout)
        want = reference.splice(text, parts, placeholders.tolist(), valid.tolist(), labels.tolist(), layout == "left")
        assert torch.equal(out.inputs_embeds, want[0])
        assert out.attention_mask.long().tolist() == want[1]
        assert out.position_ids.tolist() == want[2] and out.labels.tolist() == want[3]
    packed = splice(text, audio, placeholders, valid, labels, "packed")
    keep = out.attention_mask.bool()
    assert torch.equal(packed.inputs_embeds[0], out.inputs_embeds[keep])
    assert torch.equal(packed.position_ids[0], out.position_ids[keep])
    assert torch.equal(packed.labels[0], out.labels[keep])


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_gradients_reach_both_sides(layout):
    text = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    base = segments([0, 0], [0])
    mask = torch.tensor([[E, A, E], [A, E, E]])
    valid = torch.tensor([[1, 1, 1], [1, 1, 0]])

    def f(text, rows):
        return splice(text, base.with_data(rows), mask, valid, layout=layout).inputs_embeds

    torch.autograd.gradcheck(f, (text, rows))
    f(text, rows).sum().backward()
    assert rows.grad.eq(1).all()
    assert text.grad[..., 0].tolist() == [[1, 0, 1], [0, 1, 0]]


def test_audio_is_cast_and_garbage_in_padding_dropped():
    text = embeds([[1, 0, 5]]).bfloat16()
    text[0, 2] = float("nan")
    out = splice(text, segments([2.0]), torch.tensor([[E, A, E]]), torch.tensor([[1, 1, 0]]))
    assert out.inputs_embeds.dtype == torch.bfloat16 and out.inputs_embeds.isfinite().all()


def test_refuses():
    text, mask = embeds([[1, 0], [1, 0]]), torch.tensor([[E, A], [E, A]])
    with pytest.raises(ValueError, match="2 placeholders, but audio holds 1 segments"):
        splice(text, segments([1]), mask)
    with pytest.raises(ValueError, match="row 0 has 0, .*|row 0 has 0$"):
        splice(text, segments([1], [2]), torch.tensor([[E, E], [E, A]]))
    with pytest.raises(ValueError, match="row 1"):
        splice(text, segments([1], [2]), mask, torch.tensor([[1, 1], [1, 0]]))
    good = segments([1], [2])
    for error, name, change in [
        (ValueError, "layout", {"layout": "middle"}),
        (TypeError, "placeholder_mask", {"placeholder_mask": mask.long()}),
        (ValueError, "placeholder_mask", {"placeholder_mask": mask[:1]}),
        (ValueError, "attention_mask", {"attention_mask": mask[:1]}),
        (ValueError, "labels", {"labels": mask[:, :1].long()}),
        (ValueError, "text_embeds", {"text_embeds": text[0]}),
        (ValueError, "audio", {"text_embeds": text.expand(2, 2, 3)}),
    ]:
        arguments = {"text_embeds": text, "audio": good, "placeholder_mask": mask, **change}
        with pytest.raises(error, match=name):
            splice(**arguments)
