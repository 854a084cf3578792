"""Answers about recordings: the shrunk audio tokens of all their windows in one prompt, batched or streamed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from soundwave_fast.asking import Question, as_list, ask, generate, need_llm, results
from soundwave_fast.audio import MAX_SECONDS
from soundwave_fast.hearing import Audio, HeardWindow, Unheard, hear


def answers(
    model: Any,
    processor: Any,
    audios: Iterable[Audio],
    prompt: str,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    window_seconds: float = MAX_SECONDS,
    **options: Any,
) -> Iterator[str | Exception]:
    """The LLM's answer to `prompt` about each recording, in order; an exception for one that cannot be answered.

    The windows of a long recording are shrunk one by one and their audio tokens concatenated in one prompt, in the
    place of its placeholder (paper section 3.3: shrunk to a few tokens a second, they fit).

    Raises:
        ValueError: arguments out of range, or a model that was loaded without its LLM. A recording with more audio
            tokens than the LLM's context holds comes as a ValueError among the answers.
    """
    need_llm(model)
    room = _room(model, processor, prompt, max_new_tokens)
    heard = hear(model, processor, audios, batch_size, window_seconds)
    asked = ask(model, processor, _whole(heard, room), prompt, batch_size, max_new_tokens, options, ask_silence=True)
    return (question.error or text for question, text in asked)


def _room(model: Any, processor: Any, prompt: str, max_new_tokens: int) -> int:
    """How many audio tokens fit into the LLM's context beside the prompt and its answer."""
    ids = processor.tokenizer(processor.prompt(prompt), add_special_tokens=False).input_ids
    context = model.config.text_config.max_position_embeddings
    room = context - (len(ids) - 1) - max_new_tokens
    if room < 1:
        raise ValueError(
            f"prompt: {len(ids)} tokens and {max_new_tokens} new ones leave no room for audio in a context of {context}"
        )
    return room


def _whole(heard: Iterable[HeardWindow | Unheard], room: int) -> Iterator[Question]:
    """One question a recording: the audio tokens of its windows end to end.

    Windows in which CTC hears nothing (one blank frame each) count only where all are like that.
    """
    source, rows, spare, error = 0, [], None, None
    for window in heard:
        if window.source != source:
            yield _concatenated(source, rows, spare, error)
            source, rows, spare, error = window.source, [], None, None
        if isinstance(window, Unheard):
            error = error or window.error
        elif error is None and window.runs and window.audio is not None:
            rows.append(window.audio)
            if sum(map(len, rows)) > room:
                error = ValueError(
                    f"audio: its first {window.stop_seconds:.0f} s already fill more than the {room} audio tokens that "
                    "the LLM's context has room for"
                )
                rows = []
        elif spare is None:
            spare = window.audio
    yield _concatenated(source, rows, spare, error)


def _concatenated(source: int, rows: list[Tensor], spare: Tensor | None, error: Exception | None) -> Question:
    return Question(source, None if error is not None else torch.cat(rows) if rows else spare, error=error)


def answer(
    model: Any,
    processor: Any,
    audio: Audio | Sequence[Audio],
    prompt: str,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    **options: Any,
) -> str | list[str]:
    """The LLM's answer to `prompt` about one recording of any length, or the list of answers about each of a list.

    Raises:
        FileNotFoundError, ValueError: a recording that cannot be read or is too long for the LLM's context.
    """
    audios, several = as_list(audio)
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, **options}
    return results(answers(model, processor, audios, prompt, **settings), several)


def stream_answer(
    model: Any,
    processor: Any,
    audio: Audio,
    prompt: str,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    window_seconds: float = MAX_SECONDS,
    **options: Any,
) -> Iterator[str]:
    """`answer` piece by piece, as the LLM writes it; joined and stripped the pieces are its result.

    Closing the iterator stops the LLM, and so does any of the `stopping_criteria` among the options.

    Raises (at the first piece):
        FileNotFoundError, ValueError: as `answer`; a `streamer` among the options, this one has its own.
        TypeError: `stopping_criteria` that are no list.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    if options.get("streamer") is not None:
        raise ValueError("streamer: the pieces come from stream_answer's own; answer takes another")
    own = options.get("stopping_criteria")
    if own is not None and not isinstance(own, (list, tuple)):
        raise TypeError(f"stopping_criteria: a list of criteria, got {type(own).__name__}")
    need_llm(model)
    room = _room(model, processor, prompt, max_new_tokens)
    question = next(_whole(hear(model, processor, [audio], batch_size, window_seconds), room))
    if question.error is not None:
        raise question.error
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failed = threading.Event(), []

    def is_stopped(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device, dtype=torch.bool)

    def write() -> None:
        criteria = StoppingCriteriaList([is_stopped, *(own or ())])
        extra = {**options, "streamer": streamer, "stopping_criteria": criteria}
        try:
            generate(model, processor, [question], prompt, max_new_tokens, extra)
        except BaseException as error:  # told to the reader, who waits for the end
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]
