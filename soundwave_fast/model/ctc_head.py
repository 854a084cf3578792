"""CTC head over the LLM's own token ids plus one blank: tied to the LLM's frozen embedding, or free as released."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from soundwave_fast.model.config import SoundwaveConfig
from soundwave_fast.ops import linear_argmax, linear_ctc_loss


class CTCHead(nn.Module):
    """Scores adapter frames against the vocabulary (paper section 3.2; released `audio_feature_head`).

    'free': `audio_feature_head.weight` (V_ctc, D) trains. 'tied': the rows are the LLM's token embeddings, handed in
    by the model at each call and never copied; only `blank_row` (D,) trains. It needs no (V, D) gradient and learns
    more slowly: a free head's rows go to meet the frames, here the frames have to go all the way.
    """

    def __init__(self, config: SoundwaveConfig) -> None:
        super().__init__()
        self.tied = config.ctc_head == "tied"
        self.blank = config.ctc_blank_id
        if self.tied:
            self.blank_row = nn.Parameter(torch.zeros(config.hidden_size))
        else:
            self.audio_feature_head = nn.Linear(config.hidden_size, config.ctc_vocab_size, bias=False)

    def _rows(self, embedding_VD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.tied:
            return self.audio_feature_head.weight, None
        if embedding_VD is None:
            raise ValueError("embedding_VD: a tied CTC head needs the LLM's token embedding")
        return embedding_VD, self.blank_row

    def loss(
        self,
        hidden_BTD: Tensor,
        lengths: Tensor,  # (B,) frames
        targets_BS: Tensor,  # (B, S) token ids, padding past target_lengths is not read
        target_lengths: Tensor,  # (B,)
        embedding_VD: Tensor | None = None,
        return_argmax: bool = False,
        candidates: Tensor | None = None,  # (K,) distinct token ids, sorted, no blank
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(sum over utterances of nll / target length, number of utterances, argmax tokens (B, T) or None).

        An utterance without a transcript (target length 0) is not counted; one whose target does not fit its frames
        adds 0 (`zero_infinity`, as released). With `candidates` the
        softmax runs over those tokens and the blank alone: an upper bound on the probabilities that costs K / V of
        the time, meant for short CPU runs; every target must be among them.

        Raises:
            ValueError: a target that is not among `candidates`.
        """
        weight, blank_row = self._rows(embedding_VD)
        blank = self.blank
        if candidates is not None:
            if return_argmax:
                raise ValueError("return_argmax: needs the whole vocabulary, not candidates")
            targets_BS, blank = self._to_candidates(targets_BS, target_lengths, candidates)
            rows = candidates if self.tied else torch.cat([candidates, candidates.new_tensor([self.blank])])
            weight = weight.index_select(0, rows)
        on_device = target_lengths.to(hidden_BTD.device, non_blocking=True)
        has_text = on_device > 0
        total = linear_ctc_loss(
            hidden_BTD,
            weight,
            targets_BS,
            lengths,
            target_lengths,
            blank=blank,
            reduction="sum",
            zero_infinity=True,
            return_argmax=return_argmax,
            blank_row=blank_row,
            utterance_weights=has_text.double() / on_device.clamp_min(1),
        )
        total, tokens = total if return_argmax else (total, None)
        return total, has_text.sum(), tokens

    @staticmethod
    def _to_candidates(targets_BS: Tensor, target_lengths: Tensor, candidates: Tensor) -> tuple[Tensor, int]:
        position = torch.searchsorted(candidates, targets_BS.clamp_min(0)).clamp_max(len(candidates) - 1)
        used = torch.arange(targets_BS.shape[1], device=targets_BS.device) < target_lengths[:, None]
        if bool((used & (candidates[position] != targets_BS)).any()):
            raise ValueError("candidates: does not contain every target token")
        return position, len(candidates)

    def forward(
        self, hidden_BTD: Tensor, lengths: Tensor | None = None, embedding_VD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`greedy`."""
        return self.greedy(hidden_BTD, lengths, embedding_VD)

    def greedy(
        self,
        hidden_BTD: Tensor,
        lengths: Tensor | None = None,  # (B,) frames; None: all
        embedding_VD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # (B, T) each, without gradients
        """Most probable class of every frame and its log-probability; past a length the blank and 0."""
        weight, blank_row = self._rows(embedding_VD)
        return linear_argmax(hidden_BTD, weight, lengths, self.blank, blank_row=blank_row)
