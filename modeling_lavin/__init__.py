"""LaVIN: teach a frozen language model to see."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration_lavin import LavinConfig
from .modeling_lavin import LavinForConditionalGeneration, LavinModel
from .peft_lavin import LavinPeftModel
from .processing_lavin import LavinProcessor
from .tuner_lavin import MMAConfig, MMAModel


__version__ = "0.1.0"

# From here on the Auto classes know LaVIN without `trust_remote_code`.
AutoConfig.register("lavin", LavinConfig, exist_ok=True)
AutoProcessor.register(LavinConfig, LavinProcessor, exist_ok=True)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(LavinConfig, LavinForConditionalGeneration, exist_ok=True)

__all__ = [
    "LavinConfig",
    "LavinForConditionalGeneration",
    "LavinModel",
    "LavinPeftModel",
    "LavinProcessor",
    "MMAConfig",
    "MMAModel",
]
