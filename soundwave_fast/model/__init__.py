"""The model: one file per arrow of the data flow, and Hugging Face names for the whole."""

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

from soundwave_fast.model.config import SoundwaveConfig
from soundwave_fast.model.output import SoundwaveOutput
from soundwave_fast.model.processing import SoundwaveProcessor
from soundwave_fast.model.released_reading import ReleasedConfig
from soundwave_fast.model.soundwave import SoundwaveForConditionalGeneration

AutoConfig.register("soundwave", SoundwaveConfig, exist_ok=True)
AutoConfig.register("Soundwave", ReleasedConfig, exist_ok=True)
for _config in (SoundwaveConfig, ReleasedConfig):
    AutoProcessor.register(_config, SoundwaveProcessor, exist_ok=True)
    for _auto in (AutoModel, AutoModelForMultimodalLM):  # one class for both: there is none without a head
        # not `_auto.register`: it wants the class's own config, and the released format's is another
        _auto._model_mapping.register(_config, SoundwaveForConditionalGeneration, exist_ok=True)

__all__ = ["SoundwaveConfig", "SoundwaveForConditionalGeneration", "SoundwaveOutput", "SoundwaveProcessor"]
