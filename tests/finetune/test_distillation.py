"""A teacher in the loss: its gradient is the formula's, packed is padded, and a pair begins with its donor's words."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Qwen3Config,
)

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.batches.packed_rows import pack_examples
from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.model.donor_llm import DonorWeights, llm_logits
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.pairing.paired_weights import paired_config, weight_origins
from diptych.finetune.train import run_recipe
from diptych.finetune.training.distillation import DistilledObjective, Teacher, load_teacher, one_text_each
from diptych.modeling import DiptychForConditionalGeneration


@pytest.fixture(scope="module")
def llm(tiny_tokenizer):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Qwen3Config(
        vocab_size=len(tiny_tokenizer) + 7, **shape, num_key_value_heads=2, head_dim=8, pad_token_id=0
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llm_folder(llm, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    llm.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def twin(llm_folder, llm):
    """The merged pair of this LLM, causal: the LLM itself, in two panels."""
    weights = DonorWeights([llm_folder / "model.safetensors"])
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = paired_config(llm.config, llm.config, lookahead=0, **special)
    generator = torch.Generator().manual_seed(0)
    origins = weight_origins(config, weights, weights)
    state = {origin.name: origin.tensor(torch.float32, generator) for origin in origins}
    return DiptychForConditionalGeneration.from_pretrained(None, config=config, state_dict=state)


def batches(rows, start):
    return pad_batch(rows, 0, start), pack_examples(rows, 0, start)


def test_examples_become_one_text_each(eight_prepared_rows):
    rows = eight_prepared_rows[:3]
    for batch in batches(rows, 2):
        texts, places = one_text_each(batch)
        expected = [row["input_ids"] + [2] + row["labels"][:-1] for row in rows]
        assert [text.tolist() for text in texts] == expected
        labels = [label for row in rows for label in row["labels"]]
        assert len(places) == len(labels)
        after = [(*expected[text][1:], None)[place] for text, place in places.tolist()]
        ends = [label == 1 for label in labels]
        assert all(is_end or found == label for found, label, is_end in zip(after, labels, ends, strict=True))


def test_the_loss_and_its_gradient_are_the_formulas(new_model, llm, eight_prepared_rows):
    model, temperature, weight = new_model("diptych_merged"), 2.0, 0.3
    objective = DistilledObjective(model, Teacher(llm, True), weight, temperature, tokens_at_once=7).train()
    batch = pad_batch(eight_prepared_rows, 0, 0)
    count = int((batch["labels"] != -100).sum())
    loss = objective(batch, count)
    loss.backward()
    found = {name: tensor.grad.clone() for name, tensor in model.named_parameters()}
    model.zero_grad()

    texts, places = one_text_each(batch)
    theirs = torch.stack([llm(texts[text][None]).logits[0, place] for text, place in places.tolist()])
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    ours = model(**inputs).logits[batch["labels"] != -100]
    words = ours.shape[1]  # the teacher's table was filled up
    soft = (theirs[:, :words] / temperature).log_softmax(-1)
    divergence = F.kl_div((ours / temperature).log_softmax(-1), soft, log_target=True, reduction="sum")
    targets = batch["labels"][batch["labels"] != -100]
    expected = (1 - weight) * F.cross_entropy(ours, targets, reduction="sum") + weight * temperature**2 * divergence
    (expected / count).backward()
    torch.testing.assert_close(loss, expected / count, rtol=1e-5, atol=1e-5)
    for name, tensor in model.named_parameters():
        scale = max(1.0, tensor.grad.abs().max().item())
        torch.testing.assert_close(found[name] / scale, tensor.grad / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["decoder-only", "encoder-decoder"])
def test_packed_rows_learn_what_padded_ones_learn(kind, new_model, llm, eight_prepared_rows):
    teacher = Teacher(llm, True) if kind == "decoder-only" else Teacher(new_model("t5").eval(), False)
    found = []
    for batch in batches(eight_prepared_rows, 0):
        model = new_model("diptych_merged")
        loss = DistilledObjective(model, teacher, 0.5, 1.5).train()(batch, 10)
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters())])
    for padded, packed in zip(*found, strict=True):
        scale = max(1.0, padded.abs().max().item())
        torch.testing.assert_close(packed / scale, padded / scale, rtol=0, atol=1e-5)
    with_teacher, without = DistilledObjective(model, teacher, 0.5, 1.0), Seq2SeqObjective(model)
    assert with_teacher.state_dict().keys() == without.state_dict().keys(), "a teacher is no part of what is trained"


def test_a_pair_learns_nothing_from_its_donor_and_says_the_same(twin, llm, eight_prepared_rows):
    objective = DistilledObjective(twin, Teacher(llm, True), 1.0, 1.0).train()
    for batch in batches(eight_prepared_rows, 2):
        loss = objective(batch, 1)
        loss.backward()
        assert abs(loss.item()) < 1e-4
        assert max(weight.grad.abs().max().item() for weight in twin.parameters()) < 1e-3
        twin.zero_grad()
    assert objective.eval()(batch, 1) > 1, "validation is in nats of the targets"


def test_a_rank_without_rows_has_a_loss_of_nothing(new_model, llm, eight_prepared_rows):
    batch = pad_batch(eight_prepared_rows[:1], 0, 0)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = DistilledObjective(new_model("diptych"), Teacher(llm, True), 0.5, 1.0).train()(batch, 5)
    assert loss == 0 and loss.requires_grad


@pytest.fixture
def recipe(short_run, packed_folder, llm_folder):
    settings = {"max_steps": 4, "batch_size": 1, "learning_rate": 5e-3, "logging_every": 1, "save_every": None}
    return partial(short_run, "diptych_merged", data=str(packed_folder(0)), teacher=str(llm_folder), **settings)


@pytest.mark.slow
def test_a_run_learns_from_a_teacher_and_goes_on_with_the_same_bits(recipe, tmp_path):
    whole = recipe(max_steps=6, save_every=3, schedule="constant")
    assert run_recipe(whole) == 0
    plain = recipe(max_steps=6, out=str(tmp_path / "plain"), teacher=None)
    run_recipe(plain)
    cut = replace(whole, out=str(tmp_path / "cut"))
    run_recipe(replace(cut, max_steps=3))
    run_recipe(replace(cut, resume=True))
    one, other = (load_file(tmp_path / name / "final/model.safetensors") for name in ("run", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "plain")
    ]
    assert losses[0] != losses[1] and losses[0][-1] < losses[0][0]
    with pytest.raises(UserError, match="(?s)this is not the run in .*distill_weight 0.5 -> 0.9"):
        run_recipe(replace(cut, resume=True, distill_weight=0.9))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"distill_weight": 1.5}, "distill_weight is 1.5; it must be 0 to 1"),
        ({"distill_temperature": 0.0}, "must be above 0"),
        ({"label_smoothing": 0.1}, "label_smoothing is given beside a teacher"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, recipe):
    with pytest.raises(UserError, match=message):
        recipe(**changes)


def test_a_teacher_of_other_words_is_refused(llm, tiny_tokenizer, tmp_path):
    llm.save_pretrained(tmp_path)
    other = type(tiny_tokenizer).from_pretrained(_saved(tiny_tokenizer, tmp_path / "tokenizer"))
    other.add_tokens(["new"])
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has another tokenizer than the data .'new' is"):
        load_teacher(str(tmp_path), tiny_tokenizer, torch.device("cpu"), torch.float32)


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_decoder_that_starts_otherwise_is_refused(new_model):
    teacher = Teacher(new_model("m2m_100"), False)
    with pytest.raises(UserError, match="starts with token 1, the student's with 0"):
        DistilledObjective(new_model("diptych"), teacher, 0.5, 1.0)


def test_final_is_a_model_of_its_own(recipe, tmp_path):
    run_recipe(recipe(max_steps=2))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "final")
    assert model.config.decoder.cross_attention == "merged"


SMALL_LLM = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_LLM |= {"num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3}


@torch.no_grad()
@pytest.mark.parametrize(
    "config_class, fields", [(Gemma2Config, {"head_dim": 8}), (GraniteConfig, {"logits_scaling": 3.0})]
)
def test_a_teachers_logits_are_divided_and_capped_as_it_does_it(config_class, fields, tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    config = config_class(**SMALL_LLM, **fields, vocab_size=len(tiny_tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model = load_teacher(str(tmp_path), tiny_tokenizer, torch.device("cpu"), torch.float32).model
    ids = torch.arange(3, 14)[None]
    states, expected = model.get_decoder()(ids).last_hidden_state, model(ids).logits
    torch.testing.assert_close(llm_logits(model, states), expected)
    assert not torch.allclose(model.get_output_embeddings()(states), expected, atol=1e-2)


def test_a_teacher_whose_logits_are_made_in_another_way_is_refused(tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    config = CohereConfig(**SMALL_LLM, logit_scale=0.0625, vocab_size=len(tiny_tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does more with the output of its head"):
        load_teacher(str(tmp_path), tiny_tokenizer, torch.device("cpu"), torch.float32)
