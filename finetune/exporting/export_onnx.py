"""A model in memory; three ONNX files out, by torch's own exporter, for any family in families.py.

    folder/  encoder_model.onnx, decoder_model.onnx, decoder_with_past_model.onnx

Names of files, inputs and outputs are those of Optimum (export_graphs.py), which other runtimes know. Weights over
1.5 GB stand in a file beside each graph. The export is compared with ONNX Runtime.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.exporting.export_graphs import DECODER, ENCODER, WITH_PAST, GraphDecoder, exported_graphs
from diptych.finetune.model.families import FAMILIES, family_of
from diptych.finetune.model.loaded_model import LoadedModel

INSTALL = "ONNX export needs onnx, onnxscript and onnxruntime. Install them: pip install 'diptych[onnx]'"
MOST_IN_ONE_FILE = 1.5 * 2**30
"""Bytes of weights. A protobuf file holds 2 GB at most."""


def check(model: PreTrainedModel) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(INSTALL) from error
    if family_of(model) is None:
        raise UserError(
            f"onnx export knows {', '.join(sorted(FAMILIES.keys() - {'diptych_merged'}))}, but not what a "
            f"{model.config.model_type} computes after its decoder."
        )


def write(loaded: LoadedModel, folder: Path, precision: str) -> None:
    model = loaded.model
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    with _quiet(), _eager(model):
        for graph in exported_graphs(model):
            try:
                program = torch.onnx.export(
                    graph.program, dynamo=True, input_names=graph.inputs, output_names=graph.outputs, verbose=False
                )
            except torch.onnx.OnnxExporterError as error:
                reason = str(error.__cause__ or error).strip().splitlines()[0]
                raise UserError(
                    f"torch's ONNX exporter cannot export the {graph.name} of this {model.config.model_type}: "
                    f"{reason}."
                ) from error
            program.save(folder / f"{graph.name}.onnx", external_data=size > MOST_IN_ONE_FILE)


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """The exporter cannot tell the memory layout of T5's sdpa output; eager attention has plain operations only."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's messages about torchvision, which is not needed, and torch's own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def open_export(folder: Path, loaded: LoadedModel) -> GraphDecoder:
    import onnxruntime  # optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    if loaded.device.type != "cpu":
        providers.insert(0, "CUDAExecutionProvider")
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=providers)
        for name in (ENCODER, DECODER, WITH_PAST)
    }

    def run(name: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        session = sessions[name]
        wanted = {put.name: inputs[put.name].cpu().numpy() for put in session.get_inputs()}
        outputs = session.run(None, wanted)
        return {put.name: torch.from_numpy(value) for put, value in zip(session.get_outputs(), outputs, strict=True)}

    return GraphDecoder(run, loaded.decoder_start_token_id)
