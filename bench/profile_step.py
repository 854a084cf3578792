"""A training step of an 8B-shaped Soundwave with random weights: tokens/s, MFU, peak memory, share of each part.

`python -m bench.profile_step --stage {1,2,3} [--batch N] [--out FILE] [--dry-run]`. Whisper large-v3, both adapters, a
free CTC head and (stages 2 and 3) Llama-3.1-8B with LoRA under activation checkpointing, bf16, built on the device.
30 s of speech an utterance, one frame in seven kept. Without --batch the largest power of two that fits. Parts are
told apart by events where one hands over to the next, forward and backward; a profiler's table of one more step says
which kernels they are. MFU counts what the model needs, not what checkpointing computes again. Without peft the LLM
has no LoRA: stage 2 trains the adapters alone, stage 3 nothing, and is refused.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from bench import harness, parts
from soundwave_fast.errors import ArgumentParser, run_command
from train import cost

TINY = parts.Size(
    d_enc=32, enc_layers=2, enc_heads=2, mels=80, hidden=64, layers=2, heads=2, kv_heads=1, ffn=128, vocab=300
)
TEXT, ANSWER, LABELS, CHANGES = 24, 12, 100, 0.14
MELS = 3000  # 30 s
MOST = 256


class Timeline:
    """Moments of one step: `tick(part)` ends that part. CUDA events on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.moments: list[tuple[str, object]] = []

    def tick(self, part: str) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.moments.append((part, event if self.cuda else time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """By part; empties the timeline."""
        if self.cuda:
            torch.cuda.synchronize()
        out: dict[str, float] = defaultdict(float)
        for (_, start), (part, end) in zip(self.moments, self.moments[1:]):
            out[part] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        self.moments.clear()
        return dict(out)


class Mark(torch.autograd.Function):
    """Identity that ticks, once in each direction."""

    @staticmethod
    def forward(ctx, x: Tensor, timeline: Timeline, part: str, after: str) -> Tensor:
        timeline.tick(part)
        ctx.timeline, ctx.after = timeline, after
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.timeline.tick(ctx.after)
        return grad, None, None, None


def instrument(model, timeline: Timeline, stage: int, tokens_BT: Tensor) -> None:
    """Ticks between the parts; and the tokens of a trained head, since a random one's never repeat."""
    hear, encode, splice, read = model.hear, model.encode, model._splice, model._read
    before_hidden = "CTC, backward" if stage == 1 else "shrinking adapter and CTC, backward"

    def marked(x: Tensor, part: str, after: str) -> Tensor:
        return Mark.apply(x, timeline, part, after)

    def timed_encode(*args, **kwargs):
        out = encode(*args, **kwargs)
        timeline.tick("encoder")
        return out

    def timed_hear(*args, **kwargs):
        heard = hear(*args, **kwargs)
        timeline.tick("CTC")
        if heard.tokens_BT is None:
            return heard
        return dataclasses.replace(heard, tokens_BT=tokens_BT[: len(heard.tokens_BT), : heard.tokens_BT.shape[1]])

    def timed_splice(*args, **kwargs):
        out = splice(*args, **kwargs)
        return dataclasses.replace(out, inputs_embeds=marked(out.inputs_embeds, "splice", "LLM, backward"))

    def timed_read(*args, **kwargs):
        out = read(*args, **kwargs)
        timeline.tick("LLM")
        return out

    model.hear, model.encode, model._splice, model._read = timed_hear, timed_encode, timed_splice, timed_read
    model.alignment_adapter.register_forward_hook(
        lambda module, args, out: (marked(out[0], "alignment adapter", before_hidden), *out[1:])
    )
    model.shrinking_adapter.register_forward_hook(
        lambda module, args, out: out.with_data(marked(out.data, "shrinking adapter", "splice, backward"))
    )


class Training:
    """The model of a stage with its optimizer, and steps over random batches of any size."""

    def __init__(self, stage: int, device: torch.device, tiny: bool) -> None:
        self.stage, self.device, self.tiny = stage, device, tiny
        self.size = TINY if tiny else parts.PAPER
        self.lora = stage > 1 and importlib.util.find_spec("peft") is not None
        self.model = parts.model(self.size, device, with_language_model=stage > 1, lora=self.lora)
        self.model.audio_tower.eval()
        if stage > 1:
            if not self.lora:
                self.model.language_model.requires_grad_(False)
            llm, options = self.model.causal_lm, {"use_reentrant": False}
            if hasattr(llm, "activation_checkpointing_enable"):
                llm.activation_checkpointing_enable(options)
            else:  # the name in older transformers
                llm.gradient_checkpointing_enable(options)
        if stage == 3:
            for part in (self.model.alignment_adapter, self.model.shrinking_adapter, self.model.ctc_head):
                part.requires_grad_(False)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if not self.trained:
            raise ValueError("stage 3 trains LoRA alone, and peft is not installed")
        self.model.to(torch.bfloat16)  # as the trainer has it: frozen parts in bf16, masters in float32, autocast
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=device.type == "cuda")
        self.timeline = Timeline(device)
        torch.manual_seed(1)
        T = MELS // 4
        self.tokens = (torch.rand(MOST, T) < CHANGES).cumsum(1).remainder(50).add(1).to(device)
        instrument(self.model, self.timeline, stage, self.tokens)

    def batch(self, B: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(B)
        inputs = {
            "input_features": torch.randn(B, self.size.mels, MELS, generator=generator).to(self.device, torch.bfloat16),
            "feature_lengths": torch.full((B,), MELS, device=self.device),
        }
        if self.stage < 3:
            targets = torch.randint(3, self.size.vocab, (B, LABELS), generator=generator)
            inputs["ctc_targets"] = targets.to(self.device)
            inputs["ctc_target_lengths"] = torch.full((B,), LABELS, device=self.device)
        if self.stage > 1:
            inputs.update(parts.prompt(self.size, B, TEXT, ANSWER, self.device, self.model.config.audio_token_id))
        return inputs

    def step(self, inputs: dict[str, Tensor]) -> float:
        """One optimizer step; returns the loss."""
        self.timeline.moments.clear()
        self.timeline.tick("start")
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(**inputs).loss
        self.timeline.tick("losses")
        loss.float().backward()
        self.timeline.tick("LLM, backward" if self.stage == 3 else "alignment adapter, backward")
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.timeline.tick("clipping and optimizer")
        return float(loss.detach())

    def fits(self, B: int) -> bool:
        try:
            self.step(self.batch(B))
            return True
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            return False
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def largest_batch(self, first: int = 8) -> int:
        """The largest power of two from `first` (or down from it) whose step fits."""
        if not self.fits(first):
            while first > 1 and not self.fits(first := first // 2):
                pass
            return first
        while first < MOST and self.fits(2 * first):
            first *= 2
        return first

    def work(self, B: int) -> cost.Work:
        kept = int((self.tokens[:B, 1:] != self.tokens[:B, :-1]).sum()) + B if self.stage > 1 else 0
        return cost.Work(B, B * MELS // 2, kept, B * (TEXT + ANSWER - 1), B * ANSWER)


def profiled(training: Training, inputs: dict[str, Tensor]) -> str:
    """The profiler's table of one step, most expensive kernels first; what went wrong, where it cannot be had."""
    from torch.profiler import ProfilerActivity, profile

    cuda = training.device.type == "cuda"
    try:
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as run:
            training.step(inputs)
        return run.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=25)
    except Exception as error:
        return f"no profile: {type(error).__name__}: {error}"


def report(stage: int, device: torch.device, tiny: bool, B: int | None, steps: int) -> dict:
    """What the module's docstring promises, JSON-ready."""
    cuda = device.type == "cuda"
    training = Training(stage, device, tiny)
    largest = B is None
    B = training.largest_batch(1 if tiny else 8) if largest and cuda else B or (1 if tiny else 8)
    inputs = training.batch(B)
    losses = [training.step(inputs) for _ in range(2)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    samples = []
    for _ in range(steps):
        losses.append(training.step(inputs))
        samples.append(training.timeline.seconds())
    seconds = statistics.median(sum(sample.values()) for sample in samples)
    shares = {part: statistics.median(sample[part] for sample in samples) / seconds for part in samples[0]}
    work = training.work(B)
    costs = cost.parts(training.model.config, stage, work, "bfloat16")
    # What is frozen below LoRA runs forward alone: one product in three.
    passes = dict.fromkeys(("alignment adapter", "CTC", "shrinking adapter"), 1 / 3 if stage == 3 else 1.0)
    flops = sum(passes.get(part, 1.0) * own.flops for part, own in costs.items())
    chip = harness.chip() if cuda else None
    tokens = work.audio_tokens + work.text_tokens if stage > 1 else work.encoder_frames // 2
    return {
        "stage": stage,
        "batch": B,
        "batch_is_largest": largest and cuda,
        "lora": training.lora,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "audio_seconds_per_second": 30.0 * B / seconds,
        "model_flops": flops,
        "flops_per_second": flops / seconds,
        "mfu": flops / seconds / chip.flops["bfloat16"] if chip else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "trained_parameters": sum(p.numel() for p in training.trained),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "shares": shares,
        "losses": losses,
        "kernels": profiled(training, inputs),
    }


def _run(argv: list[str]) -> None:
    parser = ArgumentParser(prog="bench.profile_step", description=__doc__)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--batch", type=int, metavar="N", help=f"1 to {MOST}; default: the largest that fits")
    parser.add_argument("--steps", type=int, default=5, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model")
    args = parser.parse_args(argv)
    if args.steps < 1 or not 1 <= (args.batch or 1) <= MOST:
        parser.error("--steps must be at least 1, --batch between 1 and 256")
    device = harness.device()
    if device.type == "cpu" and not args.dry_run:
        parser.error("an 8B model needs a GPU; --dry-run takes a tiny one")
    result = report(args.stage, device, args.dry_run, args.batch, args.steps)
    if args.out:
        temporary = args.out.with_name(f"{args.out.name}.tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, args.out)
    print(result.pop("kernels"))
    for part, share in sorted(result.pop("shares").items(), key=lambda item: -item[1]):
        print(f"{part:40} {100 * share:6.1f} %")
    for name, value in result.items():
        print(f"{name}: {value}")


def main(argv: list[str] | None = None) -> int:
    """Command line; the exit code is `run_command`'s."""
    return run_command("profile_step", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
