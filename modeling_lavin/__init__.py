"""LaVIN: teach a frozen language model to see."""

from .configuration_lavin import LavinConfig
from .modeling_lavin import LavinForConditionalGeneration, LavinModel
from .tuner_lavin import MMAConfig, MMAModel


__version__ = "0.1.0"
__all__ = ["LavinConfig", "LavinForConditionalGeneration", "LavinModel", "MMAConfig", "MMAModel"]
