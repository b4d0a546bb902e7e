"""LoRA and its kin on every family: what is trained and saved, and that loaded and merged it is what was trained."""

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, UMT5Config
from transformers.pytorch_utils import Conv1D

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.commands.exit_codes import CheckpointError
from diptych.finetune.model import adapters as lora
from diptych.finetune.model.adapters import (
    ADAPTER_WEIGHTS,
    FAILING,
    METHODS,
    VARIANTS,
    add_adapter,
    load_adapter,
    merge_adapter,
    resize_embeddings,
    save_adapter,
)
from diptych.finetune.model.families import FAMILIES, decoder_start_token, input_and_output_tables, vocabulary_tables
from diptych.finetune.model.loading import load_checkpoint
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.train import run_recipe
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.saving import save_model
from diptych.finetune.training.starting_model import starting_model

NEW_TOKEN = 370
ROWS = [
    {"input_ids": [12, 7, NEW_TOKEN, 1], "labels": [31, NEW_TOKEN + 1, 1]},
    {"input_ids": [5, 8, 1], "labels": [22, 1]},
]
GROWN = NEW_TOKEN + 2
SMALL = {"rank": 4, "alpha": 8}

# As little as a method takes on layers of 64 and 128.
FIELDS = {"OFT": {"oft_block_size": 4}, "VERA": {"r": 16}}
KINDS = [*VARIANTS, *METHODS[1:]]
ROUNDING = ("led", "fsmt", "prophetnet")
"""These compute the same to the last digits but one when they are loaded a second time: they multiply tensors whose
rows are not next to each other, and then the last bits depend on where weights are in memory (on some CPUs)."""
ADAPTED = [family for family in FAMILIES if family not in ROUNDING]
PAIRS = [
    (family, kind)
    for place, family in enumerate(ADAPTED)
    for number, kind in enumerate(KINDS)
    if family in ("t5", "bart", "diptych") or number == place % len(KINDS) or os.environ.get("DIPTYCH_FAMILIES")
    if (kind, family) not in FAILING
]
"""Every kind on three families, each of the others with one kind; all pairs with DIPTYCH_FAMILIES=all."""
WITHOUT_ADAPTER = ("vision_tower", "pooler", "cls.predictions", "router.classifier", "relative_pos_embeddings")
"""Linear layers that are neither attention nor feed-forward network, or that text does not reach."""


def settings_of(kind: str, family: str) -> dict:
    if kind in VARIANTS:
        return SMALL | {"variant": kind}
    scaled_going_in = [name for name in FAMILIES[family].lora_targets if name in ("wo", "fc2", "down_proj")]
    own = {"feedforward_modules": scaled_going_in} if kind == "IA3" else FIELDS.get(kind, {"r": 4})
    return {"peft_config": {"peft_type": kind} | own}


def train(model: PeftModel, steps: int = 5) -> None:
    """Far enough from its start that a mistake in loading or merging is seen."""
    objective = Seq2SeqObjective(model).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-2, weight_decay=0.0)
    for _ in range(steps):
        objective(batch_for(model), 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def batch_for(model) -> dict[str, torch.Tensor]:
    rows = model.get_input_embeddings().weight.shape[0]
    kept = [{name: [min(token, rows - 1) for token in ids] for name, ids in row.items()} for row in ROWS]
    return pad_batch(kept, 0, decoder_start_token(model))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**{name: ids for name, ids in batch_for(model).items() if name != "labels"}).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-5 of the logits' size: the random heads of mT5 and T5Gemma have logits in the hundreds."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


def merged_and_loaded(model: PeftModel, trained: torch.Tensor, folder):
    """Merged, the logits are those of the adapter; saved and loaded, the same bits."""
    merged = merge_adapter(model)
    assert_close(logits(merged), trained)
    merged.save_pretrained(folder / "merged")
    again = AutoModelForSeq2SeqLM.from_pretrained(folder / "merged").eval()
    assert torch.equal(logits(again), logits(merged))
    return again


@pytest.mark.parametrize("with_tables", [False, True])
@pytest.mark.parametrize("family", ADAPTED)
def test_saved_adapter_loads_exactly_and_merges(family, with_tables, checkpoint_of, tmp_path):
    def base():
        return AutoModelForSeq2SeqLM.from_pretrained(checkpoint_of(family))

    settings = SMALL | {"train_embeddings": with_tables}
    model = add_adapter(base(), str(checkpoint_of(family)), **settings)
    before = logits(model.eval())
    train(model)
    trained = logits(model)
    assert (trained - before).abs().max() > 0.01
    save_adapter(model, tmp_path / "adapter")

    resumed = add_adapter(base(), str(checkpoint_of(family)), **settings).eval()
    load_adapter(resumed, tmp_path / "adapter")
    assert torch.equal(logits(resumed), trained)

    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()  # peft alone, as anyone would
    assert torch.equal(logits(loaded), trained)

    merged_and_loaded(loaded, trained, tmp_path)


@pytest.mark.parametrize("family", [*ADAPTED, "led"])
def test_every_linear_layer_of_both_panels_gets_an_adapter(family, new_model):
    model = new_model(family)
    tables = {id(weight) for weight in vocabulary_tables(model).values()}
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and id(module.weight) not in tables
        and not any(part in name for part in WITHOUT_ADAPTER)
    }
    adapted = add_adapter(model, "base", rank=2, alpha=4)
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, weight in adapted.named_parameters()
        if weight.requires_grad and "lora_A" in name
    }
    assert found == linear
    assert all(f".{name}".endswith(tuple(f".{end}" for end in FAMILIES[family].lora_targets)) for name in found)
    for panel in ("encoder", "decoder"):
        assert any(f".{panel}." in f".{name}" for name in found)
    crosses = ("EncDec", "encoder_attn", "cross_attn", "crossattention", "cross_attention")
    crossing = {name for name in found if any(cross in name for cross in crosses)}
    is_merged = family in ("diptych_merged", "t5gemma2")  # whose cross-attention is self-attention
    hinges = 0 if is_merged else 4  # query, key, value and output
    assert len(crossing) == 2 * hinges


def test_every_target_of_the_table_is_a_layer_of_some_model_of_its_kind(new_model):
    """T5 has one way in (`wi`) or two; two models are of BERT's kind or GPT-2."""
    others = {"t5": "mt5", "longt5": "mt5", "umt5": "t5", "mt5": "t5", "switch_transformers": "mt5"}
    others |= {"encoder-decoder": "bert_gpt2"}
    for family, entry in FAMILIES.items():
        names = [
            f".{name}"
            for kind in (family, others.get(family, family))
            for name, module in new_model(kind).named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D)
        ]
        assert all(any(name.endswith(f".{end}") for name in names) for end in entry.lora_targets), family


@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma", "diptych"])
def test_only_the_new_rows_of_a_grown_vocabulary_move(family, new_model):
    model = new_model(family)
    resize_embeddings(model, GROWN)
    adapted = add_adapter(model, "base", rank=2, alpha=4, new_rows=GROWN - 368)
    tables = vocabulary_tables(model)
    before = {name: table.detach().clone() for name, table in tables.items()}
    train(adapted)
    for name, table in tables.items():
        assert torch.equal(table[:368], before[name][:368]), name
        assert not torch.equal(table[NEW_TOKEN:], before[name][NEW_TOKEN:]), name


@pytest.mark.parametrize("family", ADAPTED)
def test_grown_checkpoint_loads_again(family, new_model, tmp_path):
    model = new_model(family).eval()
    resize_embeddings(model, GROWN)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def which_are_one(model) -> list[int]:
    """Of the tables of the model, the encoder, the decoder and the head, the first one that each is."""
    tables = input_and_output_tables(model)
    return [next(place for place, other in enumerate(tables) if other is table) for table in tables]


@pytest.mark.parametrize(("kind", "family"), FAILING)
def test_a_method_that_fails_on_a_family_is_refused_before_anything_is_loaded(
    kind, family, checkpoint_of, tmp_path, monkeypatch
):
    settings = {"model": str(checkpoint_of(family)), "data": str(tmp_path / "absent"), "out": str(tmp_path)}
    with pytest.raises(
        UserError, match=f"peft's {kind} does not work on a {family}: .*Choose from: LORA, HRA, .*VERA"
    ):
        run_recipe(TrainRecipe(**settings, max_steps=1, method="lora", peft_config={"peft_type": kind}))
    monkeypatch.setattr(lora, "FAILING", {})
    adapted = add_adapter(AutoModelForSeq2SeqLM.from_pretrained(settings["model"]), "", **settings_of(kind, family))
    with pytest.raises(RuntimeError):  # if it trains, take it out of the table
        train(adapted, 1)


def test_whatever_peft_raises_when_it_adds_an_adapter_is_one_message(new_model, monkeypatch):
    def fail(layer, *_, **settings):
        raise RuntimeError("shape '[3]' is invalid")

    monkeypatch.setattr("peft.tuners.hra.layer.HRALayer.update_layer", fail)
    with pytest.raises(UserError, match="no adapter could be added: shape .* is invalid. Change peft_config"):
        add_adapter(new_model("t5"), "base", peft_config={"peft_type": "HRA"})


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_every_kind_loads_with_peft_alone_and_merges(family, kind, checkpoint_of, tmp_path):
    base, settings = checkpoint_of(family), settings_of(kind, family)
    torch.manual_seed(1)
    model = add_adapter(AutoModelForSeq2SeqLM.from_pretrained(base), str(base), **settings)
    before = logits(model.eval())
    train(model, 3)
    trained = logits(model)
    assert (trained - before).abs().max() > 0.01
    save_adapter(model, tmp_path / "adapter")

    torch.manual_seed(1)
    resumed = add_adapter(AutoModelForSeq2SeqLM.from_pretrained(base), str(base), **settings).eval()
    load_adapter(resumed, tmp_path / "adapter")
    assert torch.equal(logits(resumed), trained)

    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), trained)

    ties = which_are_one(loaded.get_base_model())
    again = merged_and_loaded(loaded, trained, tmp_path)
    assert which_are_one(again) == ties == which_are_one(AutoModelForSeq2SeqLM.from_pretrained(base))


@pytest.mark.parametrize("family", [*ROUNDING, "bert_gpt2"])
def test_an_adapter_loads_with_peft_alone_and_merges_to_rounding(family, checkpoint_of, tmp_path):
    base = checkpoint_of(family)
    model = add_adapter(AutoModelForSeq2SeqLM.from_pretrained(base), str(base), **SMALL)
    before = logits(model.eval())
    train(model, 3)
    trained = logits(model)
    assert (trained - before).abs().max() > 0.01
    save_adapter(model, tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    assert_close(logits(loaded), trained)
    merge_adapter(loaded).save_pretrained(tmp_path / "merged")
    assert_close(logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()), trained)


def add_words(tokenizer, folder):
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens([f"<{number}>" for number in range(GROWN - len(tokenizer))])
    return tokenizer


@pytest.fixture
def with_own_head(checkpoint_of, tmp_path):
    """`with_own_head("t5")`: a checkpoint whose head is not the input table, though its config may say so, as that of
    Flan-T5 does."""

    def make(family: str):
        model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint_of(family))
        model.save_pretrained(tmp_path / "base")
        file = tmp_path / "base" / "model.safetensors"
        head = next(name for name, layer in model.named_modules() if layer is model.get_output_embeddings())
        torch.manual_seed(2)
        weights = load_file(file) | {f"{head}.weight": torch.randn(368, 64) / 4}
        save_file(weights, file, metadata={"format": "pt"})
        return tmp_path / "base"

    return make


@pytest.mark.parametrize("family", ADAPTED)
def test_a_vocabulary_grows_under_a_head_of_its_own(family, with_own_head, tmp_path):
    base = with_own_head(family)

    def grown_base():
        model = AutoModelForSeq2SeqLM.from_pretrained(base)
        resize_embeddings(model, GROWN)
        return model

    plain = AutoModelForSeq2SeqLM.from_pretrained(base)
    grown = grown_base()
    ties = which_are_one(plain)
    assert ties[3] == 3 and which_are_one(grown) == ties
    for table, old in zip(input_and_output_tables(grown), input_and_output_tables(plain), strict=True):
        assert table.shape[0] == GROWN and torch.equal(table[:368], old)

    settings = SMALL | {"new_rows": GROWN - 368}
    model = add_adapter(grown, str(base), **settings)
    train(model)
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter")
    resumed = add_adapter(grown_base(), str(base), **settings).eval()
    load_adapter(resumed, tmp_path / "adapter")
    assert torch.equal(logits(resumed), trained)
    loaded = PeftModel.from_pretrained(grown_base(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), trained)
    assert which_are_one(merged_and_loaded(loaded, trained, tmp_path)) == ties


@pytest.mark.parametrize("family", ADAPTED)
def test_a_head_of_its_own_is_trained_in_full_and_saved(family, with_own_head, tiny_tokenizer, tmp_path):
    tokenizer = add_words(tiny_tokenizer, tmp_path)
    recipe = {"model": str(with_own_head(family)), "data": "d", "out": "o", "epochs": 1, "grow_vocabulary": True}
    model = starting_model(TrainRecipe(**recipe), tokenizer, None)
    ties = which_are_one(model)
    train(model, 3)
    save_model(model, tokenizer, tmp_path / "trained")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "trained").eval()
    assert again.get_output_embeddings().weight.shape[0] == GROWN and which_are_one(again) == ties
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ADAPTED)
def test_an_untied_vocabulary_grows_and_loads_again(family, new_model, tmp_path):
    """BART's three tables are apart then, and Marian has a fourth that nothing reads."""
    model = new_model(family, tie_word_embeddings=False).eval()
    ties, batch = which_are_one(model), batch_for(model)
    del batch["labels"]
    with torch.no_grad():
        before = model(**batch).logits
        resize_embeddings(model, GROWN)
        assert_close(model(**batch).logits[..., :368], before)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model)) and which_are_one(again) == ties


# (transformers resizes no EncoderDecoderModel.)
@pytest.mark.parametrize("family", [family for family in ADAPTED if family != "encoder-decoder"])
def test_new_tokens_come_with_the_adapter_for_peft_alone(family, checkpoint_of, tiny_tokenizer, tmp_path):
    base = checkpoint_of(family)
    tokenizer = add_words(tiny_tokenizer, tmp_path)

    def grown():
        model = AutoModelForSeq2SeqLM.from_pretrained(base)
        resize_embeddings(model, GROWN)
        return add_adapter(model, str(base), **SMALL, new_rows=GROWN - 368).eval()

    model = grown()
    train(model)
    save_adapter(model, tmp_path / "adapter")
    resumed = grown()
    load_adapter(resumed, tmp_path / "adapter")
    assert torch.equal(logits(resumed), logits(model))
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    assert loaded.get_input_embeddings().weight.shape[0] == GROWN
    assert torch.equal(logits(loaded), logits(model))
    merged_and_loaded(resumed, logits(model), tmp_path)


def save_with_peft(base, settings: dict, tokenizer, folder, rows: int = 0) -> torch.Tensor:
    """An adapter as anyone trains it, with peft and transformers alone; the logits that it had."""
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows)
    head = next(name for name, layer in model.named_modules() if layer is model.get_output_embeddings())
    of_model = {"head": head.rsplit(".", 1)[-1]}
    settings = {key: [of_model.get(layer, layer) for layer in layers] for key, layers in settings.items()}
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, init_lora_weights=False, **settings))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return logits(model.eval())


ON_TABLES = {
    "head": {"target_modules": ["head", "v", "v_proj"]},
    "inputs": {"target_modules": ["embed_tokens"]},
    "shared": {"target_modules": ["shared", "embed_tokens", "head"]},
    "saved head": {"target_modules": ["v", "v_proj"], "modules_to_save": ["head"]},
    "saved shared": {"target_modules": ["v", "v_proj"], "modules_to_save": ["shared"]},
    "tokens": {"target_modules": ["v", "v_proj"], "trainable_token_indices": [7, 12]},
}


@pytest.mark.parametrize("where", ON_TABLES)
@pytest.mark.parametrize("family", ["t5", "umt5", "bart", "m2m_100", "marian", "t5gemma", "diptych", "t5, own head"])
def test_adapters_on_a_tied_table_merge_and_load_again(
    family, where, checkpoint_of, with_own_head, tiny_tokenizer, tmp_path
):
    """What peft adds to one layer of a tie is not for the others, and an untied head is kept."""
    if family == "umt5" and not hasattr(UMT5Config(), "scale_decoder_outputs"):
        pytest.skip("before transformers 5.24, UMT5 scales for a tied head whether it has one or not")
    base = with_own_head("t5") if family == "t5, own head" else checkpoint_of(family)
    trained = save_with_peft(base, ON_TABLES[where], tiny_tokenizer, tmp_path / "adapter")
    model = load_checkpoint(tmp_path / "adapter").model
    assert_close(logits(model), trained)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(model))
    plain = AutoModelForSeq2SeqLM.from_pretrained(base)
    is_apart = which_are_one(model) != which_are_one(plain)
    assert is_apart == (where in ("head", "inputs", "shared", "saved head") and f"{family}{where}" not in KEPT)
    says = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert says == (plain.config.tie_word_embeddings and not is_apart)


KEPT = ("t5, own headhead", "t5, own headsaved head")
"""Where nothing was tied to what is trained."""


def test_a_merge_that_changes_the_logits_is_refused(checkpoint_of, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "_copy_weight", lambda layer: None)  # as if a tie were not seen
    save_with_peft(checkpoint_of("t5"), ON_TABLES["head"], tiny_tokenizer, tmp_path)
    with pytest.raises(UserError, match="merging changes logits by .*peft.AutoPeft"):
        load_checkpoint(tmp_path)


def test_adapter_weights_for_a_layer_that_the_config_does_not_name_are_refused(
    checkpoint_of, tiny_tokenizer, tmp_path
):
    """peft itself leaves them out without a word, and saves such adapters if it ties them (`ensure_weight_tying`)."""
    save_with_peft(checkpoint_of("t5"), {"target_modules": ["q", "head"]}, tiny_tokenizer, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q"]}))
    with pytest.raises(UserError, match="lm_head.lora_A.weight, and target_modules .* does not name this layer"):
        load_checkpoint(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q", "k", "lm_head"]}))
    with pytest.raises(UserError, match="lacks .*k.lora_A.default.weight, which adapter_config.json asks for"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("rows", [370, 384])
@pytest.mark.parametrize("where", ["head", "saved head", "tokens"])
@pytest.mark.parametrize("family", ["t5", "bart", "m2m_100", "diptych", "t5, own head"])
def test_an_adapter_says_how_many_rows_its_tables_have(family, where, rows, new_model, tiny_tokenizer, tmp_path):
    """Cut to the tokenizer's size, or padded to a multiple, by transformers; the base has 376."""
    model = new_model(family.split(",")[0])
    resize_embeddings(model, 376)
    if family == "t5, own head":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(376, 64) / 4)
    model.save_pretrained(tmp_path / "base")
    trained = save_with_peft(tmp_path / "base", ON_TABLES[where], tiny_tokenizer, tmp_path / "adapter", rows=rows)
    model = load_checkpoint(tmp_path / "adapter").model
    assert model.config.vocab_size == rows
    assert_close(logits(model), trained)


def test_an_adapter_without_the_rows_of_its_new_tokens_is_refused(new_model, tiny_tokenizer, tmp_path):
    """transformers resizes a T5Gemma in a way that peft does not see, so that it leaves the tables out."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<new>", "<newer>"])
    new_model("t5gemma").save_pretrained(tmp_path / "base")
    save_with_peft(tmp_path / "base", {"target_modules": ["q_proj"]}, tokenizer, tmp_path / "adapter", rows=370)
    with pytest.raises(UserError, match="tokenizer has 370 tokens, the base 368, and .* lacks .*embed_tokens with"):
        load_checkpoint(tmp_path / "adapter")


# One for each kind of layer that an adapter is put on, and of tie.
@pytest.mark.parametrize(
    "family", ["t5", "bart", "m2m_100", "t5gemma", "diptych", "diptych_merged", "encoder-decoder"]
)
def test_adapters_of_several_kinds_share_a_base(family, checkpoint_of, tmp_path):
    base, expected = checkpoint_of(family), {}
    for kind in ("lora", "rslora", "dora"):
        model = add_adapter(AutoModelForSeq2SeqLM.from_pretrained(base), str(base), **SMALL, variant=kind)
        train(model, 3)
        save_adapter(model, tmp_path / kind)
        expected[kind] = logits(model)
    loaded = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), tmp_path / "lora", "lora").eval()
    for kind in ("rslora", "dora"):
        loaded.load_adapter(tmp_path / kind, kind)
    for kind in ("dora", "lora", "rslora"):
        loaded.set_adapter(kind)
        assert_close(logits(loaded.eval()), expected[kind])
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(AutoModelForSeq2SeqLM.from_pretrained(base).eval()))


def test_of_adapters_with_tables_the_last_one_loaded_has_the_base(checkpoint_of, tmp_path):
    """What the docstring of lora.py warns of: if peft learns to keep tables apart, that warning can go."""
    base, expected = checkpoint_of("t5"), []
    for place, steps in (("first", 3), ("second", 6)):
        model = add_adapter(AutoModelForSeq2SeqLM.from_pretrained(base), str(base), **SMALL, train_embeddings=True)
        train(model, steps)
        save_adapter(model, tmp_path / place)
        expected.append(logits(model))
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "first", "first").eval()
    assert torch.equal(logits(loaded), expected[0])
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded.eval()), expected[1])
    loaded.set_adapter("first")
    assert not torch.allclose(logits(loaded.eval()), expected[0], atol=0.01)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"targets": ["q", "qproj"]}, "lora_targets names qproj, and no linear layer is called so.*Choose from: k, "),
        ({"peft_config": {"peft_type": "LOHAA"}}, "peft_type is 'LOHAA'.*Did you mean LOHA"),
        ({"peft_config": {"peft_type": "PREFIX_TUNING"}}, "peft_type is 'PREFIX_TUNING'.*Choose from: LORA, "),
        (
            {"peft_config": {"peft_type": "LOHA", "rnk": 4}},
            "peft_config has 'rnk', which is not to be set for LOHA.*alpha",
        ),
        ({"peft_config": {"peft_type": "LOHA", "modules_to_save": ["shared"]}}, "'modules_to_save', which is not"),
        ({"peft_config": {"use_dora": True}}, "'use_dora', which is not to be set for LORA.*rank_pattern"),
        ({"peft_config": {"peft_type": "OFT", "r": 4, "oft_block_size": 4}}, "peft takes no such OFTConfig"),
        ({"peft_config": {"peft_type": "IA3", "feedforward_modules": ["fc1"]}}, "no such IA3Config.*subset"),
    ],
)
def test_what_cannot_be_adapted_is_refused(settings, message, new_model):
    with pytest.raises(UserError, match=message):
        add_adapter(new_model("t5"), "base", **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "full", "lora_variant": "dora"}, "lora_variant is given, but method is full"),
        ({"method": "full", "quantize": "4bit"}, "quantize is given, but method is full"),
        (
            {"peft_config": {"peft_type": "LOHA"}, "lora_rank": 4},
            "lora_rank is given, but peft_config.peft_type is LOHA",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TrainRecipe(**({"model": "m", "data": "d", "out": "o", "epochs": 1, "method": "lora"} | settings))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_does_not_begin_with_an_adapter_and_names_merge(method, new_model, tiny_tokenizer, tmp_path):
    save_adapter(add_adapter(new_model("t5"), "base", rank=2), tmp_path)
    recipe = TrainRecipe(model=str(tmp_path), data="d", out="o", epochs=1, method=method)
    with pytest.raises(UserError, match="is an adapter.*: diptych merge .* --out merged, then train --model merged"):
        starting_model(recipe, tiny_tokenizer, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_four_bits_without_a_gpu_are_refused_before_anything_is_loaded(checkpoint_of, tiny_tokenizer):
    recipe = TrainRecipe(model=str(checkpoint_of("t5")), data="d", out="o", epochs=1, method="lora", quantize="4bit")
    with pytest.raises(UserError, match="quantize is 4bit, and there is no CUDA GPU"):
        starting_model(recipe, tiny_tokenizer, None)


@pytest.mark.slow
def test_a_run_of_another_kind_goes_on_with_the_same_bits(checkpoint_of, training_folder, tmp_path):
    """Also in random matrices that VeRA draws and never trains."""
    settings = {"peft_config": {"peft_type": "VERA", "r": 16}}
    settings |= {"model": str(checkpoint_of("bart")), "data": str(training_folder), "method": "lora", "batch_size": 4}
    settings |= {"schedule": "constant", "learning_rate": 1e-2, "save_every": 2, "precision": "fp32"}
    whole = TrainRecipe(out=str(tmp_path / "whole"), max_steps=4, **settings)
    cut = TrainRecipe(out=str(tmp_path / "cut"), max_steps=2, **settings)
    run_recipe(whole)
    run_recipe(cut)
    run_recipe(replace(cut, max_steps=4, resume=True))
    weights = [load_file(tmp_path / run / "final" / ADAPTER_WEIGHTS) for run in ("whole", "cut")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    with pytest.raises(UserError, match="peft_config .* -> "):
        run_recipe(replace(cut, resume=True, lora_variant="dora", peft_config={}))


def test_an_adapter_of_another_shape_is_not_gone_on_with(new_model, tmp_path):
    save_adapter(add_adapter(new_model("t5"), "base", rank=2), tmp_path)
    with pytest.raises(CheckpointError, match=f"{ADAPTER_WEIGHTS} is of another adapter: .*lora_A.weight"):
        load_adapter(add_adapter(new_model("t5"), "base", rank=4), tmp_path)


def test_ranks_by_layer_and_left_out_modules_are_kept(checkpoint_of, tmp_path):
    base = checkpoint_of("bart")
    pattern = {"rank_pattern": {"fc1": 6}, "alpha_pattern": {"fc1": 3}, "exclude_modules": ["fc2"]}
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    model = add_adapter(model, str(base), **SMALL, peft_config=pattern)
    train(model)
    save_adapter(model, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["r"] == 4 and saved["rank_pattern"] == {"fc1": 6}
    assert not any("fc2" in name for name in load_file(tmp_path / ADAPTER_WEIGHTS))
    assert_close(logits(AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path).eval()), logits(model))


def test_a_step_without_a_layer_that_is_trained_changes_nothing(short_run, training_folder, new_model, tmp_path):
    """M2M100 leaves out layers at random; with these rates always all of them."""
    new_model("m2m_100", encoder_layerdrop=1.0, decoder_layerdrop=1.0).save_pretrained(tmp_path / "base")
    settings = short_run(data=str(training_folder), model=str(tmp_path / "base"), method="lora", max_steps=2)
    assert run_recipe(settings) == 0
    trained = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert all(not weight.any() for name, weight in trained.items() if "lora_B" in name)
