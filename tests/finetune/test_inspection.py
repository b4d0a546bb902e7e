"""`diptych inspect`: its numbers against the models' own, its page in a real browser."""

import json
import re
import shutil

import pytest
import torch
from conftest import EIGHT_ROWS, TO_KOREAN
from peft import LoraConfig, get_peft_model
from small_families import PACKED, family_configs
from transformers import AutoModelForSeq2SeqLM

from diptych.finetune.commands.cli import main as diptych
from diptych.finetune.inference.attention_weights import Attentions, mean_weights, recompute, rollout
from diptych.finetune.inspecting import inspection_facts as facts
from diptych.finetune.inspecting.inspection import render_page
from diptych.finetune.model.families import FAMILIES, family_of
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint
from diptych.modeling import DiptychConfig

SOURCE, WRITTEN = torch.tensor([[5, 6, 7, 8, 1]]), torch.tensor([[2, 9, 10]])
HOSTILE = '</script><script>window.ran = true</script><img src=x onerror="window.ran = true">'


@pytest.fixture
def loaded(loaded_t5):
    return loaded_t5


@pytest.mark.parametrize("family", PACKED)
def test_attention_is_that_of_the_model_whatever_kernel_it_runs_on(family):
    torch.manual_seed(0)
    config = family_configs(400)[family]
    known = FAMILIES[family].attentions
    kernel = "sdpa" if "sdpa" in known else "eager"
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=kernel).eval()
    seen = recompute(model, SOURCE, WRITTEN)
    assert model.config._attn_implementation == kernel
    with torch.no_grad():
        logits = model(input_ids=SOURCE, attention_mask=torch.ones_like(SOURCE), decoder_input_ids=WRITTEN).logits
    torch.testing.assert_close(seen.logits, logits[0], rtol=1e-3, atol=1e-3)
    other = "flex_attention" if "flex_attention" in known else "eager"
    model.set_attn_implementation(other)
    again = recompute(model, SOURCE, WRITTEN)
    assert model.config._attn_implementation == model.get_decoder().config._attn_implementation == other
    assert torch.equal(torch.stack(again.cross), torch.stack(seen.cross))
    assert [len(layers) for layers in seen[:3]] == [2, 2, 2]
    to_the_source = torch.stack(seen.cross).sum(-1)
    to_the_target = torch.stack(seen.decoder).sum(-1)
    is_merged = family in ("diptych_merged", "t5gemma2")
    sums = [to_the_source + to_the_target] if is_merged else [to_the_source, to_the_target]
    for found in sums:
        torch.testing.assert_close(found, torch.ones_like(found))
    assert not torch.stack(seen.decoder).triu(1).any()  # nobody looks ahead


def test_rollout_of_two_layers_by_hand():
    """Half of each layer is what it was given: (½A + ½I)(½B + ½I)."""
    first, second = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]]), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert rollout([first, second]).tolist() == [[0.5, 0.5], [0.375, 0.625]]
    assert mean_weights([first, second]).tolist() == [[0.5, 0.5], [0.75, 0.25]]


@pytest.mark.parametrize("family", [name for name, entry in FAMILIES.items() if entry.final_norm != ""])
def test_the_lens_after_the_last_layer_is_the_models_answer(family):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(family_configs(400)[family], attn_implementation="eager").eval()
    decoder, last = model.get_decoder(), []
    layers = decoder.block if hasattr(decoder, "block") else decoder.layers
    hook = layers[-1].register_forward_hook(lambda module, given, output: last.append(output))
    seen = recompute(model, SOURCE, WRITTEN)
    hook.remove()
    states = last[0][0] if isinstance(last[0], tuple) else last[0]
    loaded = LoadedModel(model, None, None, family_of(model), 0, 0)
    logits = facts.layer_logits(loaded, states[0])
    torch.testing.assert_close(logits, seen.logits, rtol=1e-4, atol=1e-4)


def test_steps_are_those_that_generate_takes(loaded, learned_t5, eight_prepared_rows):
    row = eight_prepared_rows[2]
    written = learned_t5.generate(torch.tensor([row["input_ids"]]), max_new_tokens=40, do_sample=False)[0].tolist()
    passage = facts.read_and_write(loaded, row["input_ids"], written)
    steps = facts.steps(loaded, passage)
    assert [step["chosen"]["id"] for step in steps] == row["labels"]
    with torch.no_grad():
        logits = learned_t5(
            input_ids=torch.tensor([row["input_ids"]]), decoder_input_ids=torch.tensor([written[:-1]])
        ).logits[0]
    probabilities = logits.softmax(-1)
    for place, step in enumerate(steps):
        spread = probabilities[place]
        assert step["rank"] == 1 == 1 + int((spread > spread[step["chosen"]["id"]]).sum())
        assert step["probability"] == pytest.approx(float(spread.max()), rel=1e-4)
        assert step["loss"] == pytest.approx(-float(spread.max().log()), abs=1e-5)
        assert step["entropy"] == pytest.approx(float(torch.special.entr(spread).sum()), abs=1e-5)
        top = spread.topk(facts.TOP)
        assert [token["id"] for token in step["top"]] == top.indices.tolist()
        assert [token["probability"] for token in step["top"]] == pytest.approx(top.values.tolist(), rel=1e-4)
        assert [token["logit"] for token in step["top"]] == pytest.approx(
            logits[place, top.indices].tolist(), rel=1e-4
        )
    lens = facts.lens(loaded, passage)
    assert len(lens) == 3
    assert [said["text"] for said in lens[-1]] == [step["chosen"]["text"] for step in steps]
    assert [said["rank"] for said in lens[-1]] == [1] * len(steps)


def passage_with(cross: list, tokenizer, source: str, target: str) -> facts.Passage:
    source_ids, target_ids = tokenizer(source).input_ids, tokenizer(target).input_ids
    seen = Attentions([], [], [torch.tensor(layer) for layer in cross], None, [], None)
    return facts.Passage(source_ids, [0, *target_ids], 1, seen)


def test_what_nobody_looked_at_is_found(loaded, tiny_tokenizer):
    """Source `a b c d </s>` as bytes; the output is two letters and </s>. Nobody looks at b and c; the second letter
    looks at </s> alone, and the end of the output does not count."""
    one_layer = [[[0.9, 0.02, 0.01, 0.07, 0.0], [0.0, 0.0, 0.0, 0.05, 0.95], [0.0, 0.9, 0.0, 0.1, 0.0]]]
    passage = passage_with([one_layer], tiny_tokenizer, "abcd", "xy")
    assert len(passage.source_ids) == 5 and len(passage.decoder_ids) == 4
    assert facts.unread(loaded, passage) == {"source": [[1, 3]], "target": [1], "words": 4, "steps": 2}
    # In another layer c is looked at, and the second letter looks at d.
    other_layer = [[[0.0, 0.0, 0.5, 0.3, 0.2], [0.0, 0.0, 0.0, 1.0, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]]]
    passage = passage_with([one_layer, other_layer], tiny_tokenizer, "abcd", "xy")
    assert facts.unread(loaded, passage) == {"source": [[1, 1]], "target": [], "words": 4, "steps": 2}
    # What looks at all words alike looks at none of them.
    even = [[[0.25, 0.25, 0.25, 0.25, 0.0]] * 3]
    assert facts.unread(loaded, passage_with([even], tiny_tokenizer, "abcd", "xy"))["target"] == [0, 1]


def test_neighbours_are_those_of_the_table(loaded, learned_t5, tiny_tokenizer):
    table = learned_t5.get_input_embeddings().weight.detach()
    (found,) = facts.embeddings(loaded, [40])
    cosines = torch.nn.functional.cosine_similarity(table[40], table[: len(tiny_tokenizer)])
    cosines[40] = -2
    assert [near["id"] for near in found["neighbours"]] == cosines.topk(facts.NEIGHBOURS).indices.tolist()
    assert found["norm"] == pytest.approx(float(table[40].norm()), rel=1e-4)


def test_of_a_large_model_some_layers_are_shown_and_said(loaded, eight_prepared_rows):
    row = eight_prepared_rows[0]
    passage = facts.read_and_write(loaded, row["input_ids"], [0, *row["labels"]])
    whole = facts.attention_maps(passage)
    assert whole["cross"]["layers"] == [0, 1]
    cells = sum(layer.numel() for layers in passage.seen[:3] for layer in layers)
    part = facts.attention_maps(passage, most_cells=cells // 2)
    assert part["cross"]["layers"] == [1] and part["cross"]["all_layers"] == 2
    assert part["cross"]["mean"] == whole["cross"]["mean"]
    deep = passage._replace(seen=passage.seen._replace(encoder=[], decoder=[], cross=passage.seen.cross * 12))
    cells = sum(layer.numel() for layer in deep.seen.cross)
    assert facts.attention_maps(deep, most_cells=cells * 5 // 24 + 1)["cross"]["layers"] == [0, 6, 12, 17, 23]


@pytest.fixture
def page_of(t5_checkpoint, tmp_path):
    def write(*arguments: str, model=t5_checkpoint) -> str:
        out = tmp_path / "pages" / "inspect.html"
        assert diptych(["inspect", str(model), *arguments, "--out", str(out)]) == 0
        return out.read_text(encoding="utf-8")

    return write


def test_the_page_in_a_browser(page_of, visit, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"instruction": instruction, "input": text, "output": output}) + "\n"
            for instruction, text, output in EIGHT_ROWS
        )
    )
    html = page_of("--instruction", TO_KOREAN, "--input", "Yes.", "--target", "가.", "--data", str(rows))
    assert "네." in capsys.readouterr().out
    drive = """() => {
        const seen = {}, pixels = (name) => document.querySelector(`[data-map=${name}] canvas`).toDataURL();
        const select = (name, control, value) => {
            const box = document.querySelector(`[data-map=${name}] [data-control=${control}]`);
            box.value = value;
            box.dispatchEvent(new Event("change", {bubbles: true}));
        };
        const state = () => [
            document.querySelector("#step-chips [aria-pressed=true] b").textContent,
            document.querySelector("#distribution .chosen th").textContent,
            document.getElementById("step-number").textContent,
        ];
        const lit = () => [...document.getElementById("lit").children].map((chip) => chip.title).join();
        seen.steps = [state()];
        const before = pixels("cross"), litBefore = lit();
        document.querySelector("[data-go='1']").click();
        seen.steps.push(state());
        seen.moved = pixels("cross") !== before && lit() !== litBefore;
        const mean = pixels("encoder");
        select("encoder", "layer", "1");
        select("encoder", "head", "2");
        const head = pixels("encoder");
        select("encoder", "layer", "rollout");
        const litMean = lit();
        select("cross", "layer", "0");
        select("cross", "head", "1");
        seen.maps = new Set([mean, head, pixels("encoder")]).size;
        seen.litByHead = lit() !== litMean;
        document.querySelector("#step-chips button:last-child").click();
        seen.steps.push(state());
        const canvas = document.querySelector("[data-map=cross] canvas"), box = canvas.getBoundingClientRect();
        canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 9, clientY: box.bottom - 9}));
        seen.reading = document.querySelector("[data-map=cross] .reading").textContent;
        return seen;
    }"""
    seen = visit(html, drive)
    assert not seen.requests and not seen.errors and not seen.ran and seen.too_wide <= 0
    steps = seen.answer["steps"]
    assert [step[0] for step in steps] == [step[1] for step in steps]
    assert [step[2] for step in steps][:2] == ["1", "2"] and steps[-1][0] == "</s>"
    assert seen.answer["moved"] and seen.answer["litByHead"] and seen.answer["maps"] == 3
    assert re.fullmatch(r"</s> → </s>: [\d.< ]+ %", seen.answer["reading"])
    headings = ("Text", "Tokens", "Vectors", "Encoder", "Cross-attention", "Logit lens", "Teacher forcing")
    assert all(heading in seen.text for heading in (*headings, "Over a file"))
    assert "It would first go another way at token 1" in seen.text
    assert "8 rows of rows.jsonl" in seen.text
    assert visit(html, "() => new Promise(end => setTimeout(() => end(scrollY), 500))").answer == 0, "opens at its top"
    narrow = visit(html, viewport={"width": 360, "height": 740}, color_scheme="dark")
    assert narrow.too_wide <= 0 and not narrow.errors
    printed = visit(html, "() => getComputedStyle(document.getElementById('strip')).display", media="print")
    assert printed.answer == "none"


def test_texts_stay_texts(page_of, visit, t5_checkpoint, tmp_path):
    html = page_of("--source", f"Go. {HOSTILE}", "--target", HOSTILE)
    seen = visit(html)
    assert not seen.requests and not seen.ran and not seen.dialogs and not seen.errors
    assert HOSTILE in seen.text


def test_what_a_page_would_not_show_stands_there_by_name(page_of, visit):
    seen = visit(page_of("--source", "Go.\u202eYes."))
    assert "U+202E" in seen.text and "\u202e" not in seen.text


def test_a_merged_hinge_and_an_adapter(tmp_path, tiny_tokenizer, learned_t5, page_of, t5_checkpoint):
    config = family_configs(len(tiny_tokenizer))["diptych_merged"]
    assert isinstance(config, DiptychConfig)
    folder = tmp_path / "merged"
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    assert "one softmax goes over the source" in page_of("--source", "Go.", "--max_new_tokens", "5", model=folder)

    base = load_checkpoint(t5_checkpoint).model
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    plain, other = page_of("--source", "Go."), page_of("--source", "Go.", model=tmp_path / "adapter")
    assert _attention(plain) != _attention(other)


def _attention(html: str) -> dict:
    return json.loads(re.search(r'id="facts">(.*?)</script>', html, re.S)[1])["attention"]


def test_a_family_without_a_known_norm_has_no_lens(tiny_tokenizer):
    model = AutoModelForSeq2SeqLM.from_config(family_configs(len(tiny_tokenizer))["encoder-decoder"])
    loaded = LoadedModel.of(model, tiny_tokenizer)
    assert facts.lens(loaded, facts.read_and_write(loaded, [5, 6, 1], [0, 9, 1])) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "neither was given"),
        (["--source", "Go.", "--instruction", "Add."], "both were given"),
        (["--source", "Go.", "--input", "x"], "drop --input"),
        (["--source", "Go.", "--max_new_tokens", "0"], "it must be 1 or more"),
        (["--source", "Go. " * 600], "no more than 512 can be shown"),
        (["--source", "Go.", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--source", "Go.", "--template", "plain"], "drop --input, --system and --template"),
    ],
)
def test_what_cannot_be_shown_is_said(arguments, message, t5_checkpoint, tmp_path, capsys):
    out = tmp_path / "inspect.html"
    assert diptych(["inspect", str(t5_checkpoint), *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_targets_end_with_the_table_of_positions(checkpoint_of, tiny_tokenizer, tmp_path, capsys):
    """BART's has 128 rows."""
    folder = shutil.copytree(checkpoint_of("bart"), tmp_path / "bart")
    tiny_tokenizer.save_pretrained(folder)
    command = ["inspect", str(folder), "--source", "Go.", "--out", str(tmp_path / "page.html")]
    assert diptych([*command, "--target", "Go. " * 200]) == 2
    assert "the target has 601 tokens, but no more than 128 can be shown. Cut it." in capsys.readouterr().err
    assert diptych([*command, "--max_new_tokens", "500"]) == 0


def test_another_file_is_not_overwritten(t5_checkpoint, tmp_path, capsys):
    out = tmp_path / "notes.html"
    out.write_text("my notes")
    command = ["inspect", str(t5_checkpoint), "--source", "Go.", "--out", str(out)]
    assert diptych(command) == 2 and "is no page of `diptych inspect`" in capsys.readouterr().err
    assert out.read_text() == "my notes"
    out.unlink()
    assert diptych(command) == diptych(command) == 0  # one's own page is replaced


def test_a_checkpoint_without_template_is_asked_for_one(bare_checkpoint, tmp_path, capsys):
    command = ["inspect", str(bare_checkpoint), "--out", str(tmp_path / "page.html")]
    assert diptych([*command, "--instruction", "Go."]) == 2
    assert "carries no template" in capsys.readouterr().err
    assert diptych([*command, "--source", "Go."]) == 0


def test_rendering_needs_every_fact():
    with pytest.raises(KeyError):
        render_page({})
