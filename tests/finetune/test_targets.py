"""What a decoder is given and what it is to write, against what generation and training do."""

import re

import pytest
import torch
from conftest import tiny_bart
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.inference.attention_weights import mean_weights
from diptych.finetune.inference.generation import generate_batch
from diptych.finetune.inference.prompts import Prompter
from diptych.finetune.inference.target_tokens import given_tokens, target_ids
from diptych.finetune.inspecting import inspection_facts as facts
from diptych.finetune.inspecting.inspection import Reader
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.serving.request_batches import Answer
from diptych.finetune.serving.served_model import ServedModel
from diptych.finetune.serving.web_demo import Contestant

PLAIN = Template("plain", "{{ instruction }}")


@pytest.fixture(scope="module")
def putting_bos(tiny_tokenizer, tmp_path_factory):
    """A tokenizer that puts <s>, 2, before every text, as BART's and Gemma's do."""
    folder = tmp_path_factory.mktemp("bos")
    tiny_tokenizer.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ends = [("<s>", 2), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return tokenizer


def starting_with(token: int, tokenizer):
    model = tiny_bart(len(tokenizer)).eval()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = token
    return model


def test_a_repeated_start_is_left_out_and_bos_is_kept(putting_bos):
    text = putting_bos("가.", add_special_tokens=False).input_ids
    for start, labels in ((1, [2, *text, 1]), (2, [*text, 1])):  # BART starts with </s>, Gemma with <s>
        model = starting_with(start, putting_bos)
        loaded = LoadedModel.of(model, putting_bos, PLAIN)
        assert given_tokens(loaded) == [start]
        assert target_ids(loaded, ["가."]) == [(start, labels)]


def test_given_and_written_tokens_are_the_sequence_of_generate(putting_bos, two_languages):
    """With a prefix that is forced and without, for tokenizers with and without a prefix of their own."""
    t5, languages, _ = two_languages
    forced = Template("ko", "{{ instruction }}", decoder_prefix=("<ko>",))
    bart = starting_with(1, putting_bos)
    for model, tokenizer, template in ((bart, putting_bos, PLAIN), (t5, languages, PLAIN), (t5, languages, forced)):
        source = tokenizer("Yes.").input_ids
        loaded = LoadedModel.of(model, tokenizer, template)
        (output,) = generate_batch(loaded, [source], 8, {"do_sample": False, "num_beams": 1})
        prefix = given_tokens(loaded)[1:]
        inputs = {"decoder_input_ids": torch.tensor([prefix])} if prefix else {}
        whole = model.generate(
            torch.tensor([source]), **inputs, do_sample=False, num_beams=1, max_new_tokens=8 - len(prefix)
        )
        assert [*given_tokens(loaded), *output.ids] == whole[0].tolist()


def test_inspect_and_demo_look_at_what_was_written(putting_bos):
    """Greedy decoding's tokens are the likeliest where they look; after a token too much they would not be."""
    model = starting_with(1, putting_bos)
    loaded, prompter = LoadedModel.of(model, putting_bos, PLAIN), Prompter(putting_bos, PLAIN, None)
    passage = Reader(loaded, prompter, 8).passage("Yes.", Languages())
    steps = facts.steps(loaded, passage)
    assert [step["rank"] for step in steps] == [1] * len(steps) and passage.given == 1
    contestant = Contestant("bart", ServedModel(loaded, prompter, 8, None, 20), None)
    html = contestant.attention(passage.source_ids, [1], Answer("", True, tuple(passage.decoder_ids[1:])))
    shown = [float(share) for share in re.findall(r'title="([\d.]+) %"', html)]
    assert shown == pytest.approx((100 * mean_weights(passage.seen.cross)).flatten().tolist(), abs=0.051)
