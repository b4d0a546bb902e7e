"""A model in memory; three ONNX files, by torch's own exporter, for any of the families in families.py.

    folder/  encoder_model.onnx, decoder_model.onnx, decoder_with_past_model.onnx

Names of files, inputs and outputs are Optimum's (export_graphs.py), so that runtimes that read its exports find
what they look for. A file over 2 GB has its weights in a file beside it. It is proven with ONNX Runtime.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.exporting.export_graphs import DECODER, ENCODER, WITH_PAST, Graphs, exported_programs
from diptych.finetune.model.families import FAMILIES, family_of
from diptych.finetune.model.loading import EXPORT_FILE
from diptych.finetune.run_files.checkpoints import read_json

NAME = "onnx"
INSTALL = "ONNX export needs onnx, onnxscript and onnxruntime. Install them: pip install 'diptych[onnx]'"
MOST_IN_ONE_FILE = 1.5 * 2**30
"""Bytes of weights; protobuf takes 2 GB with what stands around them."""


def check(model: PreTrainedModel) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(INSTALL) from error
    if family_of(model) is None:
        raise UserError(
            f"onnx is written for {', '.join(sorted(FAMILIES.keys() - {'diptych_merged'}))}; what a "
            f"{model.config.model_type} computes after its decoder is not known here."
        )


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, precision: str) -> None:
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    with _quiet(), _eager(model):
        for graph in exported_programs(model):
            try:
                program = torch.onnx.export(
                    graph.program, dynamo=True, input_names=graph.inputs, output_names=graph.outputs, verbose=False
                )
            except torch.onnx.OnnxExporterError as error:
                reason = str(error.__cause__ or error).strip().splitlines()[0]
                raise UserError(
                    f"torch's ONNX exporter does not carry the {graph.name} of this {model.config.model_type}: "
                    f"{reason}."
                ) from error
            program.save(folder / f"{graph.name}.onnx", external_data=size > MOST_IN_ONE_FILE)


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention in plain operations: of sdpa's, the exporter cannot tell how T5's output lies in memory."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of torchvision, which is not asked for, and of torch's own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def open_export(folder: Path, device: torch.device) -> Graphs:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"] if device.type == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=providers)
        for name in (ENCODER, DECODER, WITH_PAST)
    }

    def run(name: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        session = sessions[name]
        wanted = {put.name: inputs[put.name].cpu().numpy() for put in session.get_inputs()}
        outputs = session.run(None, wanted)
        return {put.name: torch.from_numpy(value) for put, value in zip(session.get_outputs(), outputs, strict=True)}

    return Graphs(run, read_json(folder / EXPORT_FILE)["decoder_start_token_id"])
