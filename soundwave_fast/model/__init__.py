"""The model: one file per arrow of the data flow, and Hugging Face names for the whole."""

from transformers import AutoConfig, AutoProcessor

from soundwave_fast.model.config import SoundwaveConfig
from soundwave_fast.model.processing import SoundwaveProcessor
from soundwave_fast.model.released_reading import ReleasedConfig
from soundwave_fast.model.soundwave import SoundwaveForConditionalGeneration, SoundwaveOutput

AutoConfig.register("soundwave", SoundwaveConfig, exist_ok=True)
AutoConfig.register("Soundwave", ReleasedConfig, exist_ok=True)
AutoProcessor.register(SoundwaveConfig, SoundwaveProcessor, exist_ok=True)

AutoProcessor.register(ReleasedConfig, SoundwaveProcessor, exist_ok=True)
try:
    from transformers import AutoModelForMultimodalLM as _AutoModel
except ImportError:  # the nearest class of an older transformers
    from transformers import AutoModelForSpeechSeq2Seq as _AutoModel
_AutoModel.register(SoundwaveConfig, SoundwaveForConditionalGeneration, exist_ok=True)

__all__ = ["SoundwaveConfig", "SoundwaveForConditionalGeneration", "SoundwaveOutput", "SoundwaveProcessor"]
