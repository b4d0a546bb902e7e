"""Diptych from Python: the commands as functions, and the model classes.

    import diptych

    data = diptych.prepare(rows, tokenizer="google/flan-t5-small", out="prepared")
    run = diptych.train(model="google/flan-t5-small", data=data, out="runs/first", epochs=3)
    report = diptych.evaluate(run, data)
    run.load().generate(["Name the capital of France."])

Keywords are the settings of the commands (`diptych train --help` describes them). Mistakes of yours are raised
as a UserError with the words of the command line. Nothing is printed unless a function is called with `say=print`.

`import diptych` imports neither torch nor transformers; the first use of a name does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.data_prep.command_line.errors import UserError as UserError
    from diptych.finetune.training.packed_trainer import PackedSeq2SeqTrainer as PackedSeq2SeqTrainer
    from diptych.modeling import SIZES as SIZES
    from diptych.modeling import DiptychConfig as DiptychConfig
    from diptych.modeling import DiptychDecoder as DiptychDecoder
    from diptych.modeling import DiptychEncoder as DiptychEncoder
    from diptych.modeling import DiptychEncoderModel as DiptychEncoderModel
    from diptych.modeling import DiptychForConditionalGeneration as DiptychForConditionalGeneration
    from diptych.modeling import DiptychModel as DiptychModel
    from diptych.modeling import DiptychPanelConfig as DiptychPanelConfig
    from diptych.modeling import DiptychPreTrainedModel as DiptychPreTrainedModel
    from diptych.modeling import named_config as named_config
    from diptych.prepare_train_evaluate import evaluate as evaluate
    from diptych.prepare_train_evaluate import prepare as prepare
    from diptych.prepare_train_evaluate import train as train
    from diptych.text_model import load as load

__version__ = "0.1.0"

MODULES = {
    "diptych.prepare_train_evaluate": ("prepare", "train", "evaluate"),
    "diptych.text_model": ("load",),
    "diptych.finetune.training.packed_trainer": ("PackedSeq2SeqTrainer",),
    "diptych.data_prep.command_line.errors": ("UserError",),
    "diptych.modeling": (
        *("SIZES", "DiptychConfig", "DiptychDecoder", "DiptychEncoder", "DiptychEncoderModel", "DiptychModel"),
        *("DiptychForConditionalGeneration", "DiptychPanelConfig", "DiptychPreTrainedModel", "named_config"),
    ),
}
"""Where each name is defined."""

__all__ = ["__version__", *(name for names in MODULES.values() for name in names)]


def __getattr__(name: str) -> Any:
    """The names of MODULES, imported when they are first used (PEP 562)."""
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'diptych' has no attribute {name!r}. It has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted(__all__)
