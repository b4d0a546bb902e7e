"""A model in memory; three torch.export programs, for any of the families in families.py.

    folder/  encoder_model.pt2, decoder_model.pt2, decoder_with_past_model.pt2    export_graphs.py says what each takes
             graphs.json           the names of their inputs and outputs, in order

    program = torch.export.load("folder/encoder_model.pt2").module()
    (states,) = program(input_ids, attention_mask)

Rows, source, target and past may be of any length from 1 on. `decoder_with_past_model` takes its past as one list. The
two decoders each hold their weights: together the folder is half as large again as the checkpoint, or twice.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.finetune.checkpoint import read_json, write_json
from diptych.finetune.export_graphs import WITH_PAST, Graphs, check_graphs, exported_programs
from diptych.finetune.loading import EXPORT_FILE

NAME = "torch-export"
GRAPHS_FILE = "graphs.json"


def check(model: PreTrainedModel) -> None:
    check_graphs(model, "torch-export")


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, precision: str) -> None:
    names = {}
    for graph in exported_programs(model):
        torch.export.save(graph.program, folder / f"{graph.name}.pt2")
        names[graph.name] = {"inputs": graph.inputs, "outputs": graph.outputs}
    write_json(folder / GRAPHS_FILE, names)


def open_export(folder: Path, device: torch.device) -> Graphs:
    names = read_json(folder / GRAPHS_FILE)
    programs = {name: torch.export.load(folder / f"{name}.pt2").module() for name in names}

    @torch.no_grad()
    def run(name: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        values = [inputs[wanted].to(device) for wanted in names[name]["inputs"]]
        outputs = programs[name](*values) if name != WITH_PAST else programs[name](*values[:2], values[2:])
        return dict(zip(names[name]["outputs"], outputs, strict=True))

    return Graphs(run, read_json(folder / EXPORT_FILE)["decoder_start_token_id"], "float32")
