"""Every family of encoder-decoders in every command: what works gives what transformers gives, and what does not is
refused by name. docs/families.md has what is found here, and is compared with it.

    DIPTYCH_FAMILIES=write pytest tests/finetune/test_families.py    writes the table anew
    DIPTYCH_FAMILIES=all pytest tests/finetune/test_families.py      the same, with every export and check: minutes

Unless all is asked for, families are only asked whether they can be exported to ONNX (test_export_onnx.py exports
some), and doctor leaves out its checks on two ranks and with a Trainer.
"""

import gc
import json
import os
import queue
import re
from pathlib import Path

import datasets
import pytest
import torch
from conftest import EIGHT_ROWS, TO_KOREAN
from small_families import PACKED, family_configs
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.packing.unpacked_families import NOT_PACKED, reason_not_packed
from diptych.data_prep.text_to_ids.templates import TEMPLATES
from diptych.finetune.commands.cli import main
from diptych.finetune.exporting import export_onnx
from diptych.finetune.inspecting.doctor_checks import CHECKS
from diptych.finetune.model.families import FAMILIES, decoder_start_token, table_positions
from diptych.finetune.model.global_attention import attend_globally
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.serving.request_batches import Decoding, Engine, Job, Piece

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
WANTED = os.environ.get("DIPTYCH_FAMILIES", "")
SLOW_CHECKS = ("2 ranks = 1 rank", "HF Trainer: 8 = 1", "HF Trainer: 2 ranks = 1")
COLUMNS = ("prepare", "train", "with LoRA", "merge", "evaluate", "compare", "generate", "serve", "inspect", "doctor")
COLUMNS += ("export to ONNX", "to CTranslate2", "publish", "pair")
NEW_TOKENS = 6
ASKED = ["--instruction", TO_KOREAN, "--input", "I am a student.", "--max_new_tokens", str(NEW_TOKENS)]
PREPARED = [
    "--template",
    "translate",
    "--deduplicate",
    "false",
    "--validation_fraction",
    "0",
    "--test_fraction",
    "0.3",
]
TRAINED = ["--max_steps", "1", "--batch_size", "2", "--precision", "fp32"]


@pytest.fixture(scope="module", autouse=True)
def _collect_little():
    """Training collects garbage; what all earlier tests made is not looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def ran(capsys, monkeypatch, tmp_path):
    """`ran("train", …)` in this process -> exit code, what it printed, what it said besides. It may raise nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diptych.finetune.training.saving.plot_loss", lambda *_: None)  # a third of such a short run
    for check in () if WANTED == "all" else SLOW_CHECKS:
        monkeypatch.delitem(CHECKS, check)
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps(dict(zip(("instruction", "input", "output"), row, strict=True))) for row in EIGHT_ROWS)
    )

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def done(found: tuple[int, str, str], mark: str = "✓") -> str:
    assert found[0] == 0, found
    return mark


def done_or_refused(found: tuple[int, str, str], model_type: str) -> str:
    """A refusal is one message of the command, and names the family."""
    code, _, said = found
    if code == 2:
        assert re.match(r"diptych \w+: ", said.splitlines()[-1]) and model_type in said, said
        return "–"
    return done(found)


@pytest.mark.slow
@pytest.mark.parametrize("family", family_configs(400))
def test_every_family_in_every_command(family, new_model, tiny_tokenizer, ran):
    model = new_model(family).eval()
    kind = model.config.model_type
    model.save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    row = {"prepare": prepared(kind, ran)}
    rows = {"full": trained(family, ran, "full"), "lora": trained(family, ran, "lora", "--method", "lora")}
    row |= {"train": rows["full"], "with LoRA": rows["lora"]}
    row |= {"merge": done(ran("merge", "lora/final", "--out", "merged")), "evaluate": evaluated(kind, ran)}
    row |= {"compare": done(ran("compare", "full", "lora", "--trials", "10"))}
    row |= {"generate": generated(model, tiny_tokenizer, ran), "serve": served(model, tiny_tokenizer, ran)}
    row |= {"inspect": inspected(kind, ran), "doctor": examined(ran)}
    row |= {"export to ONNX": exported_to_onnx(model, ran)}
    exported = ran("export", "model", "--max_new_tokens", "8", "--to", "ctranslate2", "--out", "ctranslate2")
    row |= {"to CTranslate2": done_or_refused(exported, kind if "merged" not in family else "merged")}
    row |= {"publish": done(ran("publish", "full", "--to", "me/it", "--dry_run"))}
    row |= {"pair": done_or_refused(ran("pair", "model", "--out", "paired"), kind)}
    check_row(family, row)


def prepared(kind: str, ran) -> str:
    """Packed, unless the family is not; then it says so."""
    code, said, _ = ran("prepare", "--data", "rows.jsonl", "--tokenizer", "model", "--out", "data", *PREPARED)
    (packing,) = (line for line in said.splitlines() if line.startswith("Packing "))
    assert code == 0 and packing.endswith(f"({reason_not_packed(kind)})") == (kind in NOT_PACKED), said
    return "✓"


def trained(family: str, ran, out: str, *more: str) -> str:
    """On packed rows; then on padded ones, too. A family that is not packed says why."""
    train = ["train", "--model", "model", "--data", "data", *TRAINED, *more]
    code, said, _ = ran(*train, "--out", out)
    is_packed = "packed rows" in said.splitlines()[0]
    assert code == 0 and is_packed != ("trains on padded rows: " in said), said
    assert is_packed == (family in PACKED or family == "flan_t5") and "held in full" not in said or family == "fsmt"
    if is_packed:
        done(ran(*train, "--out", f"{out}-padded", "--packed", "false"))
    return "packed" if is_packed else "padded"


def evaluated(kind: str, ran) -> str:
    """The loss is that of the rows, each alone in transformers' own forward pass. (What a ProphetNet computes depends
    on how long the longest target of a batch is: in 5.24, tokens and positions do not fit in
    get_predict_relative_pos_embeddings. Doctor says so.)"""
    together = "1" if kind == "prophetnet" else "16"
    evaluate = ["--data", "data", "--max_new_tokens", str(NEW_TOKENS), "--metrics", "chrf", "--batch_size", together]
    for run in ("full", "lora"):
        done(ran("evaluate", f"{run}/final", *evaluate, "--out", f"{run}/test.json"))
    model = AutoModelForSeq2SeqLM.from_pretrained("full/final").eval()
    nats = tokens = 0
    for row in datasets.load_from_disk("data")["test"]:
        labels = torch.tensor(row["labels"])
        given = torch.tensor([[decoder_start_token(model), *row["labels"][:-1]]])
        with torch.no_grad():
            ids = torch.tensor([row["input_ids"]])
            own = {"use_cache": False} if kind == "fsmt" else first_token_globally(kind, ids)
            logits = model(input_ids=ids, decoder_input_ids=given, **own).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        tokens += len(labels)
    figures = json.loads(Path("full/test.json").read_text())["figures"]
    assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-4)
    return "✓"


def first_token_globally(kind: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a LED, which transformers alone gives no global attention."""
    return {"global_attention_mask": (torch.arange(ids.shape[1]) == 0)[None].long()} if kind == "led" else {}


def text_of(model, tokenizer, **settings) -> str:
    """What transformers' own generate writes to what ASKED asks."""
    source = tokenizer(TEMPLATES["translate"].render_source(ASKED[1], ASKED[3]), return_tensors="pt")
    ids = {"input_ids": source.input_ids, "attention_mask": source.attention_mask}
    ids |= first_token_globally(model.config.model_type, source.input_ids)
    with torch.no_grad():
        written = model.generate(**ids, do_sample=False, max_new_tokens=NEW_TOKENS, **settings)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def generated(model, tokenizer, ran) -> str:
    """Streamed, by beams, and of a file."""
    greedy = text_of(model, tokenizer)
    assert ran("generate", "model", *ASKED)[:2] == (0, greedy + "\n")
    assert ran("generate", "model", *ASKED, "--num_beams", "2")[:2] == (
        0,
        text_of(model, tokenizer, num_beams=2) + "\n",
    )
    many = ["--in_file", "rows.jsonl", "--out_file", "answers.jsonl", "--max_new_tokens", str(NEW_TOKENS)]
    done(ran("generate", "model", *many))
    answers = Path("answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == len(EIGHT_ROWS)
    return "✓"


def served(model, tokenizer, ran) -> str:
    """By the engine behind the HTTP interface: the pieces are the text."""
    events = queue.SimpleQueue()
    attend_globally(model)  # as it does when it is loaded
    settings = {"batch_size": 2, "queue_size": 4, "batch_wait_ms": 0}
    engine = Engine(LoadedModel.of(model, tokenizer, TEMPLATES["translate"]), **settings)
    source = tokenizer(TEMPLATES["translate"].render_source(ASKED[1], ASKED[3])).input_ids
    try:
        engine.submit([Job(source, Decoding(NEW_TOKENS), events.put, wants_pieces=True)])
        found = [events.get(timeout=60)]
        while isinstance(found[-1], Piece):
            found.append(events.get(timeout=60))
    finally:
        engine.close()
    *pieces, ended = found
    assert "".join(piece.text for piece in pieces) == ended.answers[0].text == text_of(model, tokenizer)
    return "✓"


def inspected(kind: str, ran) -> str:
    found = ran("inspect", "model", *ASKED, "--target", "나는 학생이다.", "--out", "inspect.html")
    outcome = done_or_refused(found, kind)
    if outcome == "✓" and "encoder is local" in Path("inspect.html").read_text(encoding="utf-8"):
        return "✓, without the encoder's attention"
    return outcome


def examined(ran) -> str:
    """Which of doctor's checks are red, but for the slow ones: transformers' Trainer is wrong for most, and two ranks
    differ from one where micro-batches differ from one batch."""
    code, said, _ = ran("doctor", "model", "--json")
    checks = json.loads(said)["checks"]
    red = [check["name"] for check in checks if check["status"] == "red"]
    assert code == bool(red) and not [check for check in checks if "failed: " in check["message"]], checks
    assert "2 ranks = 1 rank" not in red or "8 micro-batches = 1 batch" in red
    red = [name for name in red if name not in SLOW_CHECKS]
    return f"red: {', '.join(red)}" if red else "✓"


def exported_to_onnx(model, ran) -> str:
    if WANTED == "all":
        export = ["export", "model", "--max_new_tokens", "8", "--to", "onnx", "--out", "onnx"]
        return done_or_refused(ran(*export), model.config.model_type)
    try:
        export_onnx.check(model)
    except UserError as refusal:
        assert model.config.model_type in str(refusal)
        return "–"
    return "✓"


def check_row(family: str, row: dict[str, str]) -> None:
    """The table's line for the family is this one; or becomes it."""
    assert tuple(row) == COLUMNS
    line = f"| `{family}` | {' | '.join(row.values())} |"
    table, heading, others = PAGE.read_text(encoding="utf-8").partition("## Families that are not packed")
    listed = re.compile(rf"^\| `{family}` \|.*$", re.MULTILINE)
    if WANTED:
        table = listed.sub(line, table)
        PAGE.write_text(table + heading + others, encoding="utf-8")
    assert listed.findall(table) == [line]


@pytest.mark.parametrize("family", family_configs(400))
def test_tables_of_positions_are_as_long_as_is_said(family, new_model):
    """So that a row that is too long is refused before training, and no other is."""
    model = new_model(family).eval()
    source, target = table_positions(model)

    @torch.no_grad()
    def reads(source_tokens: int, target_tokens: int) -> None:
        ids = torch.full((1, max(source_tokens, target_tokens)), 5)
        model(input_ids=ids[:, :source_tokens], decoder_input_ids=ids[:, :target_tokens])

    reads(source or 520, target or 520)
    if source and family != "prophetnet":  # which gives all further tokens its last position
        with pytest.raises((IndexError, RuntimeError)):
            reads(source + 1, 4)
    if target:
        with pytest.raises((IndexError, RuntimeError)):
            reads(4, target + 1)


def test_the_table_has_every_family_once_and_every_command():
    text = PAGE.read_text(encoding="utf-8")
    first = text.partition("## Families that are not packed")[0]
    assert re.findall(r"^\| `(\S+)` \|", first, re.MULTILINE) == list(family_configs(400))
    assert f"| family | {' | '.join(COLUMNS)} |" in text
    assert NOT_PACKED.keys() == FAMILIES.keys() - set(PACKED)
    for family, reason in NOT_PACKED.items():
        assert f"| `{family}` | {reason} |" in text
