"""A config says one thing, however it was given, stored, copied or changed."""

import copy
import pickle

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from diptych.modeling import (
    SIZES,
    DiptychConfig,
    DiptychEncoderModel,
    DiptychForConditionalGeneration,
    DiptychModel,
    DiptychPanelConfig,
    named_config,
)

ROPE = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0, 1.1] * 4,
        "long_factor": [2.0, 3.0] * 4,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}


def lopsided() -> DiptychConfig:
    """Panels that differ in everything that they may differ in."""
    return DiptychConfig(
        encoder={"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "qk_norm": True},
        decoder={"num_hidden_layers": 1, "head_dim": 20, "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=99,
        eos_token_id=[1, 5],
        decoder_start_token_id=7,
    )


def test_flat_fields_reach_both_panels_and_a_panels_own_goes_first():
    config = DiptychConfig(hidden_size=64, num_attention_heads=4, qk_norm=True, encoder={"hidden_size": 96})
    assert (config.encoder.hidden_size, config.decoder.hidden_size) == (96, 64)
    assert (config.encoder.head_dim, config.decoder.head_dim) == (24, 16)
    assert config.encoder.qk_norm and config.decoder.qk_norm
    assert config.decoder.is_decoder and not config.encoder.is_decoder
    assert config.decoder.cross_attention_hidden_size == 96


def test_flat_fields_set_later_reach_both_panels_and_are_read_from_the_decoder():
    config = lopsided()
    config.use_cache, config.attention_dropout, config.vocab_size = False, 0.25, 120
    for panel in (config.encoder, config.decoder):
        assert (panel.use_cache, panel.attention_dropout, panel.vocab_size) == (False, 0.25, 120)
    assert (config.use_cache, config.attention_dropout, config.vocab_size) == (False, 0.25, 120)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 1, 2)
    assert "attention_dropout" not in config.to_dict(), "a flat value has one home, the panels"


def test_what_the_caller_gives_is_never_changed():
    panel = DiptychPanelConfig(hidden_size=32, vocab_size=99, num_attention_heads=2)
    as_dict = {"num_hidden_layers": 2, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    rope = {"rope_type": "dynamic", "factor": 2.0}
    before = copy.deepcopy((panel.to_dict(), as_dict, rope))
    config = DiptychConfig(encoder=as_dict, decoder=panel, vocab_size=99, hidden_size=32, num_attention_heads=2)
    flat = DiptychConfig(rope_parameters=rope)
    config.vocab_size, config.use_cache, config.rms_norm_eps = 120, False, 1e-5
    flat.encoder.rope_parameters["factor"] = 4.0
    assert (panel.to_dict(), as_dict, rope) == before
    assert flat.decoder.rope_parameters["factor"] == 2.0, "the panels share no dict"


def test_config_is_the_same_after_dict_file_copy_and_pickle(tmp_path):
    config = lopsided()
    config.save_pretrained(tmp_path)
    config.to_json_file(tmp_path / "full.json", use_diff=False)
    copies = {
        "dict": DiptychConfig.from_dict(config.to_dict()),
        "diff": DiptychConfig.from_dict(config.to_diff_dict()),
        "file": DiptychConfig.from_pretrained(tmp_path),
        "full file": DiptychConfig.from_json_file(tmp_path / "full.json"),
        "auto": AutoConfig.from_pretrained(tmp_path),
        "deepcopy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
        "panels again": DiptychConfig(**{**config.to_dict(), "encoder": config.encoder, "decoder": config.decoder}),
    }
    ours = config.to_dict()
    for how, same in copies.items():
        theirs = same.to_dict() | {"_name_or_path": ours.get("_name_or_path")}
        assert theirs == ours | {"_name_or_path": ours.get("_name_or_path")}, how
        assert isinstance(same.encoder, DiptychPanelConfig), how


def test_panel_is_the_same_after_a_file_and_loads_from_a_whole_config(tmp_path):
    panel = lopsided().decoder
    panel.save_pretrained(tmp_path / "panel")
    assert DiptychPanelConfig.from_pretrained(tmp_path / "panel").to_dict() == panel.to_dict()
    lopsided().save_pretrained(tmp_path / "whole")
    assert DiptychPanelConfig.from_pretrained(tmp_path / "whole").vocab_size == 99


def test_transformers_finds_the_panels():
    config = lopsided()
    assert DiptychConfig.sub_configs == {"encoder": DiptychPanelConfig, "decoder": DiptychPanelConfig}
    assert config.get_text_config(decoder=True) is config.decoder
    assert config.is_encoder_decoder and isinstance(config, PreTrainedConfig)


def test_overrides_while_loading_reach_both_panels(tmp_path):
    lopsided().save_pretrained(tmp_path)
    config = DiptychConfig.from_pretrained(tmp_path, attention_dropout=0.125, use_cache=False, pad_token_id=9)
    assert {config.encoder.attention_dropout, config.decoder.attention_dropout} == {0.125}
    assert {config.encoder.use_cache, config.decoder.use_cache} == {False}
    assert config.pad_token_id == 9 and config.encoder.num_hidden_layers == 3


def test_start_token_is_the_padding_token_unless_given():
    assert DiptychConfig(pad_token_id=3).decoder_start_token_id == 3
    assert DiptychConfig(pad_token_id=3, decoder_start_token_id=5).decoder_start_token_id == 5
    assert DiptychConfig(pad_token_id=3, decoder_start_token_id=0).decoder_start_token_id == 0


def test_an_encoder_alone_is_a_valid_config_but_no_whole_model():
    config = DiptychConfig(is_encoder_decoder=False)
    assert not DiptychConfig.from_dict(config.to_dict()).is_encoder_decoder
    with pytest.raises(ValueError, match="use DiptychEncoderModel"):
        DiptychModel(config)


def test_rope_as_older_configs_wrote_it_is_understood():
    config = DiptychConfig(rope_theta=500.0, rope_scaling={"rope_type": "linear", "factor": 2.0})
    for panel in (config.encoder, config.decoder):
        assert panel.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads is 2.*choose a divisor"),
        ({"head_dim": 3}, "head_dim is 3.*choose an even one"),
        ({"encoder": DiptychPanelConfig(vocab_size=10), "vocab_size": 11}, "vocab_size differs.*give it once, flat"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers.*expected int"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(fields, message):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        DiptychConfig(**fields)


@pytest.mark.parametrize("rope_type", ROPE)
def test_every_rope_type_runs_beyond_its_length_and_generates_as_uncached(rope_type, build_model, draw_tokens, hinge):
    torch.manual_seed(0)
    rope = {"rope_type": rope_type, "rope_theta": 100.0} | ROPE[rope_type]
    if (hinge, rope_type) == ("merged", "dynamic"):
        with pytest.raises(StrictDataclassError, match="(?s)'dynamic' changes with the length"):
            build_model(rope_parameters=rope, max_position_embeddings=20)
        return
    model = build_model(rope_parameters=rope, max_position_embeddings=20)
    source = draw_tokens(2, 24)
    plain = build_model(rope_parameters={"rope_type": "default", "rope_theta": 100.0}, max_position_embeddings=20)
    with torch.no_grad():
        states = model.get_encoder()(input_ids=source).last_hidden_state
        unscaled = plain.get_encoder()(input_ids=source).last_hidden_state
    assert states.isfinite().all()
    changed = not torch.allclose(states, unscaled, atol=1e-3)
    assert changed == (rope_type != "default"), "a scaled type must change the positions"
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(source, **settings), model.generate(source, use_cache=False, **settings))


@pytest.mark.parametrize("name", SIZES)
def test_named_size_has_the_parameters_of_its_name(name):
    million = {"m": 1, "b": 1000}[name[-1]] * float(name.removeprefix("diptych-")[:-1])
    with torch.device("meta"):
        model = DiptychForConditionalGeneration(named_config(name, vocab_size=1000))
    tables = model.model.encoder.embed_tokens.weight.numel()
    assert model.num_parameters() - tables == pytest.approx(million * 1e6, rel=0.05)


def test_named_config_takes_overrides_and_suggests_the_nearest_name():
    config = named_config("diptych-8m", vocab_size=77, attention_dropout=0.1, decoder={"num_hidden_layers": 2})
    assert (config.vocab_size, config.decoder.num_hidden_layers, config.encoder.attention_dropout) == (77, 2, 0.1)
    assert config.decoder.hidden_size == SIZES["diptych-8m"][0]
    with pytest.raises(ValueError, match="Did you mean diptych-60m?.*There are: diptych-8m"):
        named_config("diptych-60mm")
    with pytest.raises(ValueError, match="no 'vocab_siz'. Did you mean vocab_size?"):
        named_config("diptych-8m", vocab_siz=77)


def test_building_an_encoder_leaves_the_given_config_as_it_was():
    config = lopsided()
    before = config.to_dict()
    encoder = DiptychEncoderModel(config)
    assert config.to_dict() == before and not encoder.config.is_encoder_decoder


def test_a_model_and_its_panels_hold_one_config(build_model, hinge):
    model = build_model()
    assert model.config is model.model.config
    assert model.get_encoder().config is model.config.encoder and model.get_decoder().config is model.config.decoder
    model.config.attention_dropout = 0.5
    sites = [module.config for module in model.modules() if type(module).__name__.endswith("Attention")]
    assert len(sites) == (2 + 3 if hinge == "merged" else 2 + 2 * 3) and {
        config.attention_dropout for config in sites
    } == {0.5}
