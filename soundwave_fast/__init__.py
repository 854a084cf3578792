"""soundwave_fast: fused ops, model and trainer for the speech-LLM Soundwave (arXiv 2502.12900)."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from soundwave_fast.model import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveProcessor

_MODEL_NAMES = ("SoundwaveConfig", "SoundwaveForConditionalGeneration", "SoundwaveProcessor")
__all__ = ["__version__", *_MODEL_NAMES]


def __getattr__(name: str):
    # Lazy: `import soundwave_fast.ops` must not pay for transformers, nor `import soundwave_fast` for torch.
    if name in _MODEL_NAMES:
        from soundwave_fast import model

        return getattr(model, name)
    raise AttributeError(f"module 'soundwave_fast' has no attribute {name!r}")
