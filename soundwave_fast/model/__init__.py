"""The model: one file per arrow of the data flow, and Hugging Face names for the whole."""

from transformers import AutoConfig, AutoProcessor

from soundwave_fast.model.config import SoundwaveConfig
from soundwave_fast.model.processing import SoundwaveProcessor
from soundwave_fast.model.soundwave import SoundwaveForConditionalGeneration, SoundwaveOutput

AutoConfig.register("soundwave", SoundwaveConfig, exist_ok=True)
AutoProcessor.register(SoundwaveConfig, SoundwaveProcessor, exist_ok=True)

try:
    from transformers import AutoModelForMultimodalLM

    AutoModelForMultimodalLM.register(SoundwaveConfig, SoundwaveForConditionalGeneration, exist_ok=True)
except ImportError:  # an older transformers than we support would have no such class
    pass

__all__ = ["SoundwaveConfig", "SoundwaveForConditionalGeneration", "SoundwaveOutput", "SoundwaveProcessor"]
