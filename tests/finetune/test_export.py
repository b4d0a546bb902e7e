"""`diptych export` to CTranslate2 and `generate --engine ctranslate2`: real folders, read by the real engine, against
the torch model; and for each thing that is refused, that without the refusal the engine would write something else."""

import copy
import json
import shutil
import weakref
from dataclasses import replace
from itertools import product

import ctranslate2
import pytest
import torch
from ctranslate2.converters.transformers import T5GemmaLoader
from ctranslate2.specs.common_spec import LayerNormSpec
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.encode import encode_sources
from diptych.data_prep.text_to_ids.templates import TEMPLATES, Template, template_of
from diptych.finetune.commands.cli import main
from diptych.finetune.exporting import export_ctranslate2
from diptych.finetune.exporting.ctranslate2_engine import CTranslate2Engine, load_engine
from diptych.finetune.exporting.export_proof import ProofRow, compare_export, greedy_rules
from diptych.finetune.inference.engine import EncodedPrompt
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.inference.generation_config import MODEL_SETTINGS
from diptych.finetune.inference.outputs import Output
from diptych.finetune.inference.target_tokens import given_tokens
from diptych.finetune.model.families import decoder_start_token
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import EXPORT_FILE, load_checkpoint, position_limit
from diptych.finetune.run_files.atomic_folders import fault_of, read_json, write_json
from diptych.modeling import DiptychConfig

SOURCES = ["Go.", "He is my friend, and a good one.", "나는 학생이다. " * 5]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.25, "max_position_embeddings": 64}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0}


def new_diptych(vocab_size, **changes):
    """Random weights, norms and biases too, so that one that is lost in conversion shows."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(DiptychConfig(vocab_size=vocab_size, **IDS, **(SHAPE | changes)))
    return shaken(model)


def shaken(model):
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.3 * torch.randn_like(weight)
    return model.eval()


def export_of(model, tokenizer, folder, save=None, template=None) -> CTranslate2Engine:
    """The folder as the command writes it, without the proof; with `save` what it writes instead of the engine's."""
    folder.mkdir()
    (save or (lambda: export_ctranslate2.write(LoadedModel.of(model, tokenizer), folder, "float32")))()
    model.generation_config.save_pretrained(folder)
    facts = {"to": "ctranslate2", "decoder_start_token_id": decoder_start_token(model)}
    write_json(folder / EXPORT_FILE, facts | {"position_limit": position_limit(model)})
    return CTranslate2Engine(folder, tokenizer, template, torch.device("cpu"))


def opened(folder) -> CTranslate2Engine:
    return load_engine(str(folder), "auto", torch.device("cpu"))


def outputs_of(engine, sources, seed=0, **settings):
    settings = GenerateSettings("model", engine="ctranslate2", **settings)
    prompts = [EncodedPrompt(ids, given_tokens(engine)) for ids in sources]
    return engine.generate(prompts, settings, seed)


def comparison(model, exported, tokenizer, sources=None, tokens=24):
    examples = [ProofRow(ids, []) for ids in sources or encode_sources(tokenizer, SOURCES)]
    rules = greedy_rules(LoadedModel.of(model, tokenizer), tokens, batch_size=2)._replace(
        tokens=tokens
    )  # also beyond its positions
    return compare_export(LoadedModel.of(model, tokenizer), exported, examples, rules)


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0} | settings}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
EXPRESSED = {
    "grouped queries": {},
    "one key head": {"num_key_value_heads": 1},
    "a key head each": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
    "encoder.qk_norm": {"encoder": {"qk_norm": True}},
    "wide heads": {"head_dim": 40},
    "unequal panels": {
        "encoder": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3},
        "decoder": {"num_hidden_layers": 1, "intermediate_size": 50, "head_dim": 8},
    },
    "gelu": {"hidden_act": "gelu"},
    "attention_multiplier": {"attention_multiplier": 0.15},
    "a large epsilon": {"rms_norm_eps": 1e-2},
    "rope_theta": rope("default", rope_theta=300.0),
    "linear": rope("linear", factor=4.0),
    "llama3": rope("llama3", **LLAMA3),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn in the encoder alone": {"encoder": rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    "layers_without_rope": {"encoder": {"layers_without_rope": [0]}, "decoder": {"layers_without_rope": [1]}},
}


@pytest.mark.parametrize("option", EXPRESSED)
def test_every_option_of_diptych_that_is_exported_is_exported_exactly(option, tiny_tokenizer, tmp_path):
    model = new_diptych(len(tiny_tokenizer), **EXPRESSED[option])
    found = comparison(model, export_of(model, tiny_tokenizer, tmp_path / "export"), tiny_tokenizer)
    assert (found.fault(), found.same_rows, found.rows_with_logits) == ("", 3, 3)
    assert found.max_logit_difference < 1e-5 * found.largest_logit and found.largest_logit > 1


def with_head_norms(model, spec) -> None:
    """What a decoder's qk_norm is in self-attention, where CTranslate2 has it."""
    for layer_spec, layer in zip(spec.decoder.layer, model.model.decoder.layers, strict=True):
        for name in ("q_norm", "k_norm"):
            norm = LayerNormSpec(rms_norm=True)
            norm.gamma = getattr(layer.cross_attn, name).weight
            vars(layer_spec.attention)[name] = norm


NOT_EXPRESSED = {
    "cross_attention is 'merged'": {"cross_attention": "merged"},
    "encoder.lookahead is 1": {"encoder": {"lookahead": 1}},
    "decoder.qk_norm is set": {"decoder": {"qk_norm": True}},
    "rms_norm_eps is 0.1 in the encoder and 1e-06": {"encoder": {"rms_norm_eps": 0.1}},
    "decoder.rope_parameters are 'dynamic'": {"decoder": rope("dynamic", factor=4.0), "max_position_embeddings": 16},
    "encoder.rope_parameters are 'longrope'": {
        "encoder": rope(
            "longrope", factor=4.0, short_factor=[1.0] * 8, long_factor=[9.0] * 8, original_max_position_embeddings=16
        )
    },
    "decoder.norm_offset is 1.0": {"decoder": {"norm_offset": 1.0}},
    "encoder.attention_softcap is 0.1": {"encoder": {"attention_softcap": 0.1}},
    r"encoder.windowed_layers is \[0\]": {"encoder": {"windowed_layers": [0], "attention_window": 2}},
    "decoder.embedding_multiplier is 3.0": {"decoder": {"embedding_multiplier": 3.0}},
    "decoder.residual_multiplier is 0.5": {"decoder": {"residual_multiplier": 0.5}},
    "logits_divisor is 3.0": {"logits_divisor": 3.0},
    "logits_softcap is 3.0": {"logits_softcap": 3.0},
    "encoder.rope_parameters turn a part": {"encoder": rope("default", partial_rotary_factor=0.5)},
    "encoder.norm_placement is after": {"encoder": {"norm_placement": "after"}},
    "decoder.joint_qk_norm is True": {"decoder": {"qk_norm": True, "joint_qk_norm": True}},
    "decoder.hidden_act is 'mish'": {"decoder": {"hidden_act": "mish"}},
}


@pytest.mark.parametrize("fault", NOT_EXPRESSED)
def test_what_ctranslate2_cannot_express_is_named_and_would_be_wrong(fault, tiny_tokenizer, tmp_path):
    model = new_diptych(len(tiny_tokenizer), **NOT_EXPRESSED[fault])
    with pytest.raises(UserError, match=f"(?s)CTranslate2 cannot express this model: .*{fault}"):
        export_ctranslate2.write(LoadedModel.of(model, tiny_tokenizer), tmp_path, "float32")
    assert not list(tmp_path.iterdir())
    if any(word in fault for word in ("merged", "hidden_act", "norm_placement", "joint", "a part")):
        return  # there is nothing to write down

    def regardless():
        with torch.no_grad():
            spec = export_ctranslate2._spec(model, tiny_tokenizer)
            if "qk_norm" in fault:
                with_head_norms(model, spec)
            spec.validate()
            spec.optimize(quantization="float32")
            spec.save(str(tmp_path / "export"))

    exported = export_of(model, tiny_tokenizer, tmp_path / "export", regardless)
    found = comparison(model, exported, tiny_tokenizer, tokens=40)
    assert found.fault()
    assert found.max_logit_difference > 0.01 * found.largest_logit


@pytest.mark.parametrize("family", export_ctranslate2.LOADERS)
def test_families_that_ctranslate2_converts_are_converted_exactly(family, new_model, tiny_tokenizer, tmp_path):
    model = shaken(new_model(family))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    exported = export_of(model, tiny_tokenizer, tmp_path / "export")
    found = comparison(model, exported, tiny_tokenizer)
    assert (found.fault(), found.same_rows) == ("", 3)
    assert found.max_logit_difference < 1e-4 * found.largest_logit
    assert not {"normalize_before", "normalize_embedding"} & vars(model.config).keys()
    export_ctranslate2.write(
        LoadedModel.of(model, tiny_tokenizer), tmp_path, "int8"
    )  # which CTranslate2 computes in place
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("t5", {"scale_decoder_outputs": False}),
        ("t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
        ("t5", {"layer_norm_epsilon": 0.1}),
        ("m2m_100", {"decoder_start_token_id": 0}),
        ("bart", {"decoder_attention_heads": 2}),
        ("mbart", {"scale_embedding": True}),
    ],
)
def test_what_the_converters_assume_about_a_family_is_put_right(family, changes, new_model, tiny_tokenizer, tmp_path):
    model = shaken(new_model(family, **changes))
    found = comparison(model, export_of(model, tiny_tokenizer, tmp_path / "export"), tiny_tokenizer)
    assert (found.fault(), found.same_rows) == ("", 3)


def test_rows_without_a_token_get_a_name_and_gaps_move_nothing(new_model, tiny_tokenizer, tmp_path):
    model = new_model("t5", vocab_size=len(tiny_tokenizer) + 5)
    exported = export_of(model, tiny_tokenizer, tmp_path / "export")
    assert exported.tokens[: len(tiny_tokenizer)] == tiny_tokenizer.convert_ids_to_tokens(range(len(tiny_tokenizer)))
    assert exported.tokens[len(tiny_tokenizer) :] == [f"<unused_{len(tiny_tokenizer) + row}>" for row in range(5)]
    assert not comparison(model, exported, tiny_tokenizer).fault()


@pytest.mark.parametrize("family", ["t5gemma", "blenderbot"])
def test_other_families_are_refused_by_name(family, new_model):
    with pytest.raises(UserError, match=f"CTranslate2 cannot express this model: .*{family}.*It takes diptych, t5"):
        export_ctranslate2.check(new_model(family))


def test_what_a_converter_does_not_know_is_refused_by_name(new_model, tiny_tokenizer, tmp_path):
    model = new_model("bart", activation_function="mish")
    with pytest.raises(UserError, match="CTranslate2 takes no such model: KeyError 'mish'. Use it as it is"):
        export_of(model, tiny_tokenizer, tmp_path / "export")


@pytest.mark.slow
def test_t5gemma_is_refused_for_the_cap_on_its_attention_scores_and_for_nothing_else(
    new_model, tiny_tokenizer, tmp_path
):
    """CTranslate2's own loader converts one without it exactly."""
    plain = {"query_pre_attn_scalar": 16, "final_logit_softcapping": None, "attn_logit_softcapping": None}
    for cap in (None, 50.0):
        config = new_model("t5gemma").config
        for panel in (config.encoder, config.decoder):
            panel.update(plain | {"attn_logit_softcapping": cap})
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        model.generation_config.decoder_start_token_id = 2

        def regardless(model=model, cap=cap):
            vocabulary = export_ctranslate2.Vocabulary(tiny_tokenizer, model.config.vocab_size)
            spec = T5GemmaLoader()(copy.deepcopy(model), vocabulary)
            spec.validate()
            spec.optimize(quantization="float32")
            spec.save(str(tmp_path / str(cap)))

        found = comparison(model, export_of(model, tiny_tokenizer, tmp_path / str(cap), regardless), tiny_tokenizer)
        assert bool(found.fault()) == bool(cap)


def test_positions_beyond_those_it_was_built_for_are_rotated_alike(tiny_tokenizer, tmp_path):
    model = new_diptych(len(tiny_tokenizer), initializer_range=0.1)
    exported = export_of(model, tiny_tokenizer, tmp_path / "export")
    source = torch.randint(3, len(tiny_tokenizer), (2500,), generator=torch.Generator().manual_seed(0)).tolist()
    found = comparison(model, exported, tiny_tokenizer, sources=[source], tokens=100)
    assert not found.fault() and found.tokens == 100


def test_a_difference_is_found_and_a_tie_is_none(tiny_tokenizer, tmp_path):
    model = new_diptych(len(tiny_tokenizer))
    exported = export_of(model, tiny_tokenizer, tmp_path / "export")
    with torch.no_grad():
        for place in (3, 5):  # two tokens that the head cannot tell apart: either may be written
            model.lm_head.weight[place] = 2 * model.lm_head.weight.max(dim=0).values
    tied = export_of(model, tiny_tokenizer, tmp_path / "tied")
    assert not comparison(model, tied, tiny_tokenizer).fault()
    other = comparison(model, exported, tiny_tokenizer)
    assert "parts at token 1: torch writes token" in other.fault()
    with torch.no_grad():
        model.lm_head.weight += 1e-5
        close = comparison(model, tied, tiny_tokenizer)
        assert not close.first_difference
        model.lm_head.weight *= 1.01  # the same tokens from other logits
        assert "logits are off by" in comparison(model, tied, tiny_tokenizer).fault()


# --- the command ---


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory, eight_prepared_rows):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": row["instruction"], "input": row["input"]} for row in eight_prepared_rows]
    rows = [row | {"output": full["target"]} for row, full in zip(rows, eight_prepared_rows, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def exported_folder(tmp_path_factory, t5_checkpoint, rows_file):
    """A T5 that knows eight rows, in int8."""
    out = tmp_path_factory.mktemp("exports") / "new" / "int8"
    assert (
        main(["export", str(t5_checkpoint), "--precision", "int8", "--rows", str(rows_file), "--out", str(out)]) == 0
    )
    return out


def test_the_folder_has_the_engine_the_template_and_the_proof(exported_folder, tiny_tokenizer, rows_file):
    assert not fault_of(exported_folder)
    facts = read_json(exported_folder / EXPORT_FILE)
    assert (facts["to"], facts["precision"], facts["rows"]) == ("ctranslate2", "int8", "8 rows of rows.jsonl")
    exact, coarse = facts["float32"], facts["int8"]
    assert exact["same_rows"] == coarse["rows"] == 8 and exact["max_logit_difference"] < 1e-4
    assert coarse["max_logit_difference"] > 100 * exact["max_logit_difference"]
    assert coarse["torch_figures"] == exact["exported_figures"] == {"bleu": pytest.approx(100), "chrf": 100}
    assert coarse["bytes"] < 0.5 * facts["torch_bytes"] and coarse["computed_in"] == "int8_float32"
    assert coarse["torch_tokens_per_second"] > 0 and coarse["exported_tokens_per_second"] > 0
    assert str(exported_folder.parent) not in json.dumps(facts)
    assert template_of(opened(exported_folder).tokenizer) == template_of(tiny_tokenizer)
    assert not [path for path in exported_folder.parent.iterdir() if path != exported_folder]


def test_the_folder_is_read_by_ctranslate2_itself(exported_folder, tiny_tokenizer):
    tokens = tiny_tokenizer.convert_ids_to_tokens(tiny_tokenizer("Translate English to Korean: Yes.")["input_ids"])
    (result,) = ctranslate2.Translator(str(exported_folder)).translate_batch([tokens])
    ids = tiny_tokenizer.convert_tokens_to_ids(result.hypotheses[0])
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == "네."


def test_what_is_printed_says_what_was_compared(t5_checkpoint, tmp_path, capsys):
    assert main(["export", str(t5_checkpoint), "--precision", "bfloat16", "--out", str(tmp_path / "half")]) == 0
    said = capsys.readouterr().out
    assert "t5, 0.1 M weights, to ctranslate2; compared on built-in sentences" in said
    for line in (
        "float32   9 of 9 rows the same",
        "bfloat16  ",
        "size ",
        "speed ",
        "tokens/s on cpu in batches of 8",
    ):
        assert line in said
    facts = read_json(tmp_path / "half" / EXPORT_FILE)
    assert facts["bfloat16"]["bytes"] < 0.6 * facts["torch_bytes"]


def test_an_adapter_is_merged_and_its_export_writes_what_it_writes(t5_checkpoint, tiny_tokenizer, tmp_path):
    adapter = tmp_path / "adapter"
    model = load_checkpoint(t5_checkpoint).model
    torch.manual_seed(1)
    lora = get_peft_model(
        model, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], init_lora_weights=False)
    )
    lora.save_pretrained(adapter)
    tiny_tokenizer.save_pretrained(adapter)
    settings = read_json(adapter / "adapter_config.json") | {"base_model_name_or_path": str(t5_checkpoint)}
    write_json(adapter / "adapter_config.json", settings)
    assert main(["export", str(adapter), "--out", str(tmp_path / "export")]) == 0
    exported = opened(tmp_path / "export")
    base = load_checkpoint(t5_checkpoint).model
    merged = load_checkpoint(adapter).model
    assert not comparison(merged, exported, exported.tokenizer).fault()
    assert comparison(base, exported, exported.tokenizer).fault()


@pytest.fixture
def says(capsys):
    """`says(arguments, code, …)`: the command ends with this code, and these messages."""

    def check(arguments, code, *messages):
        capsys.readouterr()
        assert main([*map(str, arguments)]) == code
        error = capsys.readouterr().err
        assert "Traceback" not in error and all(message in error for message in messages), error

    return check


def test_an_export_that_writes_something_else_ends_with_1_and_leaves_nothing(t5_checkpoint, tmp_path, says):
    """Logits beyond fp32: each engine goes on in its own way."""
    broken = shutil.copytree(t5_checkpoint, tmp_path / "broken")
    model = AutoModelForSeq2SeqLM.from_pretrained(broken)
    with torch.no_grad():
        model.decoder.final_layer_norm.weight[0] = 3e38
    model.save_pretrained(broken)
    out = tmp_path / "exports" / "export"
    says(
        ["export", broken, "--precision", "int8", "--out", out],
        1,
        "does not write the same in float32: ",
        "Nothing was kept",
    )
    assert not list(out.parent.iterdir())


def test_mistakes_are_told(t5_checkpoint, checkpoint_of, exported_folder, tiny_tokenizer, tmp_path, says):
    out = ["--out", tmp_path / "new"]
    says(["export", t5_checkpoint], 2, "out is not set")
    says(["export", t5_checkpoint, "--out", exported_folder], 2, "is there already")
    says(
        ["export", t5_checkpoint, "--precision", "int3", *out],
        2,
        "precision is 'int3'; for ctranslate2 there is float32, bfloat16",
    )
    says(["export", exported_folder, *out], 2, "is an export to ctranslate2", "name the checkpoint")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Go.", "output": "x"}\n{"instrction": "Go."}\n')
    says(["export", t5_checkpoint, "--rows", rows, *out], 2, "rows.jsonl row 2: 'instruction' is missing")
    rows.write_text('{"instruction": "Go.", "output": 7}\n')
    says(["export", t5_checkpoint, "--rows", rows, *out], 2, "row 1: output must be a text")
    merged = shutil.copytree(checkpoint_of("diptych_merged"), tmp_path / "merged")
    tiny_tokenizer.save_pretrained(merged)
    says(["export", merged, *out], 2, "cross_attention is 'merged'")
    assert not (tmp_path / "new").exists()


# --- generate --engine ctranslate2 ---

ASK = ["--instruction", "Translate English to Korean:", "--input", "I am a student."]
BY_CTRANSLATE2 = ["--engine", "ctranslate2", "--device", "cpu"]


def test_evaluate_has_the_figures_of_the_checkpoint(t5_checkpoint, prepared_folder, tmp_path, capsys):
    exported = tmp_path / "export"
    assert main(["export", str(t5_checkpoint), "--precision", "float32", "--out", str(exported)]) == 0
    reports, shared = {}, ["--data", str(prepared_folder), "--metrics", "exact_match,chrf", "--by", "instruction"]
    for engine, model in {"torch": t5_checkpoint, "ctranslate2": exported}.items():
        out = tmp_path / f"{engine}.json"
        assert main(["evaluate", str(model), "--engine", engine, *shared, "--batch_size", "3", "--out", str(out)]) == 0
        predictions = out.with_suffix(".predictions.jsonl").read_text().splitlines()
        reports[engine] = read_json(out) | {"predictions": [json.loads(line)["prediction"] for line in predictions]}
    torch_report, report = reports.values()
    assert report["predictions"] == torch_report["predictions"] and report["figures"]["exact_match"] == 100
    for found, expected in (
        (report["figures"], torch_report["figures"]),
        *(
            (report["groups"]["instruction"][name]["figures"], it["figures"])
            for name, it in torch_report["groups"]["instruction"].items()
        ),
    ):
        assert found == pytest.approx(expected, abs=1e-5)
    capsys.readouterr()
    for refused, message in (
        (["--mbr_samples", "4"], "mbr_samples draws without very unlikely tokens"),
        (["--generation.epsilon_cutoff", "0.1"], "CTranslate2 has no epsilon_cutoff"),
        (["--confidence", "exact_match"], "--confidence works with --engine torch alone"),
    ):
        assert main(["evaluate", str(exported), "--engine", "ctranslate2", *shared, *refused]) == 2
        assert message in capsys.readouterr().err
    assert main(["evaluate", str(t5_checkpoint), "--engine", "ctranslate2", *shared]) == 2
    assert "no export to CTranslate2" in capsys.readouterr().err


def test_a_row_that_ctranslate2_cannot_score_is_an_error(tiny_tokenizer, tmp_path):
    engine = export_of(new_diptych(len(tiny_tokenizer)), tiny_tokenizer, tmp_path / "export")
    row = {"input_ids": [[40, 1]], "labels": [[50, 60, 1]]}
    (nats,) = engine.row_nats(row)
    assert nats > 0
    for fault in ({"labels": [[50, 60]]}, {"labels": [[50, -100, 1]]}, {"decoder_start": [5]}):
        with pytest.raises(UserError, match="Use --engine torch"):
            engine.row_nats(row | fault)


def test_a_prompt_is_answered_as_it_comes(exported_folder, capsys):
    assert main(["generate", str(exported_folder), *ASK, *BY_CTRANSLATE2]) == 0
    assert capsys.readouterr().out == "나는 학생이다.\n"
    more = ["--num_beams", "3", "--num_return_sequences", "2"]
    assert main(["generate", str(exported_folder), *ASK, *BY_CTRANSLATE2, *more]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "나는 학생이다." != second
    assert main(["generate", str(exported_folder), *ASK, *BY_CTRANSLATE2, "--max_new_tokens", "3"]) == 0
    assert "stopped at --max_new_tokens 3" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--temperature", "2", "--seed", "3"], ["--num_beams", "2"]])
def test_a_file_that_was_cut_ends_with_the_bytes_of_a_whole_one(exported_folder, rows_file, tmp_path, more):
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    rows = [row | {"input": row["input"] + " again" * number} for number, row in product(range(4), rows)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name):
        files = ["--in_file", str(tmp_path / "in.jsonl"), "--out_file", str(tmp_path / name), "--batch_size", "1"]
        arguments = [*files, *BY_CTRANSLATE2, "--max_new_tokens", "12", *more]
        assert main(["generate", str(exported_folder), *arguments]) == 0
        return (tmp_path / name).read_bytes()

    whole = write("whole.jsonl")
    assert [json.loads(line)["row"] for line in whole.splitlines()] == list(range(1, 33))
    write("cut.jsonl")
    (tmp_path / "cut.jsonl").write_bytes(whole[: len(whole) // 2])
    assert write("cut.jsonl") == whole


def test_a_file_has_the_predictions_that_torch_writes_and_neither_engine_goes_on_with_the_others(
    exported_folder, t5_checkpoint, rows_file, tmp_path, says
):
    files = ["--in_file", str(rows_file), "--out_file", str(tmp_path / "out.jsonl")]
    assert main(["generate", str(exported_folder), *files, *BY_CTRANSLATE2]) == 0
    by_ctranslate2 = (tmp_path / "out.jsonl").read_bytes()
    says(["generate", t5_checkpoint, *files, "--device", "cpu"], 2, "was started by a run that differs")
    assert main(["generate", str(t5_checkpoint), *files, "--device", "cpu", "--overwrite", "true"]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == by_ctranslate2


RULES = [
    {},
    {"min_new_tokens": 9},
    {"min_length": 6},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.7},
    {"forced_bos_token_id": 40},
    {"forced_eos_token_id": 1},
    {"suppress_tokens": [20, 21, 22, 23, 24, 25]},
    {"bad_words_ids": [[30], [31, 32]]},
    {"eos_token_id": [1, 60, 61, 62, 63, 64]},
    {"stop_strings": ["a", "e"]},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_of_the_generation_config_and_of_settings_are_torchs(rule, tiny_tokenizer, tmp_path):
    model = new_diptych(len(tiny_tokenizer))
    settings = {name: value for name, value in rule.items() if name not in MODEL_SETTINGS}
    model.generation_config = GenerationConfig(
        **(model.generation_config.to_dict() | {"num_beams": 4, "do_sample": True, "top_h": 0.5} | rule)
    )
    exported = export_of(model, tiny_tokenizer, tmp_path / "export")
    sources = encode_sources(tiny_tokenizer, [*SOURCES, "Yes.", "Hello! I am a student."])
    for cap in (1, 2, 5, 16):
        same = {"batch_size": 2, "max_new_tokens": cap} | settings
        ours = generate_outputs(LoadedModel.of(model, tiny_tokenizer), sources, **same)
        assert outputs_of(exported, sources, batch_size=2, max_new_tokens=cap, generation=settings) == ours, cap


def test_prefixes_and_stop_strings_are_torchs(two_languages, tmp_path):
    model, tokenizer, rows = two_languages
    exported = export_of(model, tokenizer, tmp_path / "export")
    sources = [row["input_ids"] for row in rows[:3]]
    start = tokenizer.convert_ids_to_tokens(0)
    for prefix, stop, beams in product([("<ko>",), ("<en>",), (start, "<en>"), (start,)], [(), ("am ", "학")], [1, 3]):
        template = Template("one", "{{ instruction }}", decoder_prefix=prefix, stop=stop)
        for cap in (2, 4, 24):
            same = {"batch_size": 2, "max_new_tokens": cap, "num_beams": beams}
            exported.template = template
            theirs = outputs_of(exported, sources, **same)
            if beams == 1:
                ours = generate_outputs(LoadedModel.of(model, tokenizer, template), sources, **same)
                # A row that has stopped is padded by torch, while the others of its batch go on.
                assert [output[:2] for output in theirs] == [output[:2] for output in ours]
                assert stop or theirs == ours
            elif cap == 24 and prefix == ("<ko>",):
                assert [output.text for output in theirs] == (
                    ["가.", "네.", "나는 "] if stop else ["가.", "네.", "나는 학생이다."]
                )


def test_a_translator_ends_with_its_engine_and_not_in_a_thread_of_its_own(exported_folder, tiny_tokenizer):
    """That would abort the process: the callback of stop strings is released by a thread of the translator."""
    engine = opened(exported_folder)
    engine.template = replace(engine.template, stop=("never",))
    assert outputs_of(engine, encode_sources(tiny_tokenizer, SOURCES), max_new_tokens=8)
    engine_is_alive = weakref.ref(engine)
    del engine
    assert engine_is_alive() is None


def test_samples_come_again_with_their_seed_and_differ_with_another(exported_folder, tiny_tokenizer):
    exported = opened(exported_folder)
    sources = encode_sources(tiny_tokenizer, ["Translate English to Korean: Yes.", "What is this about?"])

    def drawn(seed):
        drawn = outputs_of(exported, sources, seed, max_new_tokens=12, temperature=3.0, num_return_sequences=4)
        assert len(drawn) == 8 and len({output.text for output in drawn}) > 1
        return drawn

    first = drawn(1)
    assert drawn(2) != first
    assert drawn(1) == first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--generation.encoder_no_repeat_ngram_size", "3"], "CTranslate2 has no encoder_no_repeat_ngram_size"),
        (["--generation.early_stopping", "never"], "CTranslate2 has no early_stopping='never'"),
        (["--temperature", "1", "--num_beams", "2"], "CTranslate2 has no sampling within beams"),
        (["--mbr_samples", "4"], "mbr_samples draws without very unlikely tokens"),
        (["--device", "mps"], "mps"),
        (["--regex", "a"], "--regex works with --engine torch alone: give the checkpoint that the export was made of"),
        (["--abstain_below", "0.5"], "--abstain_below works with --engine torch alone"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(exported_folder, more, message, says):
    says(["generate", exported_folder, *ASK, "--engine", "ctranslate2", *more], 2, message)


def test_each_engine_says_what_to_do_with_the_others_folder(exported_folder, t5_checkpoint, says):
    says(["generate", exported_folder, *ASK], 2, "is an export to ctranslate2", "--engine ctranslate2")
    says(
        ["generate", t5_checkpoint, *ASK, *BY_CTRANSLATE2],
        2,
        "is a checkpoint",
        "diptych export MODEL --to ctranslate2",
    )
    says(["doctor", exported_folder], 2, "is an export to ctranslate2")


def test_a_template_that_is_given_is_saved_in_the_export(t5_checkpoint, tmp_path):
    out = tmp_path / "export"
    assert main(["export", str(t5_checkpoint), "--template", "plain", "--out", str(out)]) == 0
    assert template_of(opened(out).tokenizer) == replace(TEMPLATES["plain"], name="plain")


def test_outputs_are_in_the_order_of_the_sources_and_none_is_refused(
    exported_folder, tiny_tokenizer, eight_prepared_rows
):
    exported = opened(exported_folder)
    sources = [row["input_ids"] for row in eight_prepared_rows]
    outputs = outputs_of(exported, sources, batch_size=3, max_new_tokens=32)
    assert outputs == [Output(row["target"], True, tuple(row["labels"])) for row in eight_prepared_rows]
    assert outputs_of(exported, [], max_new_tokens=32) == []
    with pytest.raises(UserError, match=r"source_ids\[1\] is empty"):
        outputs_of(exported, [[5, 1], []], max_new_tokens=32)


def test_windows_of_t5gemma2_bound_what_its_export_reads(new_model, tiny_tokenizer, tmp_path):
    """CTranslate2's windows differ, so the export has none: it is right for texts that fit in half a window."""
    model = new_model("t5gemma2")
    for panel in (model.config.encoder.text_config, model.config.decoder):
        panel.sliding_window = 7
    assert export_ctranslate2.token_limit(model) == 4
    model.config.encoder.text_config.layer_types = ["full_attention"] * 2
    assert export_ctranslate2.token_limit(model) == model.config.decoder.max_position_embeddings
