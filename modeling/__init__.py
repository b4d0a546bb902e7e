"""Diptych's model family. Importing this registers it with transformers' Auto classes, and does nothing else."""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding

from .configuration_diptych import DiptychConfig, DiptychPanelConfig
from .modeling_diptych import (
    DiptychDecoder,
    DiptychEncoder,
    DiptychEncoderModel,
    DiptychForConditionalGeneration,
    DiptychModel,
    DiptychPreTrainedModel,
)
from .named_sizes import SIZES, named_config

AutoConfig.register(DiptychConfig.model_type, DiptychConfig)
AutoModel.register(DiptychConfig, DiptychModel)
AutoModelForSeq2SeqLM.register(DiptychConfig, DiptychForConditionalGeneration)
AutoModelForTextEncoding.register(DiptychConfig, DiptychEncoderModel)

__all__ = [
    "SIZES",
    "DiptychConfig",
    "DiptychDecoder",
    "DiptychEncoder",
    "DiptychEncoderModel",
    "DiptychForConditionalGeneration",
    "DiptychModel",
    "DiptychPanelConfig",
    "DiptychPreTrainedModel",
    "named_config",
]
