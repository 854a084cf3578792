"""Stage 2's start: the shrinking adapter is fitted, in closed form, to put audio tokens where the LLM keeps its own."""

from __future__ import annotations

import torch

from soundwave_fast.model.shrinking_adapter import ShrinkingAdapter

MIN_FRAMES_PER_DIMENSION = 8


def fit_shrinking_adapter(trainer, batches: int = 400) -> float | None:
    """Collect peaks of the training speech with the stage-1 adapter and fit; None where nothing can be fitted.

    Runs before sharding, on the same batches on every rank, so that all ranks start alike. Stops after `batches`, or
    once there are enough frames, or when an epoch is over.

    Args:
        trainer: a `Trainer` whose model has just been built.
    """
    model = trainer.model
    adapter: ShrinkingAdapter = model.shrinking_adapter
    if not adapter.look_back:
        return None
    enough = MIN_FRAMES_PER_DIMENSION * model.config.hidden_size
    frames, tokens, found, seen = [], [], 0, 0
    was_training = model.training
    model.eval()
    loader = iter(trainer.make_loader(rank=0, world=1))
    with torch.no_grad():
        for _ in range(batches):
            batch = next(loader)
            with trainer.autocast():
                heard = model.hear(*trainer.encoded(batch))
            peaks = adapter.peaks(heard.hidden_BTD, heard.tokens_BT, heard.lengths, heard.log_probs_BT)
            picked = heard.tokens_BT.flatten()[peaks.index]
            content = picked != model.ctc_head.blank
            frames.append(peaks.data[content].float())
            tokens.append(picked[content])
            found, seen = found + len(tokens[-1]), seen + len(batch.ids)
            if found >= enough or seen >= len(trainer.rows):
                break
    model.train(was_training)
    if not found:
        return None
    return adapter.fit_embedding(torch.cat(frames), torch.cat(tokens), model.get_input_embeddings().weight)
