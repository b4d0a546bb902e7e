"""Generation on small real models: what a row gives must not depend on its neighbours, its place, or the mode."""

import copy
import io
import json
import logging
import queue
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, pipeline

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.templates import TEMPLATES, Template, template_of
from diptych.finetune.commands import cli
from diptych.finetune.generating import generate_command as generate
from diptych.finetune.inference.engine import TorchEngine
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.generation import StopStrings, generate_outputs
from diptych.finetune.inference.generation_config import MODEL_SETTINGS, UNSUPPORTED_SETTINGS, warn_once
from diptych.finetune.inference.outputs import GenerationBar
from diptych.finetune.inference.pipelines import register_pipelines
from diptych.finetune.inference.prompts import Prompt, Prompter
from diptych.finetune.inspecting.doctor_checks import Patient, cache
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, load_tokenizer
from diptych.finetune.serving.request_batches import Decoding, Engine, Job
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.starting_model import starting_model


def texts_of(model, tokenizer, source_ids, template=None, batch_size=8, max_new_tokens=32, **kwargs):
    loaded = LoadedModel.of(model, tokenizer, template)
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens} | kwargs
    return [output.text for output in generate_outputs(loaded, source_ids, **settings)]


@pytest.fixture
def source_ids(eight_prepared_rows):
    return [row["input_ids"] for row in eight_prepared_rows]


@pytest.fixture
def unseen_ids(tiny_tokenizer):
    """Sources that no model here has learned, of 1 to 40 tokens, so that what is generated is anything."""
    torch.manual_seed(1)
    return [[*torch.randint(3, 300, (length,)).tolist(), 1] for length in (1, 40, 7, 23, 2, 15, 31)]


def test_a_model_that_learned_eight_rows_gives_their_targets_in_their_order(
    learned, tiny_tokenizer, source_ids, eight_prepared_rows
):
    targets = [row["target"] for row in eight_prepared_rows]
    assert texts_of(learned, tiny_tokenizer, source_ids, batch_size=3) == targets
    backwards = texts_of(learned, tiny_tokenizer, source_ids[::-1], batch_size=3)
    assert backwards == targets[::-1]


def test_rows_batched_with_padding_give_what_they_give_alone(loaded, source_ids, unseen_ids):
    rows = source_ids + unseen_ids
    alone = [generate_outputs(loaded, [ids], batch_size=1, max_new_tokens=24)[0] for ids in rows]
    assert generate_outputs(loaded, rows, batch_size=15, max_new_tokens=24) == alone
    assert generate_outputs(loaded, rows, batch_size=4, max_new_tokens=24) == alone


def test_padding_side_of_the_tokenizer_changes_nothing(learned, tiny_tokenizer, source_ids, eight_prepared_rows):
    tiny_tokenizer.padding_side = "left"
    try:
        assert texts_of(learned, tiny_tokenizer, source_ids) == [row["target"] for row in eight_prepared_rows]
    finally:
        tiny_tokenizer.padding_side = "right"


@pytest.fixture
def with_settings():
    """`with_settings(model, num_beams=4)`: what stands in its checkpoint's generation_config.json, until the end."""
    before = []

    def write(model, **settings):
        before.append((model, model.generation_config))
        model.generation_config = copy.deepcopy(before[0][1])
        for name, value in settings.items():
            setattr(model.generation_config, name, value)

    warn_once.cache_clear()
    yield write
    for model, config in reversed(before):
        model.generation_config = config


SEARCH = {
    **{"max_length": 3, "max_new_tokens": 2, "max_time": 0.0, "early_stopping": "never", "stop_strings": ["a"]},
    **{"do_sample": True, "num_beams": 4, "use_mtp": True, "use_cache": False, "cache_implementation": "quantized"},
    **{"cache_config": {"backend": "x"}, "max_cache_len": 1, "temperature": 9.0, "top_k": 1, "top_p": 0.1},
    **{"min_p": 0.9, "top_h": 0.5, "typical_p": 0.2, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "length_penalty": 9.0},
    **{"repetition_penalty": 50.0, "encoder_repetition_penalty": 50.0, "no_repeat_ngram_size": 1},
    **{"encoder_no_repeat_ngram_size": 1, "renormalize_logits": True, "remove_invalid_values": True},
    **{"exponential_decay_length_penalty": [1, 9.0], "sequence_bias": [[[7], 99.0]], "token_healing": True},
    **{"guidance_scale": 7.0, "watermarking_config": {"bias": 99.0}, "num_return_sequences": 3},
    **{"output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True},
    **{"return_dict_in_generate": True, "is_assistant": True, "num_assistant_tokens": 3, "speculation_type": "dflash"},
    **{"num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.9},
    **{"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "assistant_early_exit": 1},
    **{"assistant_lookbehind": 1, "target_lookbehind": 1, "assistant_ensemble_weight": 0.5},
    **{"compile_config": {"mode": "x"}, "disable_compile": True, "continuous_batching_config": {"x": 1}},
    **{"low_memory": True, "penalty_alpha": 0.6, "dola_layers": "high", "diversity_penalty": 1.0},
    **{"num_beam_groups": 2, "constraints": ["x"], "force_words_ids": [[7]], "prefill_chunk_size": 1},
    **{"of_a_later_version": "x", "logits_processor": [1], "trust_remote_code": True},
}


def test_whatever_a_checkpoint_says_of_searching_is_set_aside_and_said(
    learned, tiny_tokenizer, unseen_ids, with_settings, capsys
):
    known = {name for name in vars(GenerationConfig()) if name[0] != "_"} - {"transformers_version"}
    search = dict.fromkeys(known - MODEL_SETTINGS, "of a later version") | SEARCH
    plain = texts_of(learned, tiny_tokenizer, unseen_ids, max_new_tokens=8)
    for name, value in search.items():
        with_settings(learned, **{name: value})
        assert texts_of(learned, tiny_tokenizer, unseen_ids, max_new_tokens=8) == plain, name
        said = capsys.readouterr().err
        assert value is False or f" {name} " in said, name
        texts_of(learned, tiny_tokenizer, unseen_ids[:1], max_new_tokens=8)
        assert not capsys.readouterr().err
        assert getattr(learned.generation_config, name) == value  # for whoever saves it


def test_what_a_checkpoint_says_of_the_model_is_taken_over(learned, tiny_tokenizer, unseen_ids, with_settings, capsys):
    def ids(**settings):
        with_settings(learned, **settings)
        return [list(it.ids) for it in generate_outputs(LoadedModel.of(learned, tiny_tokenizer), unseen_ids, **size)]

    size = {"batch_size": 8, "max_new_tokens": 8}
    plain = ids()
    first, used = {it[0] for it in plain}, sorted({token for it in plain for token in it} - {1})
    assert all(it[0] == 7 for it in ids(forced_bos_token_id=7))
    assert {it[-1] for it in ids(forced_eos_token_id=9) if len(it) == 8} == {9}
    assert {len(it) for it in ids(eos_token_id=[1, *used])} == {1}
    for banned in ({"suppress_tokens": used}, {"bad_words_ids": [[token] for token in used]}):
        assert not set(used) & {token for it in ids(**banned) for token in it}
    assert not first & {it[0] for it in ids(begin_suppress_tokens=sorted(first))}
    for shortest in ({"min_length": 8}, {"min_new_tokens": 7}):
        assert all(1 not in it[:7] for it in ids(**shortest))
    assert ids(decoder_start_token_id=30) != plain
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="min_length is '56' in the checkpoint's generation_config.json"):
        ids(min_length="56")


def test_stop_strings_end_a_text_without_them(learned, tiny_tokenizer, source_ids):
    texts = texts_of(learned, tiny_tokenizer, source_ids, stop_strings=["학생", "student"])
    assert texts[2] == "나는 " and texts[5] == "I am a "


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_SETTINGS))
def test_arguments_that_cannot_work_here_are_refused(learned_t5, tiny_tokenizer, source_ids, name):
    with pytest.raises(UserError, match=f"^{name} cannot be used here"):
        texts_of(learned_t5, tiny_tokenizer, source_ids, **{name: SEARCH[name]})


def test_every_command_sets_them_aside(t5_checkpoint, prepared_folder, tiny_tokenizer, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(t5_checkpoint, tmp_path / "t5")
    own = json.loads((folder / "generation_config.json").read_text())
    unloadable = {"compile_config", "continuous_batching_config", "logits_processor", "cache_implementation"}
    unloadable |= {"num_return_sequences", "early_stopping"}
    search = {name: value for name, value in SEARCH.items() if name not in unloadable}
    (folder / "generation_config.json").write_text(json.dumps(own | search | {"cache_implementation": "static"}))
    warn_once.cache_clear()
    prompt = {"instruction": "Translate English to Korean:", "input": "Yes."}
    options = [f"--{name}={value}" for name, value in prompt.items()]
    assert cli.run("generate", [str(folder), *options]) == 0
    assert capsys.readouterr().out == "네.\n"
    assert cli.run("evaluate", [str(folder), f"--data={prepared_folder}", "--metrics=exact_match"]) == 0
    assert re.search(r"exact_match +100\.00", capsys.readouterr().out)
    register_pipelines()
    assert pipeline("text2text-generation", model=str(folder))(prompt) == [{"generated_text": "네."}]
    loaded = load_checkpoint(folder)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompter = Prompter(tokenizer, TEMPLATES["translate"], None)
    source, _ = prompter.render(Prompt(**prompt))
    (ids,), _ = prompter.encode([source])
    events = queue.Queue()
    translating = LoadedModel.of(model, tokenizer, TEMPLATES["translate"])
    engine = Engine(translating, batch_size=1, queue_size=1, batch_wait_ms=0)
    engine.submit([Job(ids, Decoding(32), events.put)])
    assert events.get(timeout=60).answers[0].text == "네."
    engine.close()
    patient = Patient("t5", model, tokenizer, None, model.config, tmp_path)
    assert cache(patient).status == "green"
    with_adapter = get_peft_model(model, LoraConfig(target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    assert texts_of(with_adapter, tokenizer, [ids]) == ["네."]
    assert model.generation_config.num_beams == 4  # as it is saved


def test_a_checkpoint_whose_settings_contradict_each_other_can_be_trained_and_saved(t5_checkpoint, tmp_path):
    folder = shutil.copytree(t5_checkpoint, tmp_path / "t5")
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "pad_token_id": 0, "eos_token_id": 1}')
    recipe = TrainRecipe(model=str(folder), data="x", out="x", epochs=1)
    model = starting_model(recipe, load_tokenizer(str(folder)), None)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["decoder_start_token_id"] == 0


def test_settings_that_transformers_cannot_load_are_named_with_their_file(t5_checkpoint, tmp_path, capsys):
    folder = shutil.copytree(t5_checkpoint, tmp_path / "t5")
    (folder / "generation_config.json").write_text('{"num_return_sequences": 3}')
    assert cli.run("generate", [str(folder), "--instruction", "x"]) == 2
    assert re.search(r"refuses .*generation_config.json \('num_return_sequences'\): ", capsys.readouterr().err)


def test_beams_equal_a_direct_call_of_generate(learned, tiny_tokenizer, unseen_ids):
    direct = [
        tiny_tokenizer.decode(
            learned.generate(torch.tensor([ids]), num_beams=3, max_new_tokens=16)[0], skip_special_tokens=True
        )
        for ids in unseen_ids
    ]
    assert texts_of(learned, tiny_tokenizer, unseen_ids, max_new_tokens=16, num_beams=3) == direct


def test_several_sequences_come_row_by_row(learned, tiny_tokenizer, source_ids):
    first = texts_of(learned, tiny_tokenizer, source_ids, num_beams=3)
    three = texts_of(learned, tiny_tokenizer, source_ids, batch_size=3, num_beams=3, num_return_sequences=3)
    assert len(three) == 3 * len(source_ids)
    assert three[::3] == first


def test_an_output_that_meets_the_cap_is_not_finished(loaded, source_ids, eight_prepared_rows):
    whole = generate_outputs(loaded, source_ids, batch_size=8, max_new_tokens=32)
    assert all(output.finished for output in whole)
    longest = max(len(row["labels"]) for row in eight_prepared_rows)
    cut = generate_outputs(loaded, source_ids, batch_size=8, max_new_tokens=longest - 1)
    assert [output.finished for output in cut] == [len(row["labels"]) <= longest - 1 for row in eight_prepared_rows]


def test_an_eos_that_the_cap_forced_does_not_count_as_finished(loaded, learned, source_ids):
    learned.generation_config.forced_eos_token_id = 1
    try:
        outputs = generate_outputs(loaded, source_ids, batch_size=8, max_new_tokens=2)
    finally:
        learned.generation_config.forced_eos_token_id = None
    assert not any(output.finished for output in outputs)


def test_settings_that_transformers_refuses_are_a_users_error(learned_t5, tiny_tokenizer, source_ids):
    with pytest.raises(UserError, match="transformers' generate refuses this: .*num_return_sequences"):
        texts_of(learned_t5, tiny_tokenizer, source_ids, num_return_sequences=2)


def test_generating_warns_of_nothing(learned, tiny_tokenizer, source_ids, caplog):
    logging.getLogger("transformers").propagate = True
    texts_of(learned, tiny_tokenizer, source_ids, num_beams=2)
    texts_of(learned, tiny_tokenizer, source_ids, do_sample=True, temperature=0.7)
    assert not [record.message for record in caplog.records]


def test_a_source_without_tokens_is_refused_and_no_sources_give_no_texts(learned_t5, tiny_tokenizer):
    with pytest.raises(UserError, match=r"source_ids\[1\] is empty"):
        texts_of(learned_t5, tiny_tokenizer, [[5, 1], []])
    assert texts_of(learned_t5, tiny_tokenizer, []) == []


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("language", ["<ko>", "<en>"])
def test_the_decoder_prefix_is_forced_as_the_labels_had_it(two_languages, language, beams):
    model, tokenizer, rows = two_languages
    rows = [row for row in rows if row["language"] == language]
    template = Template("one", "{{ instruction }}", decoder_prefix=(language,))
    texts = texts_of(model, tokenizer, [row["input_ids"] for row in rows], template=template, num_beams=beams)
    assert texts == [row["target"] for row in rows]


def test_the_decoder_prefix_counts_among_the_new_tokens(two_languages):
    model, tokenizer, rows = two_languages
    template = Template("one", "{{ instruction }}", decoder_prefix=("<ko>",))
    longest = rows[2]
    for cap, finished in ((len(longest["labels"]), True), (len(longest["labels"]) - 1, False)):
        (output,) = generate_outputs(
            LoadedModel.of(model, tokenizer, template), [longest["input_ids"]], batch_size=1, max_new_tokens=cap
        )
        assert output.finished == finished


def test_a_prefix_that_is_the_start_token_is_not_given_twice(learned, tiny_tokenizer, source_ids, eight_prepared_rows):
    """Training leaves a first label out that repeats the start; so does generation."""
    start = tiny_tokenizer.convert_ids_to_tokens(learned.config.decoder_start_token_id)
    template = Template("start", "{{ instruction }}", decoder_prefix=(start,))
    texts = texts_of(learned, tiny_tokenizer, source_ids, template=template)
    assert texts == [row["target"] for row in eight_prepared_rows]


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_ends_at_a_stop_string_which_is_no_part_of_the_text(learned, tiny_tokenizer, source_ids, beams):
    template = Template("stop", "{{ instruction }}", stop=("학생", "student", "친구야, "))
    outputs = generate_outputs(
        LoadedModel.of(learned, tiny_tokenizer, template), source_ids, batch_size=8, max_new_tokens=64, num_beams=beams
    )
    texts = ["가.", "안녕!", "나는 ", "그는 내 ", "네.", "I am a ", "Go.", "2"]
    assert [(output.text, output.finished) for output in outputs] == [(text, True) for text in texts]


def test_a_stop_string_ends_a_row_as_soon_as_it_is_written(tiny_tokenizer):
    stop = StopStrings(tiny_tokenizer, Template("stop", "{{ instruction }}", stop=("###", "끝")))
    texts = ["a ## #", "a ### b", "거의 끝", "끝" + "x " * 60, "a ##" + "#" * 40 + " b"]
    rows = [tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = [torch.tensor([[0, *ids]]) for ids in rows]
    # It looks at the last tokens alone, once for each new token: a stop string long ago would have ended the row then.
    assert [bool(stop(row, None)[0]) for row in rows] == [False, True, True, False, True]


def test_a_prompt_with_a_stop_string_is_printed_without_it(learned_t5, prompter, eight_prepared_rows, capsys):
    prompter = prompter._replace(template=Template("stop", TEMPLATES["translate"].source, stop=("이다",)))
    row = eight_prepared_rows[2]
    settings = GenerateSettings("here", max_new_tokens=32)
    loaded = LoadedModel.of(learned_t5, prompter.tokenizer, prompter.template)
    generate.answer(TorchEngine(loaded), prompter, settings, row["instruction"], row["input"])
    assert capsys.readouterr() == ("나는 학생\n", "")


def test_a_system_prompt_reaches_the_template_or_is_refused(learned_t5, prompter, capsys):
    settings = GenerateSettings("here", instruction="Yes.", system="Translate English to Korean:", max_new_tokens=32)
    of_system = prompter._replace(template=Template("system", "{{ system }} {{ instruction }}"))
    engine = TorchEngine(LoadedModel.of(learned_t5, prompter.tokenizer))
    generate.answer(engine, of_system, settings, settings.instruction, "")
    assert capsys.readouterr().out == "네.\n"
    with pytest.raises(UserError, match="'translate' has no place for a system prompt"):
        generate.answer(engine, prompter, settings, settings.instruction, "")


@pytest.fixture
def prompter(tiny_tokenizer):
    return Prompter(tiny_tokenizer, template_of(tiny_tokenizer), max_source_tokens=None)


def test_prompts_are_encoded_as_the_training_rows_were(prompter, eight_prepared_rows):
    rendered = [prompter.template.render_source(row["instruction"], row["input"]) for row in eight_prepared_rows]
    ids, cut = prompter.encode(rendered)
    assert ids == [row["input_ids"] for row in eight_prepared_rows]
    assert not any(cut)


def test_a_prompt_over_the_limit_is_cut_before_its_end_token_and_reported(prompter, eight_prepared_rows):
    source = eight_prepared_rows[0]
    ids, cut = prompter._replace(max_source_tokens=6).encode([source["source"]])
    assert ids == [source["input_ids"][:5] + [1]]
    assert cut == [True]


def test_streamed_text_is_the_generated_text(learned, prompter, eight_prepared_rows, capsys):
    settings = GenerateSettings("here", max_new_tokens=32)
    for row in eight_prepared_rows:
        generate.answer(
            TorchEngine(LoadedModel.of(learned, prompter.tokenizer)),
            prompter,
            settings,
            row["instruction"],
            row["input"],
        )
    assert capsys.readouterr().out.splitlines() == [row["target"] for row in eight_prepared_rows]


def test_a_session_on_a_pipe_answers_pairs_of_lines_until_the_end(learned_t5, prompter, monkeypatch, capsys):
    lines = ["Translate English to Korean:", "Yes.", "", "Go.", "Add.", "1 + 1"]  # an empty line repeats
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    engine = TorchEngine(LoadedModel.of(learned_t5, prompter.tokenizer))
    generate.run_session(engine, prompter, GenerateSettings("here", max_new_tokens=32))
    assert capsys.readouterr().out.splitlines() == ["네.", "가.", "2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_file": "a.jsonl"}, "--in_file was given without --out_file"),
        ({"in_file": "a", "out_file": "b", "instruction": "x"}, "Drop --instruction"),
        ({"in_file": "a.txt", "out_file": "b", "instruction": "x", "input": "y"}, "--in_file and a prompt"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"num_return_sequences": 3}, "Give --num_beams 3"),
        ({"num_beams": 2, "generation": {"prompt_lookup_num_tokens": 4}}, "is for greedy writing"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_what_to_do(settings, message):
    with pytest.raises(UserError, match=message):
        GenerateSettings("model", **settings)


@pytest.mark.parametrize(
    ("name", "message"), [("lenght_penalty", "Did you mean length_penalty"), ("num_beams", "has an option of its own")]
)
def test_names_that_generation_does_not_take_are_refused_before_a_model_is_loaded(name, message, tmp_path, capsys):
    assert cli.run("generate", [str(tmp_path), "--instruction", "x", f"--generation.{name}", "4"]) == 2
    assert message in capsys.readouterr().err


def test_limits_come_from_the_model_and_may_not_exceed_its_positions(new_model, tiny_tokenizer):
    engine = TorchEngine(LoadedModel.of(new_model("bart", max_position_embeddings=64), tiny_tokenizer))
    resolved = generate.resolve_limits(GenerateSettings("model"), engine)
    assert (resolved.max_source_tokens, resolved.max_new_tokens) == (64, 64)
    with pytest.raises(UserError, match="max_new_tokens is 65, but model was built for 64 positions"):
        generate.resolve_limits(GenerateSettings("model", max_new_tokens=65), engine)


def test_the_bar_counts_rows_and_tokens(loaded_t5, source_ids, capsys):
    bar = GenerationBar(len(source_ids))
    bar.mininterval = 0
    outputs = generate_outputs(loaded_t5, source_ids, batch_size=3, max_new_tokens=24, bar=bar)
    bar.close()
    assert "100%" in (said := capsys.readouterr().err) and "tokens/s" in said
    assert bar.tokens == sum(len(output.ids) for output in outputs)
