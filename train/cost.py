"""FLOPs and bytes of a training step, part by part, from the sizes of the model and of the batch.

Linear layers are counted as 2 FLOPs a weight and row: once forward, once for the gradient of their input, and once for
that of their weight where it trains. The encoder is frozen and below everything that trains: forward only. Attention is
counted as two products a head forward and twice that backward, causal ones by half. soundwave_fast/cost_model.py has
the ops.
"""

from __future__ import annotations

from dataclasses import dataclass

from soundwave_fast import cost_model
from soundwave_fast.cost_model import ITEM, Cost
from soundwave_fast.model.alignment_adapter import STACK
from soundwave_fast.model.config import SoundwaveConfig


@dataclass(frozen=True)
class Work:
    """What one step has to do; sums over the batch."""

    utterances: int
    encoder_frames: int  # 50 a second
    audio_tokens: int = 0  # what the LLM reads of them
    text_tokens: int = 0  # prompts and answers
    predicted: int = 0  # tokens with a loss
    ctc_classes: int = 0  # the softmax of the CTC head; 0: all of them


def llm_linears(text: object) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linear layers of a Llama-like layer."""
    width, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * head
    inner = text.intermediate_size
    return {
        "q_proj": (width, heads * head),
        "k_proj": (width, keys),
        "v_proj": (width, keys),
        "o_proj": (heads * head, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }


def _dense(weights: float, rows: float, passes: int, dtype: str) -> Cost:
    return Cost(passes * 2.0 * weights * rows, passes * weights * ITEM[dtype])


def encoder(config: SoundwaveConfig, work: Work, dtype: str) -> Cost:
    """Whisper's encoder, forward alone."""
    audio, frames = config.audio_config, work.encoder_frames
    width, each = audio.d_model, frames / max(1, work.utterances)
    weights = audio.encoder_layers * (4 * width * width + 2 * width * audio.encoder_ffn_dim)
    convolutions = 3 * (2 * audio.num_mel_bins * width + width * width)  # conv1 runs on twice as many positions
    attention = Cost(audio.encoder_layers * 4.0 * frames * each * width, 0.0)
    return _dense(weights + convolutions, frames, 1, dtype) + attention


def llm(config: SoundwaveConfig, work: Work, dtype: str, lora_rank: int, recomputed: bool = False) -> Cost:
    """The LLM's layers with LoRA on all linear layers, and its head on the predicted tokens."""
    text, tokens = config.text_config, work.audio_tokens + work.text_tokens
    linears = llm_linears(text).values()
    layers, passes = text.num_hidden_layers, 3 if recomputed else 2
    weights = layers * sum(a * b for a, b in linears)
    lora = layers * sum(lora_rank * (a + b) for a, b in linears)
    width = llm_linears(text)["q_proj"][1]
    each = tokens / max(1, work.utterances)
    attention = Cost((passes + 1) * layers * 2.0 * tokens * each * width, 0.0)
    head = _dense(text.vocab_size * text.hidden_size, work.predicted, 2, dtype)
    return _dense(weights, tokens, passes, dtype) + _dense(lora, tokens, passes + 1, dtype) + attention + head


def parts(
    config: SoundwaveConfig, stage: int, work: Work, dtype: str, lora_rank: int = 64, recomputed: bool = False
) -> dict[str, Cost]:
    """Part -> cost of forward and backward of one step.

    Args:
        dtype: of the matmuls, a key of `cost_model.ITEM`.
        recomputed: activation checkpointing: the LLM's forward runs twice.
    """
    width, heads = config.hidden_size, config.text_config.num_attention_heads
    count = max(1, work.utterances)
    frames = work.encoder_frames / STACK
    each = frames / count
    classes = work.ctc_classes or config.ctc_vocab_size
    stacked = STACK * config.audio_config.d_model
    over_time = config.adapter_attention == "time"
    costs = {
        "encoder": encoder(config, work, dtype),
        "alignment adapter": cost_model.alignment_adapter(count, each, stacked, width, 2 * width, over_time, dtype),
        "CTC": cost_model.linear_ctc_loss(frames, width, classes, dtype, config.ctc_head == "free"),
    }
    if stage > 1:
        kept = work.audio_tokens / count
        costs["shrinking adapter"] = cost_model.shrinking_adapter(count, kept, each, width, heads, dtype)
        costs["LLM"] = llm(config, work, dtype, lora_rank, recomputed)
    return costs
