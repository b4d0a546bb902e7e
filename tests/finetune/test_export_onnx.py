"""`diptych export --to onnx`: files written, read back by ONNX Runtime, and run."""

import sys

import onnx
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.cli import main
from diptych.finetune.exporting import export_onnx
from diptych.finetune.exporting.export_onnx import (
    DECODER,
    ENCODER,
    WITH_PAST,
    DecoderGraph,
    DecoderWithPastGraph,
    EncoderGraph,
    GraphDecoder,
)
from diptych.finetune.exporting.export_proof import GreedyRules
from diptych.finetune.model.loading import EXPORT_FILE, load_tokenizer
from diptych.finetune.run_files.atomic_folders import fault_of, read_json
from diptych.modeling import DiptychConfig

IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "initializer_range": 0.25}
SHALLOW = {"t5": {"num_layers": 1, "num_decoder_layers": 1}, "bart": {"encoder_layers": 1, "decoder_layers": 1}}
GEMMA = {"norm_placement": "around", "norm_offset": 1.0, "embedding_multiplier": 3.0, "qk_norm": True}
GEMMA |= {"attention_window": 3, "attention_softcap": 5.0, "logits_softcap": 4.0}
GEMMA |= {panel: {"windowed_layers": [0]} for panel in ("encoder", "decoder")}
DIPTYCHS = {
    "diptych": {"qk_norm": True, "encoder": {"lookahead": 2, "hidden_size": 48}},
    "diptych_merged": {"cross_attention": "merged"},
    "diptych, as Gemma": GEMMA,
    "diptych_merged, as Gemma": GEMMA | {"cross_attention": "merged", "window_rope_theta": 10.0},
}
STATES = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
INPUTS = {
    ENCODER: ["input_ids", "attention_mask"],
    DECODER: ["input_ids", "encoder_attention_mask", "encoder_hidden_states"],
    WITH_PAST: ["input_ids", "encoder_attention_mask"],
}


@pytest.fixture
def checkpoint(new_model, tiny_tokenizer, tmp_path):
    def make(kind: str):
        torch.manual_seed(0)
        if kind in DIPTYCHS:
            config = DiptychConfig(vocab_size=len(tiny_tokenizer), **IDS, **SHAPE, **DIPTYCHS[kind])
            model = AutoModelForSeq2SeqLM.from_config(config)
        else:
            model = new_model(kind, **SHALLOW[kind])
        model.save_pretrained(tmp_path / kind)
        tiny_tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DIPTYCHS, "t5"])
def test_three_graphs_write_what_torch_writes(kind, checkpoint, tmp_path, capfd):
    out = tmp_path / "export"
    assert main(["export", str(checkpoint(kind)), "--to", "onnx", "--max_new_tokens", "12", "--out", str(out)]) == 0
    said = capfd.readouterr()
    assert "float32  9 of 9 rows the same" in said.out and "torchvision" not in said.err
    assert not fault_of(out)
    assert {file.stem for file in out.glob("*.onnx")} == {ENCODER, DECODER, WITH_PAST}
    facts = read_json(out / EXPORT_FILE)
    assert facts["to"] == "onnx"
    assert facts["float32"]["max_logit_difference"] < 1e-5 * facts["float32"]["largest_logit"]
    assert facts["float32"]["rows_with_logits"] == 9 and facts["float32"]["tokens"] > 30
    assert load_tokenizer(str(out))("Go.")["input_ids"][-1] == 1
    check_names(out)
    assert main(["generate", str(out), "--instruction", "Go."]) == 2
    assert "is an export to onnx" in capfd.readouterr().err


def check_names(out) -> None:
    """Those that Optimum gives."""
    graph = onnx.load(out / f"{WITH_PAST}.onnx").graph
    assert [put.name for put in graph.input] == [
        "input_ids",
        "encoder_attention_mask",
        "past_key_values.0.decoder.key",
        "past_key_values.0.decoder.value",
        "past_key_values.0.encoder.key",
        "past_key_values.0.encoder.value",
    ]
    assert [put.name for put in graph.output] == ["logits", "present.0.decoder.key", "present.0.decoder.value"]


def test_a_family_whose_head_is_not_known_is_refused_and_so_is_a_precision(new_model, checkpoint, tmp_path, capsys):
    with pytest.raises(UserError, match="onnx export knows bart, blenderbot, .*the masks of a longt5"):
        export_onnx.check(new_model("longt5"))
    assert main(["export", "x", "--to", "onnx", "--precision", "int8", "--out", str(tmp_path / "new")]) == 2
    assert "precision is 'int8'; for onnx there is float32." in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("family", ["marian", "bart"])
def test_the_last_token_has_the_last_position(family, new_model):
    """The graphs as torch has them: nothing is computed for the position after it, which no table has."""
    model = new_model(family, max_position_embeddings=6).eval()
    graphs = {ENCODER: EncoderGraph(model), DECODER: DecoderGraph(model), WITH_PAST: DecoderWithPastGraph(model)}
    kinds = [f"{layer}.{kind}" for layer in range(2) for kind in STATES]

    def run(name, inputs):
        given = [inputs[of] for of in INPUTS[name]]
        if name == ENCODER:
            return {"last_hidden_state": graphs[name](*given)[0]}
        if name == WITH_PAST:
            given.append([inputs[f"past_key_values.{kind}"] for kind in kinds])
        states = [kind for kind in kinds if name == DECODER or ".decoder." in kind]
        return dict(zip(["logits", *(f"present.{kind}" for kind in states)], graphs[name](*given), strict=True))

    ((written, _),) = GraphDecoder(run, start=0).write_greedily([[5, 6, 1]], GreedyRules([], [], 6, 1))
    expected = model.generate(torch.tensor([[5, 6, 1]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(written) == 6 and written[:-1] == expected[0, 1:-1].tolist()


def test_masks_are_made_as_before_after_an_export(new_model):
    model, ids = new_model("diptych_merged"), torch.tensor([[5, 6, 7], [8, 9, 0]])
    asked = {"input_ids": ids, "attention_mask": (ids != 0).long(), "decoder_input_ids": ids}
    with torch.no_grad():
        before = model(**asked).logits
        with export_onnx.masks_without_vmap():
            within = model(**asked).logits
        after = model(**asked).logits
    assert torch.equal(before, after)
    torch.testing.assert_close(within, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("absent", "arguments"),
    [
        ("ctranslate2", ["export", "{model}", "--out", "{new}"]),
        ("ctranslate2", ["generate", "{model}", "--engine", "ctranslate2", "--instruction", "Go."]),
        ("onnxruntime", ["export", "{model}", "--to", "onnx", "--out", "{new}"]),
    ],
)
def test_a_package_that_is_not_installed_is_told_with_its_install_line(
    absent, arguments, t5_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, absent, None)  # as the import system has it: there is none
    assert main([word.format(model=t5_checkpoint, new=tmp_path / "new") for word in arguments]) == 2
    extra = "onnx" if absent == "onnxruntime" else absent
    assert f"pip install 'diptych[{extra}]'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
