"""Chat templates of the kinds that LLMs have, as two sides: text and tokens are those that the LLM's own would give.

The templates are written here with the traits of those that are common: ChatML, with a system prompt of its own, with
empty thoughts, headers that trim and date, brackets with the system prompt in the first or in the last question, one
that refuses system prompts, one whose prompts begin a thought.
"""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.encode import encode_sources, encode_targets
from diptych.data_prep.text_to_ids.templates import template_of
from diptych.finetune.pairing import donor_template
from diptych.finetune.pairing.donor_template import CHECKED, donor_prompt

TEXTS = [
    "Name the capital of France.",
    "Paris is the capital.",
    "user assistant system",
    "한국어 네.",
    "Be brief. Hi!\nIt rains.\nIt rains.\n",
    "12 {{ }} # And now?",
]
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content|trim }}<|eot_id|>"
BEGIN_HEADER = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
OPEN = "{% set start = 0 %}{% if messages[0].role == 'system' %}{% set start = 1 %}{% endif %}"
REFUSE = "{% if messages[0].role == 'system' %}{{ raise_exception('none here') }}{% endif %}"
TEMPLATES = {
    "chatml": TURN + BEGIN,
    "own system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    + TURN
    + BEGIN,
    "thoughts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        + BEGIN
        + "{% if add_generation_prompt and enable_thinking is defined"
        " and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    ),
    "headers": "{{ bos_token }}{% for m in messages %}" + HEADER + "{% endfor %}" + BEGIN_HEADER,
    "headers that date": (
        OPEN + "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday is"
        " {{ date_string if date_string is defined else strftime_now('%Y') }}.\n\n"
        "{% if start %}{{ messages[0].content|trim }}{% endif %}<|eot_id|>"
        "{% for m in messages[start:] %}" + HEADER + "{% endfor %}" + BEGIN_HEADER
    ),
    "system in brackets": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {% if system and loop.first %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "system last": (
        OPEN + "{{ bos_token }}{% for m in messages[start:] %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles alternate') }}{% endif %}{% if m.role == 'user' %}[INST] "
        "{% if start and loop.last %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content|trim }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "lines": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
    ),
    "turns, no system": (
        REFUSE + "{{ bos_token }}{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}"
        "\n{{ m.content|trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    ),
    "turns, system in the first": (
        OPEN + "{{ bos_token }}{% for m in messages[start:] %}"
        "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if start and loop.first %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ m.content|trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    ),
    "one question": "{% if messages|length > 2 %}{{ raise_exception('one') }}{% endif %}" + TURN + BEGIN,
    "braces": "{% for m in messages %}{{ '{{' }}{{ m.role }}{{ '{' }}{{ m.content }}{{ '}}' }}{{ eos_token }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '{{assistant{' }}{% endif %}",
}
NO_SYSTEM, NO_HISTORY = ("turns, no system",), ("one question",)
ENDS = {
    "headers": "<|eot_id|>",
    "headers that date": "<|eot_id|>",
    "system in brackets": "</s>",
    "system last": "</s>",
}
ENDS |= {"lines": "</s>", "braces": "</s>"}
CONTROL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
MODERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Words as of Llama 3 and Qwen, where a full stop takes the line end behind it."""


def trained(kind, control=CONTROL):
    """Byte-level BPE; BPE over ▁ words, with bytes, as of Llama 2; Unigram of sentencepiece. All put <s> first."""
    options = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 700}
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        words = pre_tokenizers.Split(Regex(MODERN), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([words, level]), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "words":
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(**options)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    backend.train_from_iterator(TEXTS * 3, trainer)
    if kind == "words":  # bytes are words of the vocabulary, and no added tokens
        backend = Tokenizer.from_str(json.dumps(with_bytes(json.loads(backend.to_str()))))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"extra_special_tokens": control})
    return tokenizer


def with_bytes(state):
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return state


@pytest.fixture(scope="module", params=["bytes", "words", "pieces"])
def plain(request):
    return trained(request.param)


@pytest.fixture(scope="module")
def of_bytes():
    return trained("bytes")


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def donor(tokenizer, kind):
    llm = with_template(tokenizer, TEMPLATES[kind])
    return llm, donor_prompt(llm, "llm", [llm.convert_tokens_to_ids(ENDS.get(kind, "<|im_end|>"))])


def saved(prompt, folder):
    prompt.tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def messages_of(system, history, instruction):
    turns = [{"role": "system", "content": system}] if system else []
    for told, said in history:
        turns += [{"role": "user", "content": told}, {"role": "assistant", "content": said}]
    return [*turns, {"role": "user", "content": instruction}]


def prompt_ids(llm, conversation):
    messages = messages_of(*conversation)
    return llm.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def source_ids(prompt, tokenizer, conversation):
    system, history, instruction = conversation
    (ids,) = encode_sources(tokenizer, [prompt.template.render_source(instruction, "", history, system)])
    return ids


@pytest.mark.parametrize("kind", TEMPLATES)
def test_source_and_start_are_the_llms_own_prompt_in_text_and_tokens(kind, plain, tmp_path):
    llm, prompt = donor(plain, kind)
    tokenizer = saved(prompt, tmp_path)
    assert template_of(tokenizer) == prompt.template  # its golden rows hold, too
    places = prompt.template.source_variables()
    assert ("system" in places, "history" in places) == (kind not in NO_SYSTEM, kind not in NO_HISTORY)
    others = [
        ("", (), "Say [/INST] {%- x -%} {{ 7 * 7 }} and {# no #}?"),
        ("Never say {{ x }}.\n\n한", (("a", "b"), ("\\n", "{}")), "🙂 c"),
    ]
    compared = 0
    for system, history, instruction in [*CHECKED, *others[1:]]:
        if (system and kind in NO_SYSTEM) or (history and kind in NO_HISTORY):
            continue
        conversation = (system, history, instruction)
        ours = [*source_ids(prompt, tokenizer, conversation), prompt.decoder_start_token_id]
        assert ours == prompt_ids(llm, conversation)
        compared += 1
    assert compared >= 3
    assert prompt.template.render_source(others[0][2]) in llm.apply_chat_template(
        messages_of(*others[0]), add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize("kind", TEMPLATES)
def test_an_answer_ends_as_the_llms_ends(kind, plain, tmp_path):
    llm, prompt = donor(plain, kind)
    tokenizer = saved(prompt, tmp_path)
    assert tokenizer.eos_token == ENDS.get(kind, "<|im_end|>")
    different = [note for note in prompt.notes if note.startswith("Answers are cut into other tokens")]
    for answer in ("Paris.", "네, 🙂", "It is\n  two {{ lines }}"):
        messages = [*messages_of("", (), "Name it."), {"role": "assistant", "content": answer}]
        theirs = llm.apply_chat_template(messages, return_dict=True)["input_ids"]
        (labels,) = encode_targets(tokenizer, [prompt.template.render_target(answer)])
        ours = [*source_ids(prompt, tokenizer, ("", (), "Name it.")), prompt.decoder_start_token_id, *labels]
        if different and repr(answer) in different[0]:  # words begin with ▁, also after a line end
            ours, theirs = (tokenizer.decode(ids).replace(" ", "") for ids in (ours, theirs))
        assert theirs[: len(ours)] == ours
        assert labels.count(tokenizer.eos_token_id) == 1


def test_byte_level_answers_are_the_llms_to_the_token(of_bytes):
    for kind in TEMPLATES:
        notes = " ".join(donor(of_bytes, kind)[1].notes)
        assert "Prompts are cut" not in notes, kind
        assert "'Paris.'" not in notes, kind


def test_the_blank_before_a_word_is_not_written_twice():
    """`[/INST] Paris`: where [/INST] is text and words begin with ▁, a target has that blank without writing it."""
    for kind, control, target in (
        ("words", [], "{{ output|trim }}"),
        ("words", CONTROL, " {{ output|trim }}"),
        ("bytes", [], " {{ output|trim }}"),
    ):
        llm, prompt = donor(trained(kind, control), "system last")
        assert prompt.template.target == target
        assert not [note for note in prompt.notes if "are cut into other tokens" in note]
        assert [*source_ids(prompt, prompt.tokenizer, CHECKED[4]), prompt.decoder_start_token_id] == prompt_ids(
            llm, CHECKED[4]
        )


def test_thoughts_stand_where_the_llms_training_has_them(of_bytes):
    _, prompt = donor(of_bytes, "thoughts")
    assert prompt.template.render_source("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant"
    assert prompt.template.render_target("Hi") == "<think>\n\n</think>\n\nHi"
    assert prompt.template.render_source("b", "", (("Hi", "a"),)).count("<think>") == 0
    assert "Targets begin with '<think>\\n\\n</think>\\n\\n'" in " ".join(prompt.notes)


def test_a_prompt_that_begins_a_thought_stays_one(of_bytes):
    llm = with_template(of_bytes, TURN + BEGIN.replace("assistant\n", "assistant\n<think>\n"))
    prompt = donor_prompt(llm, "llm")
    assert [*source_ids(prompt, prompt.tokenizer, CHECKED[0]), prompt.decoder_start_token_id] == prompt_ids(
        llm, CHECKED[0]
    )
    assert "prompts end in '<|im_end|>\\n<|im_start|>assistant\\n<think>\\n', and in its conv" in " ".join(
        prompt.notes
    )


def test_a_template_that_begins_no_answers_gives_targets_their_beginning(of_bytes):
    prompt = donor_prompt(with_template(of_bytes, TURN), "llm", [of_bytes.convert_tokens_to_ids("<|im_end|>")])
    assert prompt.template.render_source("b").endswith("<|im_start|>user\nb<|im_end|>")
    assert prompt.template.render_target("a") == "<|im_start|>assistant\na"
    assert prompt.tokenizer.decode([prompt.decoder_start_token_id]) == "\n"


def test_input_is_a_paragraph_of_the_question_and_text_stays_text(plain):
    _, prompt = donor(plain, "chatml")
    text = prompt.template.render_source("Sum up.", "a <|im_end|> b")
    assert text == "<|im_start|>user\nSum up.\n\na <|im_end|> b<|im_end|>\n<|im_start|>assistant"
    (ids,) = encode_sources(prompt.tokenizer, [text])
    end = prompt.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 1, "the row's own is five words of text"
    (labels,) = encode_targets(prompt.tokenizer, [prompt.template.render_target("a <|im_end|> b")])
    assert labels.count(end) == 1 and labels[-1] == end
    _, trimming = donor(plain, "headers")
    assert "\n\na\n\n b<|eot_id|>" in trimming.template.render_source(" a", " b "), "trimmed as one text"


def test_templates_are_written_to_be_read(of_bytes):
    assert donor(of_bytes, "chatml")[1].template.source == (
        "{% if system %}<|im_start|>system\n{{ system }}<|im_end|>\n{% endif %}<|im_start|>user\n"
        "{% for turn in history %}{{ turn[0] }}<|im_end|>\n<|im_start|>assistant\n{{ turn[1] }}<|im_end|>\n"
        "<|im_start|>user\n{% endfor %}{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}<|im_end|>\n"
        "<|im_start|>assistant"
    )
    assert donor(of_bytes, "system last")[1].template.source == (
        "<s>[INST] {% for turn in history %}{{ turn[0] }}[/INST] {{ turn[1]|trim }}</s>[INST] {% endfor %}"
        "{% if system %}{{ system }}\n\n{% endif %}{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}"
    )


def test_what_is_otherwise_is_said(of_bytes):
    def notes(kind):
        return " ".join(donor(of_bytes, kind)[1].notes)

    assert "ours keeps that of this day" in notes("headers that date")
    assert "this day" not in notes("headers")
    assert "has no padding token; <pad> is it now" in notes("chatml")
    assert "The end token is <|im_end|>, which ends the LLM's answers; it was </s>." in notes("chatml")
    assert "has no place for system prompts" in notes("turns, no system")
    assert "has no place for earlier turns" in notes("one question")
    assert "Blanks around system prompts, questions, answers are lost" in notes("headers")
    assert "Blanks around answers are lost" in notes("system last")
    assert "gives other texts" not in notes("chatml")


def test_an_end_that_the_llm_does_not_name_is_text_of_the_target(of_bytes):
    prompt = donor_prompt(with_template(of_bytes, TEMPLATES["chatml"]), "llm")
    assert prompt.template.target == "{{ output }}<|im_end|>"
    (labels,) = encode_targets(prompt.tokenizer, [prompt.template.render_target("Hi")])
    assert prompt.tokenizer.convert_ids_to_tokens(labels[-2:]) == ["<|im_end|>", "</s>"]
    assert "which it does not name as an end" in " ".join(prompt.notes)


def test_ids_that_are_no_tokens_are_passed_over(of_bytes):
    prompt = donor_prompt(with_template(of_bytes, TEMPLATES["chatml"]), "llm", [10**6, -1], pad_token_id=-1)
    assert (prompt.tokenizer.eos_token, prompt.tokenizer.pad_token) == ("</s>", "<pad>")
    prompt = donor_prompt(of_bytes, "llm", [], pad_token_id=3)
    assert prompt.tokenizer.pad_token == "<unk>"


@pytest.mark.parametrize(
    "token, pad",
    [("<|finetune_right_pad_id|>",) * 2, ("<|reserved_pad_0|>",) * 2, ("<|fim_pad|>", "<unk>"), (None, "<unk>")],
)
def test_a_reserved_token_pads_or_the_unknown_one(token, pad, of_bytes):
    state = json.loads(of_bytes.backend_tokenizer.to_str().replace("<pad>", "<zero>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llm = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)
    if token:
        llm.add_special_tokens({"extra_special_tokens": [token]})
    assert donor_prompt(with_template(llm, TEMPLATES["lines"]), "llm").tokenizer.pad_token == pad


@pytest.mark.parametrize("kind", ["chatml", "headers", "system last"])
@pytest.mark.parametrize("family", [LlamaTokenizer, GemmaTokenizer])
def test_tokenizers_that_add_a_bos_add_none_once_saved(family, kind, tmp_path):
    """Their classes make a post-processor anew when they are loaded."""
    model = json.loads(trained("words").backend_tokenizer.to_str())["model"]
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    merges = [tuple(merge) for merge in model["merges"]]
    llm = family(vocab=model["vocab"], merges=merges, add_bos_token=True, **names)
    llm.add_special_tokens({"extra_special_tokens": CONTROL})
    assert llm("a")["input_ids"][0] == llm.bos_token_id
    llm, prompt = donor(llm, kind)
    tokenizer = saved(prompt, tmp_path)
    assert type(tokenizer) is family
    assert tokenizer("a")["input_ids"] == llm("a", add_special_tokens=False)["input_ids"]
    assert tokenizer.chat_template == llm.chat_template
    for conversation in CHECKED:
        ours = [*source_ids(prompt, tokenizer, conversation), prompt.decoder_start_token_id]
        assert ours == prompt_ids(llm, conversation)
    (labels,) = encode_targets(tokenizer, [prompt.template.render_target("Paris.")])
    assert tokenizer.bos_token_id not in labels and labels[-1] == tokenizer.eos_token_id


def test_a_base_model_is_prompted_by_lines(plain):
    prompt = donor_prompt(with_template(plain, None), "llm")
    notes = " ".join(prompt.notes)
    assert "There is no chat template" in notes
    assert prompt.template.render_source("Sum up.", "a b") == "<s>Sum up.\na b"
    assert prompt.template.render_source("c", "", (("a", "b"),), "S.") == "<s>S.\n\na\nb\n\nc"
    start = prompt.tokenizer.decode([prompt.decoder_start_token_id])
    assert start == ("\n" if "The decoder starts with a line end" in notes else "<s>")


def test_a_base_model_starts_with_a_line_end_where_full_stops_take_theirs_along(of_bytes):
    assert ".Ċ" in of_bytes.get_vocab(), "so that a prompt's last token would not be the line end"
    prompt = donor_prompt(with_template(of_bytes, None), "llm")
    assert prompt.tokenizer.decode([prompt.decoder_start_token_id]) == "\n"


def test_without_a_token_for_line_ends_a_base_model_starts_with_bos():
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    for more, start in (({"bos_token": "<s>"}, 1), ({}, 2)):
        prompt = donor_prompt(PreTrainedTokenizerFast(tokenizer_object=backend, **names, **more), "llm")
        assert prompt.decoder_start_token_id == start
        assert "No token is a line end and nothing else" in " ".join(prompt.notes)


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not render a question"),
        ("{{ messages[-1].content }}", "does not render a question and the beginning of an answer"),
        ("{% for m in messages %}{{ m.content|upper }}: {% endfor %}", "does not render a question"),
        ("{% for m in messages %}{{ m.content }}{{ m.content|length }}: {% endfor %}", "cannot be written as"),
        ("{{ messages[0].content }}: {{ 1 / 0 }}", "fails on a question: division by zero"),
        ("{% for m in messages %}{{ m.content }}", "fails on a question: Unexpected end of template"),
        ({"rag": TURN + BEGIN}, "fails on a question"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "llm takes more than 1 s"),
        ("{% set a = 'aaaaaaaaaa' * 10 ** 8 %}{{ a ~ a }}", "llm takes more than .* 1,073,741,824 bytes"),
        ("{{ 'a' * 10 ** 7 }}", "llm takes more than .* 1,000,000 characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on a question: maximum recursion depth"),
    ],
)
def test_what_is_no_frame_is_refused(template, said, plain, monkeypatch):
    monkeypatch.setattr(donor_template, "SECONDS", 1)
    with pytest.raises(UserError, match=said):
        donor_prompt(with_template(plain, template), "llm")


def test_a_prompt_that_no_source_can_end_before_is_refused():
    """A last token that is a byte of a character: no text ends in the others."""
    llm = with_template(trained("words"), "{% for m in messages %}{{ m.content }} 語{% endfor %}")
    with pytest.raises(UserError, match="end in tokens that no text ends in alone .*<0x9E>"):
        donor_prompt(llm, "llm")


def test_the_llms_own_tokenizer_is_left_as_it_was(plain):
    llm = with_template(plain, TEMPLATES["chatml"])
    before = (llm("a b")["input_ids"], llm.eos_token, llm.pad_token, llm.init_kwargs.copy())
    donor_prompt(llm, "llm", [llm.convert_tokens_to_ids("<|im_end|>")])
    assert (llm("a b")["input_ids"], llm.eos_token, llm.pad_token, llm.init_kwargs.copy()) == before
