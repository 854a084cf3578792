"""Tiny random parts, synthetic speech, and models built of them, for the tests of model and trainer."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

RATE = 16_000
VOCABULARY = 200
HIDDEN = 48
SENTENCES = (
    "turn on the red lamp",
    "turn off the green lamp",
    "open the door",
    "close the blue window",
    "play some music",
    "stop",
    "call my mother now",
    "what is the time",
    "set the lamp to blue",
    "set the heat to nine",
    "good morning",
    "no no no",
)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Parts:
    whisper: str
    llm: str


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 5,  # leaves rows of the embedding unused, as real LLMs do
        special_tokens=["<unk>", "<pad>", "<s>", "</s>"],
        initial_alphabet=[*string.ascii_letters, *string.digits, *".,:?'", "Ġ", "Ċ"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, "Transcribe the audio.", "user\n", "assistant\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


def make_parts(folder: Path) -> Parts:
    """A random Whisper and a random Llama with tied embeddings, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(0)
    whisper = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=80,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    WhisperModel(whisper).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder / "whisper")
    tokenizer = make_tokenizer()
    llama = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # outputs that depend on the input enough to tell answers apart
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return Parts(str(folder / "whisper"), str(folder / "llm"))


def make_wave(seed: int, seconds: float) -> np.ndarray:
    """A melody of tones with some noise, one tone every 0.2 s."""
    rng = np.random.default_rng(seed)
    count = int(seconds * RATE)
    pitch = rng.uniform(150, 3000, 1 + count // (RATE // 5)).repeat(RATE // 5)[:count]
    wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 0.02 * rng.standard_normal(count)
    return wave.astype(np.float32)


def seconds_of(index: int) -> float:
    return round(0.3 + 2.7 * (index * 7 % 12) / 11, 2)


def make_speech(folder: Path) -> Path:
    """Twelve wavs of 0.3 to 3 s; train.jsonl, valid.jsonl, and broken.jsonl with audio that cannot be used."""
    rows = []
    for index, text in enumerate(SENTENCES):
        soundfile.write(folder / f"{index}.wav", make_wave(index, seconds_of(index)), RATE)
        row = {"id": f"u{index}", "audio": f"{index}.wav", "duration": seconds_of(index), "text": text}
        colours = [word for word in text.split() if word in ("red", "green", "blue")]
        if colours:
            row["slots"] = {"colorName": colours[0]}
        rows.append({**row, "speaker": f"s{index % 4}"})
    write_manifest(folder / "train.jsonl", rows)
    write_manifest(folder / "valid.jsonl", rows[:3])
    (folder / "text.wav").write_text("this is no audio")
    soundfile.write(folder / "empty.wav", np.zeros(0, np.float32), RATE)
    bad = [
        {"id": f"bad-{name}", "audio": f"{name}.wav", "duration": 1.0, "text": "stop"}
        for name in ("text", "empty", "missing")
    ]
    write_manifest(folder / "broken.jsonl", [*rows[:2], *bad])
    return folder


def write_manifest(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_model(parts: Parts, with_language_model: bool = True, **config):
    """(model in eval mode, processor): fresh adapters; `spread` them so that they do something."""
    from transformers import AutoConfig

    from soundwave_fast.model import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveProcessor

    text = AutoConfig.from_pretrained(parts.llm)
    architecture = SoundwaveConfig(
        AutoConfig.from_pretrained(parts.whisper), text, audio_tower=parts.whisper, language_model=parts.llm, **config
    )
    processor = SoundwaveProcessor.from_parts(parts.whisper, parts.llm, encoder_pad=architecture.encoder_pad)
    architecture.audio_token_id = processor.audio_token_id
    model = SoundwaveForConditionalGeneration.from_parts(architecture, with_language_model=with_language_model)
    return spread(model).eval(), processor


@torch.no_grad()
def spread(model):
    """Random values wherever an adapter starts at zero or one: a part that is ignored then changes the output."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.startswith(("ctc_head", "shrinking_adapter", "alignment_adapter")):
            if "norm" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            elif "blank_row" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def add_lora(model, rank: int = 4):
    """LoRA round the LLM with a B that is not zero."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=8, target_modules=r".*\.(q_proj|v_proj|down_proj)", task_type="CAUSAL_LM")
    model.language_model = get_peft_model(model.language_model, lora)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def training_inputs(processor, seconds=(0.6, 1.7, 2.4), prompt: str = "Transcribe the audio.") -> dict[str, Tensor]:
    """What the trainer hands to the model: right-padded prompt and answer, mels, CTC targets."""
    waves = [make_wave(i, s) for i, s in enumerate(seconds)]
    ids = processor.tokenizer(processor.prompt(prompt), add_special_tokens=False).input_ids
    answers = [processor.answer_ids(SENTENCES[i]) for i in range(len(waves))]
    targets = [processor.ctc_ids(SENTENCES[i]) for i in range(len(waves))]
    longest = max(map(len, answers))
    pad = processor.tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + a + [pad] * (longest - len(a)) for a in answers]),
        "attention_mask": torch.tensor([[1] * (len(ids) + len(a)) + [0] * (longest - len(a)) for a in answers]),
        "labels": torch.tensor([[-100] * len(ids) + a + [-100] * (longest - len(a)) for a in answers]),
        "input_features": processor.pad_mels([processor.log_mel(w) for w in waves]),
        "feature_lengths": torch.tensor([processor.mel_length(w) for w in waves]),
        "ctc_targets": torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in targets], batch_first=True),
        "ctc_target_lengths": torch.tensor([len(t) for t in targets]),
    }
