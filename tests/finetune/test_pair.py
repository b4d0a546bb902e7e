"""`diptych pair`: an encoder-decoder out of decoder-only LLMs, and that nothing which they know is lost.

Donors are small and random, of every family, written in shards by transformers itself.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from diptych.finetune.commands.cli import main
from diptych.finetune.model.loading import load_checkpoint
from diptych.finetune.pairing.pair import REPORT
from diptych.finetune.run_files.atomic_folders import fault_of

CHAT = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA = {"head_dim": 16, **SLIDING}
MULTIPLIED = {"residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.3}
BY_KIND = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e3}, "full_attention": YARN}
PHI4 = {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1}
PHI4 |= {"original_max_position_embeddings": 8, "max_position_embeddings": 512}
PHI4["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
PHI4["rope_parameters"] |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
DONORS = {
    "llama": (LlamaConfig, {}),
    "llama, biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3": (LlamaConfig, {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama, yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "mistral": (MistralConfig, {"head_dim": 16, "sliding_window": None}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2, sliding": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": (SmolLM3Config, {}),
    "mistral, sliding": (MistralConfig, {"head_dim": 16, "sliding_window": 5}),
    "gemma": (GemmaConfig, {"head_dim": 16}),
    "gemma 2": (
        Gemma2Config,
        GEMMA | {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma 3": (Gemma3TextConfig, GEMMA | {"query_pre_attn_scalar": 20, "final_logit_softcapping": 3.0}),
    "olmo 2": (Olmo2Config, {}),
    "olmo 3": (Olmo3Config, SLIDING | {"rope_parameters": BY_KIND}),
    "granite": (GraniteConfig, {"embedding_multiplier": 3.0} | MULTIPLIED),
    "granite, tied": (GraniteConfig, {"tie_word_embeddings": True} | MULTIPLIED),
    "phi 3": (Phi3Config, {"sliding_window": 5}),
    "phi 4": (Phi3Config, PHI4),
    "phi 4, short": (Phi3Config, PHI4 | {"original_max_position_embeddings": 256}),
}


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny_tokenizer.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = CHAT
    del tokenizer.init_kwargs["diptych_template"]
    return tokenizer


@pytest.fixture(scope="module")
def donor(chat_tokenizer, tmp_path_factory):
    """`donor("qwen3")`: a folder of several shards; weights are wide, so that outputs vary."""
    made = {}

    def folder(name: str, seed: int = 0, **changes) -> Path:
        key = (name, seed, *map(str, changes.items()))
        if key not in made:
            config_class, fields = DONORS[name]
            rows = len(chat_tokenizer) + (config_class is Qwen2Config)  # whose tokenizer adds <|endoftext|>
            config = config_class(**(SHAPE | {"vocab_size": rows} | fields | changes))
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.25) if parameter.ndim > 1 else parameter.data.uniform_(0.5, 1.5)
            # Scaled and tied, a wide table would repeat the last token.
            model.get_input_embeddings().weight.data.mul_(0.4 if "gemma" in name else 1)
            made[key] = tmp_path_factory.mktemp("donors") / name.replace(" ", "")
            model.save_pretrained(made[key], max_shard_size="60KB")
            chat_tokenizer.save_pretrained(made[key])
            assert len(list(made[key].glob("*.safetensors"))) > 2
        return made[key]

    return folder


@pytest.fixture
def paired(tmp_path, capsys):
    """`paired(donor, …)`: what the command makes, and its report."""

    def make(*arguments) -> tuple[Path, dict]:
        out = tmp_path / f"paired-{len(list(tmp_path.iterdir()))}"
        code = main(["pair", *map(str, arguments), "--out", str(out)])
        assert code == 0, capsys.readouterr().err
        assert not fault_of(out)
        return out, json.loads((out / REPORT).read_text())

    return make


def tokens(*shape, seed=1) -> torch.Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", DONORS)
def test_merged_and_causal_is_the_donor_in_logits_and_in_text(name, donor, paired):
    out, report = paired(donor(name), "--encoder_attention", "causal")
    llm = AutoModelForCausalLM.from_pretrained(donor(name)).eval()
    model = AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    source, target = tokens(3, 21), tokens(3, 14, seed=2)
    expected = llm(torch.cat((source, target), dim=1)).logits[:, 21:]
    found = model(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    proof = report["proof"]
    assert proof["is_lossless"] and proof["logit_difference"] < 2e-5 * max(1.0, proof["largest_logit"])
    assert report["weights"]["fresh"] == [] and report["weights"]["reshaped"] == []
    states = llm(source, output_hidden_states=True).hidden_states
    own = model.get_encoder()(source, output_hidden_states=True).hidden_states
    assert len(own) == 4  # the last layer's output is read by nobody, so it is not there
    for ours, theirs in zip(own, states, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))

    start = model.config.decoder_start_token_id
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    prompt = torch.cat((source, torch.full((3, 1), start)), dim=1)
    continued = llm.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[:, prompt.shape[1] :]
    assert torch.equal(model.generate(source, **settings)[:, 1:], continued)
    assert all(len(row.unique()) > 3 for row in continued), "outputs that hardly vary prove nothing"


def test_the_models_prompt_is_the_donors(donor, paired, chat_tokenizer):
    """Source, start token and answer stand one behind the other as the donor's chat template has them."""
    out, _ = paired(donor("qwen3"), "--encoder_attention", "causal")
    loaded = load_checkpoint(out)
    model, tokenizer = loaded.model, loaded.tokenizer
    from diptych.data_prep.text_to_ids.encode import encode_sources, encode_targets
    from diptych.data_prep.text_to_ids.templates import template_of

    template = template_of(tokenizer)
    (source,) = encode_sources(tokenizer, [template.render_source("Say yes.", "Now.")])
    (labels,) = encode_targets(tokenizer, [template.render_target("Yes.")])
    messages = [{"role": "user", "content": "Say yes.\n\nNow."}, {"role": "assistant", "content": "Yes."}]
    prompt = chat_tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)
    assert [*source, model.config.decoder_start_token_id] == prompt["input_ids"]
    whole = chat_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert [*source, model.config.decoder_start_token_id, *labels] == whole[: len(source) + 1 + len(labels)]
    assert labels[-1] == tokenizer.eos_token_id == 1


@torch.no_grad()
@pytest.mark.parametrize("name", DONORS)
def test_separate_is_the_donor_without_a_prompt_while_nothing_is_read(name, donor, paired):
    out, report = paired(
        donor(name),
        "--cross_attention",
        "separate",
        "--cross_attention_init",
        "zeroed",
        "--encoder_attention",
        "causal",
    )
    llm = AutoModelForCausalLM.from_pretrained(donor(name)).eval()
    model = AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    source, target = tokens(2, 9), tokens(2, 14, seed=2)
    found = model(input_ids=source, decoder_input_ids=target).logits
    torch.testing.assert_close(found, llm(target).logits, rtol=1e-4, atol=1e-4)
    states = model.get_encoder()(source).last_hidden_state
    torch.testing.assert_close(states, llm.get_decoder()(source).last_hidden_state, rtol=1e-5, atol=1e-5)
    zeroed = [name for name in report["weights"]["fresh"] if "o_proj" in name]
    assert zeroed == report["weights"]["fresh"] and len(zeroed) >= 4


@torch.no_grad()
def test_bidirectional_reads_more_and_is_what_is_saved(donor, paired):
    causal, _ = paired(donor("qwen3"), "--encoder_attention", "causal")
    both, report = paired(donor("qwen3"))
    one, other = (AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for folder in (causal, both))
    assert (one.config.encoder.lookahead, other.config.encoder.lookahead) == (0, None)
    batch = {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 5)}
    assert not torch.allclose(one(**batch).logits, other(**batch).logits, atol=1e-2)
    assert report["proof"]["is_lossless"], "the proof is of the causal one in either case"


def test_what_a_donor_does_otherwise_is_told(donor, paired):
    _, report = paired(donor("phi 4"))
    (key,) = (it for it in report["tensors"] if it["name"] == "model.decoder.layers.2.self_attn.k_proj.weight")
    assert key["from"] == "model.layers.2.self_attn.qkv_proj.weight" and key["rows"] == [48, 64]
    assert any("source and target together have at most 8 tokens" in note for note in report["notes"])
    _, report = paired(donor("gemma 2"))
    told = "In 2 layers of the encoder a token attends to 4 tokens before it, as in the LLM, and to as many behind it."
    assert told in report["notes"]


def test_unequal_llms_are_joined_by_the_separate_hinge(donor, paired):
    large = donor("qwen3", seed=1, hidden_size=64, num_hidden_layers=5)
    out, report = paired(large, donor("qwen3"), "--cross_attention", "separate")
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert (model.config.encoder.hidden_size, model.config.decoder.hidden_size) == (64, 48)
    kinds = {tensor["name"]: tensor["kind"] for tensor in report["tensors"]}
    layer = "model.decoder.layers.0.cross_attn"
    assert kinds[f"{layer}.k_proj.weight"] == kinds[f"{layer}.v_proj.weight"] == "fresh"  # from another width
    assert kinds[f"{layer}.q_proj.weight"] == kinds[f"{layer}.o_proj.weight"] == "copied"
    assert set(kinds) == set(model.state_dict()), "every tensor is accounted for"


def test_fewer_decoder_layers_are_evenly_spaced_and_their_price_is_said(donor, paired):
    out, report = paired(donor("qwen3"), "--decoder_layers", "2")
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert report["layers"] == {"encoder": 3, "decoder": 2, "decoder_kept": [0, 3], "encoder_layer_map": [0, 3]}
    llm = AutoModelForCausalLM.from_pretrained(donor("qwen3"))
    kept = llm.model.layers[3].self_attn.q_proj.weight
    assert torch.equal(model.model.decoder.layers[1].self_attn.q_proj.weight, kept)
    losses = report["proof"]["loss"]
    assert losses["paired"] != losses["donor"] and "is_lossless" not in report["proof"]


def test_the_layers_that_are_kept_keep_their_windows(donor, paired):
    out, report = paired(donor("gemma 3"), "--decoder_layers", "3")
    config = AutoModelForSeq2SeqLM.from_pretrained(out).config
    assert report["layers"]["decoder_kept"] == [0, 2, 3]
    assert (config.encoder.windowed_layers, config.decoder.windowed_layers) == ([0, 2], [0, 1])


def test_tables_of_other_lengths_are_cut_or_filled(donor, paired, chat_tokenizer):
    longer = donor("qwen3", seed=1, vocab_size=len(chat_tokenizer) + 16)
    out, report = paired(longer, donor("qwen3"))
    assert report["weights"]["reshaped"] == ["model.encoder.embed_tokens.weight"]
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert model.config.vocab_size == len(chat_tokenizer)
    assert not model.config.tie_word_embeddings, "two donors have two tables worth keeping"


@pytest.mark.parametrize("name", ["llama", "gemma 3", "granite", "phi 4"])
def test_the_weights_keep_their_dtype_and_shards_have_an_index(name, donor, paired, tmp_path):
    """No factor is multiplied into weights, which bfloat16 would round."""
    llm = AutoModelForCausalLM.from_pretrained(donor(name), dtype=torch.bfloat16)
    llm.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(donor(name)).save_pretrained(tmp_path / "half")
    out, report = paired(tmp_path / "half", "--encoder_attention", "causal")
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert report["proof"]["logit_difference"] < 1e-3


FOREIGN = {
    "neox": GPTNeoXConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=2),
    "gemma3": Gemma3Config(
        text_config=SHAPE | {"head_dim": 12},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "gemma3 encoder": Gemma3TextConfig(**SHAPE, head_dim=12, use_bidirectional_attention=True),
    "gptj": GPTJConfig(n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
}
REFUSED = {
    "another residual": (["neox"], "a gpt_neox cannot be paired because of its parallel residual, LayerNorm and"),
    "experts": (["mixtral"], "a mixtral cannot be paired because of its mixture of experts"),
    "images": (["gemma3"], "a gemma3 cannot be paired because of its vision tower"),
    "an encoder": (["gemma3 encoder"], "has use_bidirectional_attention"),
    "an unknown block": (["gptj"], "gptj is an unknown kind of LLM. These model types can be: llama, mistral"),
    "another vocabulary": (["qwen3", "other"], "have different tokenizers ('new' is"),
    "unequal depth, merged": (
        ["deep", "qwen3"],
        "Merged cross-attention pairs layer with layer, but the encoder has 5",
    ),
    "unequal width, merged": (["wide", "qwen3"], "use cross_attention='separate'"),
    "an encoder-decoder": (["t5"], "is no decoder-only LLM (model_type t5)"),
    "too few layers": (["qwen3", "--decoder_layers", "1"], "of 4 layers, 2 to 4 can be kept, not 1"),
    "an init of nothing": (
        ["qwen3", "--cross_attention_init", "fresh"],
        "merged cross-attention has no weights of its own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_paired_is_refused_before_anything_is_written(
    case, donor, chat_tokenizer, t5_checkpoint, tmp_path, capsys
):
    arguments, message = REFUSED[case]
    folders = {"t5": t5_checkpoint, "qwen3": donor("qwen3")}
    folders["deep"] = donor("qwen3", num_hidden_layers=5)
    folders["wide"] = donor("qwen3", hidden_size=64)
    if "other" in arguments:
        folders["other"] = tmp_path / "other"
        AutoModelForCausalLM.from_pretrained(donor("qwen3")).save_pretrained(folders["other"])
        tokenizer = AutoTokenizer.from_pretrained(donor("qwen3"))
        tokenizer.add_tokens(["new"])
        tokenizer.save_pretrained(folders["other"])
    for name in FOREIGN.keys() & set(arguments):
        folders[name], config = tmp_path / name, copy.deepcopy(FOREIGN[name])
        config.get_text_config().vocab_size = len(chat_tokenizer)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        chat_tokenizer.save_pretrained(folders[name])
    command = ["pair", *(str(folders.get(word, word)) for word in arguments), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(command) == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) <= 6 and "Traceback" not in said


def without(*names):
    def spoil(weights, folder):
        for name in names:
            del weights[name]

    return spoil


def with_values(name, value):
    def spoil(weights, folder):
        weights[name].view(-1)[3] = value

    return spoil


def with_tensor(name, make):
    def spoil(weights, folder):
        weights[name] = make(weights)

    return spoil


def edited(file="config.json", **changes):
    def spoil(weights, folder):
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))

    return spoil


def with_tokens(weights, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{number}" for number in range(9)])
    tokenizer.save_pretrained(folder)


TABLE, UP = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
DAMAGED = {
    "NaN": ("llama", with_values(UP, math.nan), 3, f"{UP} of the encoder's LLM has 1 value that are infinite or no"),
    "NaN in a row that no proof reads": (
        "llama",
        with_values(TABLE, math.nan),
        3,
        f"{TABLE} of the encoder's LLM has",
    ),
    "too large": ("llama", with_values(UP, 1e6), 2, "has values up to 1e+06, and float16 ends at 65,504. Take bf"),
    "no head": ("llama", without("lm_head.weight"), 2, "lacks lm_head.weight. Copy it again"),
    "a short table": ("llama", with_tensor(TABLE, lambda its: its[TABLE][:99]), 2, "has the shape [99, 48], and its"),
    "a number": ("llama", with_tensor(UP, lambda its: torch.tensor(1.0)), 2, f"{UP} of"),
    "twice": ("llama", with_tensor(UP[6:], lambda its: its[UP] + 1), 2, f"has {UP} and {UP[6:]}, which are one"),
    "another head": ("llama", edited(tie_word_embeddings=True), 2, "says tie_word_embeddings, and lm_head.weight in"),
    "more tokens": ("llama", with_tokens, 2, "has ids up to 377, but the model has 369 embedding rows"),
    "no window": ("gemma 2", edited(sliding_window=None), 2, "sliding_window is None, and layers of sliding"),
    "a window of nothing": ("mistral, sliding", edited(sliding_window=0), 2, "sliding_window is 0, and layers"),
    "no turns": (
        "llama",
        edited(rope_parameters={"rope_type": "default", "rope_theta": 0.0}),
        2,
        "rope_theta is 0.0; ",
    ),
    "turns of NaN": (
        "llama",
        edited(rope_parameters={"rope_type": "default", "rope_theta": math.nan}),
        2,
        "rope_theta is nan; ",
    ),
    "turns of NaN in windows": (
        "olmo 3",
        edited(rope_parameters=BY_KIND | {"sliding_attention": {"rope_type": "default", "rope_theta": math.nan}}),
        2,
        "window_rope_theta is nan; ",
    ),
    "half a pair": (
        "phi 4, short",
        edited(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.1875}),
        2,
        "of which rotary positions turn 3 numbers in pairs",
    ),
    "an end of text": (
        "llama",
        edited("generation_config.json", eos_token_id="x"),
        2,
        "generation_config.json has 'x'",
    ),
    "no tokens": ("llama", edited("generation_config.json", bad_words_ids=[[999]]), 2, "bad_words_ids is '[[999]]'"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("proof", ["true", "false"])
def test_a_damaged_llm_is_refused_with_and_without_proof(case, proof, donor, tmp_path, capsys):
    kind, spoil, code, message = DAMAGED[case]
    arguments = ["--dtype", "float16" if case == "too large" else "auto", "--proof", proof]
    folder = damaged(donor(kind), spoil, tmp_path)
    capsys.readouterr()
    assert main(["pair", str(folder), "--out", str(tmp_path / "out"), *arguments]) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and [it.name for it in tmp_path.iterdir()] == ["damaged"]


def damaged(source, spoil, tmp_path):
    folder = shutil.copytree(source, tmp_path / "damaged")
    weights = {}
    for file in folder.glob("*.safetensors*"):
        weights |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    spoil(weights, folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_of_no_layer_are_told_and_used_nowhere(donor, paired, tmp_path):
    """Phi-3 has one matrix for queries, keys and values."""
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = damaged(donor("phi 3"), with_tensor(name, lambda its: torch.zeros(48, 48)), tmp_path)
    out, report = paired(folder, "--encoder_attention", "causal")
    assert report["proof"]["is_lossless"]
    assert f"Not used of {folder}: 1 tensor of no layer that its config has: {name}" in report["notes"]


def test_a_generation_config_that_transformers_saves_no_more_is_no_obstacle(donor, paired, tmp_path):
    """Llama 2's has a temperature and does not sample; others name ends beyond the vocabulary."""
    odd = edited("generation_config.json", do_sample=False, temperature=0.6, eos_token_id=[1, 999, -1])
    out, report = paired(damaged(donor("llama"), odd, tmp_path))
    assert load_checkpoint(out).model.generation_config.eos_token_id == report["special_tokens"]["eos_token_id"] == 1


def test_of_a_text_for_the_proof_the_beginning_is_read(donor, paired, tmp_path):
    """This one has 16 GiB."""
    (tmp_path / "text").write_bytes("가".encode() * 50_000)
    os.truncate(tmp_path / "text", 2**34)
    _, report = paired(donor("llama"), "--text", tmp_path / "text")
    assert report["proof"]["tokens"] == {"source": 128, "target": 128}


def test_a_paired_folder_computes_the_same_where_diptych_is_not_installed(donor, paired, tmp_path):
    out, _ = paired(donor("qwen3"))
    script = (
        "import sys, json, torch\n"
        "sys.modules['diptych'] = None\n"
        "from transformers import AutoModelForSeq2SeqLM\n"
        "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "ids = torch.tensor([[5, 6, 7, 8]])\n"
        "print(json.dumps(model(input_ids=ids, decoder_input_ids=ids).logits.flatten().tolist()))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(out)], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = AutoModelForSeq2SeqLM.from_pretrained(out).eval()(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.tensor(json.loads(run.stdout)).equal(expected.flatten())
