"""The LLM on audio tokens: questions of like length in left-padded batches, answers in the order they came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from soundwave_fast.hearing import Audio, HeardWindow, batches
from soundwave_fast.ops import Packed


@dataclass(frozen=True)
class Question:
    """Audio tokens to put before the LLM, and what they came from."""

    source: int
    audio: Tensor | None  # (n, D)
    window: HeardWindow | None = None
    error: Exception | None = None

    def rows(self) -> int:
        return 0 if self.audio is None else len(self.audio)


def as_list(audio: Audio | Sequence[Audio]) -> tuple[list[Audio], bool]:
    """One recording or a list of them as a list, and whether it was one."""
    several = isinstance(audio, (list, tuple))
    return (list(audio) if several else [audio]), several


def results(found: Iterable, several: bool) -> Any:
    """All of `found` (or the one it holds, unless `several`); the first exception among them is raised."""
    good = []
    for result in found:
        if isinstance(result, Exception):
            raise result
        good.append(result)
    return good if several else good[0]


def need_llm(model: Any) -> None:
    """Raises ValueError for a model without its LLM."""
    if model.language_model is None:
        raise ValueError("model: loaded without its LLM (with_language_model=False)")


def ask(
    model: Any,
    processor: Any,
    questions: Iterable[Question],
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
    options: dict,
    ask_silence: bool = False,
) -> Iterator[tuple[Question, str]]:
    """Each question with the LLM's text, in order; batches hold questions of like length.

    Where something went wrong, or there is no audio and not `ask_silence`, the LLM is not asked and the text is empty.
    """

    def length(question: Question) -> int:
        return 0 if question.error is not None else question.rows() + ask_silence

    for pool, groups in batches(questions, batch_size, length):
        texts: dict[int, str] = {}
        for group in groups:
            own = [pool[i] for i in group]
            texts.update(zip(group, generate(model, processor, own, prompt, max_new_tokens, options)))
        for i, question in enumerate(pool):
            yield question, texts.get(i, "")


def generate(
    model: Any, processor: Any, questions: Sequence[Question], prompt: str, max_new_tokens: int, options: dict
) -> list[str]:
    """The LLM's answers to one prompt about a batch of audios; greedy unless `options` say otherwise."""
    tokenizer, embedding = processor.tokenizer, model.get_input_embeddings().weight
    texts = [processor.prompt(prompt)] * len(questions)
    encoded = tokenizer(texts, return_tensors="pt", add_special_tokens=False).to(embedding.device)
    nothing = embedding.new_zeros(0, embedding.shape[1])
    audio = Packed.from_list([nothing if q.audio is None else q.audio.to(nothing) for q in questions])
    settings = {"do_sample": False, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings.update(max_new_tokens=max_new_tokens, **options)
    tokens = model.generate(encoded.input_ids, encoded.attention_mask, audio=audio, **settings)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
