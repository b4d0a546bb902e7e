"""Chat templates of the kinds that LLMs have, as two sides: text and tokens are those that the LLM's own would give.

The templates are written here with the traits of those that are common: ChatML, with a system prompt of its own, with
empty thoughts, headers that trim, brackets, one without system prompts, one that dates.
"""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from diptych.data_prep.donor_template import CHECKED, donor_prompt
from diptych.data_prep.encode import encode_sources, encode_targets
from diptych.data_prep.records import UserError
from diptych.data_prep.templates import template_of

TEXTS = [
    "Name the capital of France.",
    "Paris is the capital.",
    "user assistant system",
    "한국어 네.",
    "Be brief. Hi!",
]
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content|trim }}<|eot_id|>"
TEMPLATES = {
    "chatml": TURN + BEGIN,
    "own system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    + TURN
    + BEGIN,
    "thoughts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + BEGIN
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}" + HEADER + "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "brackets": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {% if system and loop.first %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "no system": "{% if messages[0].role == 'system' %}{{ raise_exception('none here') }}{% endif %}" + TURN + BEGIN,
    "dated": "<|im_start|>system\nToday is {{ strftime_now('%Y') }}.<|im_end|>\n" + TURN + BEGIN,
}
CONTROL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"]


def trained(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE as of Llama 3 and Qwen, or BPE over ▁ words as of Llama 2; both put <s> before each text."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    if kind == "words":  # bytes are words of the vocabulary, and no added tokens
        state = json.loads(backend.to_str())
        vocabulary = state["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"extra_special_tokens": CONTROL})
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "words"])
def plain(request):
    return trained(request.param)


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def messages_of(system, history, instruction):
    turns = [{"role": "system", "content": system}] if system else []
    for told, said in history:
        turns += [{"role": "user", "content": told}, {"role": "assistant", "content": said}]
    return [*turns, {"role": "user", "content": instruction}]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_source_and_start_are_the_llms_own_prompt_in_text_and_tokens(kind, plain, tmp_path):
    llm = with_template(plain, TEMPLATES[kind])
    eos = llm.convert_tokens_to_ids({"headers": "<|eot_id|>", "brackets": "</s>"}.get(kind, "<|im_end|>"))
    prompt = donor_prompt(llm, "llm", [eos])
    prompt.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    template = template_of(tokenizer)  # its golden rows hold, too
    assert tokenizer.eos_token_id == eos
    compared = 0
    for system, history, instruction in CHECKED:
        if (system and "system" not in template.source_variables()) or kind == "dated":
            continue
        theirs = llm.apply_chat_template(
            messages_of(system, history, instruction), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        (source,) = encode_sources(tokenizer, [template.render_source(instruction, "", history, system)])
        assert [*source, prompt.decoder_start_token_id] == theirs
        compared += 1
    assert compared == {"no system": 4, "dated": 0}.get(kind, len(CHECKED))


@pytest.mark.parametrize("kind", ["chatml", "thoughts", "headers"])
def test_an_answer_ends_as_the_llms_ends(kind, plain):
    llm = with_template(plain, TEMPLATES[kind])
    end = "<|eot_id|>" if kind == "headers" else "<|im_end|>"
    prompt = donor_prompt(llm, "llm", [llm.convert_tokens_to_ids(end)])
    messages = [*messages_of("", (), "Name it."), {"role": "assistant", "content": "Paris."}]
    theirs = llm.apply_chat_template(messages, return_dict=True)["input_ids"]
    (source,) = encode_sources(prompt.tokenizer, [prompt.template.render_source("Name it.")])
    (labels,) = encode_targets(prompt.tokenizer, [prompt.template.render_target("Paris.")])
    ours = [*source, prompt.decoder_start_token_id, *labels]
    if any("Answers are cut" in note for note in prompt.notes):  # words begin with ▁, also after a line end
        ours, theirs = (prompt.tokenizer.decode(ids).replace(" ", "") for ids in (ours, theirs))
    assert theirs[: len(ours)] == ours
    assert ("Targets begin with" in " ".join(prompt.notes)) == (kind == "thoughts")


def test_input_is_a_paragraph_of_the_question_and_text_stays_text(plain):
    prompt = donor_prompt(with_template(plain, TEMPLATES["chatml"]), "llm")
    text = prompt.template.render_source("Sum up.", "a <|im_end|> b")
    assert text == "<|im_start|>user\nSum up.\n\na <|im_end|> b<|im_end|>\n<|im_start|>assistant"
    (ids,) = encode_sources(prompt.tokenizer, [text])
    assert ids.count(prompt.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1, "the row's own is five words of text"


def test_what_is_otherwise_is_said(plain):
    def notes(kind):
        return " ".join(donor_prompt(with_template(plain, TEMPLATES[kind]), "llm").notes)

    assert "prompts begin with '<|im_start|>system\\nHelp.<|im_end|>\\n<|im_start|>user\\n'" in notes(
        "own system prompt"
    )
    assert "prompts begin with" not in notes("chatml")
    assert "ours has that of this day for ever" in notes("dated")
    assert "has no padding token; <pad> is it now" in notes("chatml")


def test_a_base_model_is_prompted_by_lines(plain):
    prompt = donor_prompt(with_template(plain, None), "llm")
    assert "There is no chat template" in " ".join(prompt.notes)
    assert prompt.template.render_source("Sum up.", "a b") == "<s>Sum up.\na b"
    assert prompt.tokenizer.decode([prompt.decoder_start_token_id]) == "\n"


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not render a question"),
        ("{{ messages[-1].content }}", "does not render a question and the beginning of an answer"),
        ("{% for m in messages %}{{ m.content|upper }}: {% endfor %}", "does not render a question"),
        ("{% for m in messages %}{{ m.content }}{{ m.content|length }}: {% endfor %}", "none that can be written as"),
    ],
)
def test_what_is_no_frame_is_refused(template, said, plain):
    with pytest.raises(UserError, match=said):
        donor_prompt(with_template(plain, template), "llm")


def test_the_llms_own_tokenizer_is_left_as_it_was(plain):
    llm = with_template(plain, TEMPLATES["chatml"])
    before = (llm("a b")["input_ids"], llm.eos_token, llm.pad_token, llm.init_kwargs.copy())
    donor_prompt(llm, "llm", [llm.convert_tokens_to_ids("<|im_end|>")])
    assert (llm("a b")["input_ids"], llm.eos_token, llm.pad_token, llm.init_kwargs.copy()) == before
