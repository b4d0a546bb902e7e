"""What leaves the machine is the measured model, its card, and nothing else; and others can load it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, constants

from diptych.data_prep.command_line.arguments import parse
from diptych.data_prep.pipeline.prepare_settings import parse_settings as parse_prepare
from diptych.finetune.commands import cli
from diptych.finetune.exporting import publish
from diptych.finetune.exporting.hub_push import push
from diptych.finetune.exporting.model_card import prepare_settings, validation_scores
from diptych.finetune.run_files import atomic_folders
from diptych.finetune.training.recipe import TrainRecipe

REPO = "me/translate"
SECRET = "s3cret-that-nobody-may-see"
A_ROW = "He is my friend, and a good one."
PLANTED = ["final/.env", "final/optimizer.pt", "final/training_args.bin", "final/rng.json", "final/rows.jsonl"]
PLANTED += ["final/pytorch_model.bin", "final/run.py", ".env", "token", "final/checkpoint/model.safetensors"]

TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}


@pytest.fixture
def hub(monkeypatch):
    with hub_server.HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # hub_server.py knows plain uploads alone
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield hub


@pytest.fixture(scope="module")
def trained(tmp_path_factory, packed_folder, checkpoint_of, tiny_tokenizer):
    """{"diptych": RUN, "lora": RUN}: two steps each; the first one evaluated too, with intervals."""
    place = tmp_path_factory.mktemp("a-place-of-my-own")
    data = packed_folder(0, validation_fraction=0.3)
    tiny_tokenizer.save_pretrained(checkpoint_of("t5"))
    runs = {"diptych": ["--model", "diptych-8m", "--model_overrides", json.dumps(TINY | {"intermediate_size": 64})]}
    runs["lora"] = ["--model", str(checkpoint_of("t5")), "--method", "lora"]
    for name, settings in runs.items():
        settings += ["--data", str(data), "--max_steps", "2", "--batch_size", "1", "--out", str(place / name)]
        assert cli.run("train", settings) == 0
    report = ["--split", "validation", "--metrics", "chrf", "--out", str(place / "diptych" / "validation.json")]
    assert cli.run("evaluate", [str(place / "diptych" / "final"), "--data", str(data), *report]) == 0
    return {name: place / name for name in runs}


@pytest.fixture
def run(trained, tmp_path):
    """The Diptych's run, a copy to do anything with, full of what nobody should get."""
    run = shutil.copytree(trained["diptych"], tmp_path / "a-place-of-my-own" / "translate")
    for name in PLANTED:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(f"HF_TOKEN={SECRET} {run} {A_ROW}")
    return run


@pytest.fixture
def lora(trained, tmp_path):
    return shutil.copytree(trained["lora"], tmp_path / "lora")


def in_a_process(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HOME": str(cwd / "home"), "HF_HUB_DISABLE_XET": "1"} | environment
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def remote(hub, repo: str = REPO) -> dict[str, bytes]:
    return {name: content for name, content in hub.repos[repo].files.items() if name != ".gitattributes"}


def rewritten(folder: Path, name: str, change) -> None:
    """As if training had written it so."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    (folder / "manifest.json").unlink()
    atomic_folders.write_manifest(folder)


WITHOUT_DIPTYCH = "import sys; sys.modules['diptych'] = None\n"


@pytest.mark.slow
def test_a_published_run_is_the_allow_list_byte_by_byte_and_strangers_can_load_it(hub, run, tmp_path):
    """All in processes of their own: the command, the command again, and the code that the card shows."""
    command = ["-m", "diptych.finetune.commands.cli", "publish", str(run), "--to", REPO]
    on_the_hub = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub_server.TOKEN}
    first = in_a_process(*command, cwd=tmp_path, **on_the_hub)
    assert first.returncode == 0, first.stderr
    assert "published, private, and read back" in first.stdout and hub_server.TOKEN not in first.stdout + first.stderr
    for name in ("optimizer.pt", ".env", "run.py", "pytorch_model.bin", "checkpoint/"):
        assert name in re.search("not published: (.*)", first.stdout)[1]

    config = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    code = ["configuration_diptych.py", "modeling_diptych.py"]
    assert sorted(remote(hub)) == sorted([*config, *code, "model.safetensors", "README.md"])
    for name, content in remote(hub).items():
        assert name == "README.md" or content == (run / "final" / name).read_bytes()
    assert hub.repos[REPO].private and len(hub.repos[REPO].commits) == 2
    received = hub.received().replace(f"Bearer {hub_server.TOKEN}".encode(), b"")
    secrets = [SECRET, A_ROW, str(tmp_path), "a-place-of-my-own", f"{Path.home()}/", hub_server.TOKEN, os.getcwd()]
    assert b"diptych_template" in received and A_ROW.encode() in (run / "final" / ".env").read_bytes()
    for secret in secrets:
        found = received.find(secret.encode())
        assert found < 0, (secret, received[max(0, found - 80) : found + 80])

    again = in_a_process(*command, cwd=tmp_path, **on_the_hub)
    assert again.returncode == 0 and "nothing to do: it is there already" in again.stdout, again.stderr
    assert len(hub.repos[REPO].commits) == 2

    without, with_it = re.findall(r"```python\n(.*?)```", remote(hub)["README.md"].decode(), flags=re.DOTALL)
    stranger = in_a_process("-c", WITHOUT_DIPTYCH + without, cwd=tmp_path, **on_the_hub)
    assert stranger.returncode == 0, stranger.stderr
    friend = in_a_process("-c", with_it + "print(type(model).__module__)", cwd=tmp_path, **on_the_hub)
    assert friend.returncode == 0 and "diptych.modeling.modeling_diptych" in friend.stdout, friend.stderr


@pytest.mark.slow
def test_an_adapter_is_published_with_a_base_that_everybody_has(hub, lora, checkpoint_of, tmp_path, capfd):
    base = checkpoint_of("t5")
    assert cli.run("publish", [str(lora), "--to", REPO]) == 2
    said = capfd.readouterr().err
    assert str(base) in said and "--base owner/name" in said and not hub.requests

    api = HfApi(endpoint=hub.url, token=hub_server.TOKEN)
    files = {file.name: file for file in base.iterdir()}
    push(api, "me/other", files | {"model.safetensors": b"other weights"})
    commits = len(hub.repos)
    assert cli.run("publish", [str(lora), "--to", REPO, "--base", "me/other"]) == 2
    assert "has not the model.safetensors" in capfd.readouterr().err and len(hub.repos) == commits

    push(api, "me/base", files)
    assert cli.run("publish", [str(lora), "--to", REPO, "--base", "me/base"]) == 0
    assert json.loads(remote(hub)["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    card = ModelCard(remote(hub)["README.md"].decode())
    assert card.data.base_model == "me/base" and card.data.library_name == "peft"
    assert str(base).encode() not in hub.received()

    without, with_it = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert "AutoPeftModelForSeq2SeqLM" in without
    for code in (WITHOUT_DIPTYCH + without, with_it):
        loaded = in_a_process("-c", code, cwd=tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=hub_server.TOKEN)
        assert loaded.returncode == 0, loaded.stderr


def test_a_base_that_is_not_asked_for_is_refused(hub, run, lora, capfd):
    rewritten(
        lora / "final", "adapter_config.json", lambda it: it.update(base_model_name_or_path="google-t5/t5-small")
    )
    for folder, said in {run: "is a whole model", lora: "names its base, google-t5/t5-small"}.items():
        assert cli.run("publish", [str(folder), "--to", REPO, "--base", "me/base"]) == 2
        assert said in capfd.readouterr().err and not hub.requests


def test_a_broken_json_among_the_reports_is_named(hub, run, capfd):
    (run / "test.json").write_text('{"figures": ')
    assert cli.run("publish", [str(run), "--to", REPO]) == 2
    assert "test.json may be a report, and is no JSON" in capfd.readouterr().err and not hub.requests


def test_the_card_has_the_scores_of_each_validation_set_and_names_sets_without_their_paths(tmp_path):
    places = {"validation/news": 0, "validation/law": 1}
    lines = [{"step": step, "split": name, "loss": step + places[name]} for step in (5, 10) for name in places]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = validation_scores(tmp_path, 10, {"data": "my/data", "metrics_limit": 100})
    assert [(score.split, score.value) for score in scores] == [("validation/news", 10), ("validation/law", 11)]
    settings = {
        "data": ["/my/a.jsonl"],
        "validation": ["news=/my/b.jsonl", "law=/my/c.en+/my/c.ko"],
        "test": ["x/y/z.json", "hf:a/b/c"],
    }
    assert prepare_settings({"settings": settings}) == {
        "data": ["a.jsonl"], "validation": ["news=b.jsonl", "law=c.en+c.ko"], "test": ["x/y/z.json", "hf:a/b/c"],
    }  # fmt: skip


def test_the_card_tells_of_the_run_and_its_yaml_is_the_run_again(hub, run, trained, tmp_path):
    shutil.copy(run / "validation.json", run / "again.json")  # says the same, and is in the card once
    assert cli.run("publish", [str(run), "--to", REPO, "--license", "apache-2.0", "--language", "en, ko"]) == 0
    text = remote(hub)["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.language == ["en", "ko"]
    assert card.data.library_name == "transformers" and card.data.base_model is None

    report = json.loads((run / "validation.json").read_text())
    results = {(it.dataset_split, it.metric_type, bool(it.metric_args)): it for it in card.data.eval_results}
    assert len(results) == len(card.data.eval_results)
    evaluated = results["validation", "chrf", True]
    assert evaluated.metric_value == report["figures"]["chrf"]
    assert evaluated.metric_args == {"interval": report["intervals"]["chrf"]}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min((it for it in lines if it["split"] == "validation"), key=lambda it: it["loss"])
    assert results["validation", "loss", False].metric_value == best["loss"]
    assert f"after step {best['step']}, the best by loss" in text

    recipe = yaml.safe_load((run / "config.yaml").read_text())
    manifest = json.loads((Path(recipe["data"]) / "manifest.json").read_text())
    source = manifest["inputs"][0]
    assert (
        f"| eight.jsonl | {source['kept']} | {source['read']} |" in text
        and f"`{source['digest']}` | unknown |" in text
    )

    prepare_yaml, train_yaml = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "train.yaml").write_text(train_yaml)
    again = parse(TrainRecipe, "diptych train", ["--config", str(tmp_path / "train.yaml")])
    for name, value in recipe.items():
        was_path = name in ("data", "out")
        found = getattr(again, name)
        assert (list(found) if isinstance(found, tuple) else found) == (Path(value).name if was_path else value), name
    (tmp_path / "prepare.yaml").write_text(prepare_yaml)
    prepared = parse_prepare(["--config", str(tmp_path / "prepare.yaml")])
    assert (
        prepared.data == ["eight.jsonl"] and prepared.packed_source_tokens == 32 and prepared.template == "translate"
    )


def test_data_are_found_from_the_folders_that_the_run_lies_in(hub, run, tmp_path, monkeypatch):
    """A path that is relative to where training ran says nothing where publishing runs."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    shutil.copytree(config["data"], tmp_path / "prepared" / "eight")
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"data": "prepared/eight"}))
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    assert cli.run("publish", [str(run), "--to", REPO]) == 0
    text = remote(hub)["README.md"].decode()
    assert "prepare.yaml" in text and "nothing else is known" not in text


def test_data_that_were_prepared_anew_are_not_described(hub, run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    data = shutil.copytree(config["data"], tmp_path / "elsewhere")
    (data / "manifest.json").write_text((data / "manifest.json").read_text().replace("eight", "nine"))
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"data": str(data)}))
    assert cli.run("publish", [str(run), "--to", REPO]) == 0
    text = remote(hub)["README.md"].decode()
    assert "nothing else is known" in text and "nine" not in text and "prepare.yaml" not in text


def test_a_report_on_another_model_does_not_come_into_the_card(hub, run, capfd):
    rewritten(run / "final", "generation_config.json", lambda config: config.update(max_length=21))
    assert cli.run("publish", [str(run), "--to", REPO]) == 2
    assert "validation.json is a report on" in capfd.readouterr().err and not hub.requests


def damage_weights(final: Path) -> None:
    content = bytearray((final / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (final / "model.safetensors").write_bytes(content)


def link_weights(final: Path) -> None:
    (final / "model.safetensors").rename(final.parent / "weights")
    (final / "model.safetensors").symlink_to(final.parent / "weights")


DAMAGE = {
    "a flipped bit": (damage_weights, "model.safetensors is not what was written"),
    "a file added": (lambda final: (final / "vocab.txt").write_text("a"), "vocab.txt was not written by training"),
    "a file gone": (lambda final: (final / "config.json").unlink(), "config.json is missing"),
    "a link": (link_weights, "is a link"),
    "no manifest": (lambda final: (final / "manifest.json").unlink(), "has no manifest.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_training_did_not_write_is_not_published(hub, run, capfd, case):
    damage, said = DAMAGE[case]
    damage(run / "final")
    assert cli.run("publish", [str(run), "--to", REPO]) == 3
    assert said in capfd.readouterr().err and not hub.requests


def test_a_local_path_in_a_config_is_published_as_its_last_part(hub, run, capfd):
    def name_a_place(config):
        config["diptych_template"]["name"] = str(run / "my.jinja")

    rewritten(run / "final", "tokenizer_config.json", name_a_place)
    (run / "validation.json").unlink()
    assert cli.run("publish", [str(run), "--to", REPO]) == 0
    assert "tokenizer_config.json: local paths are reduced" in capfd.readouterr().out
    published = json.loads(remote(hub)["tokenizer_config.json"])
    assert published["diptych_template"]["name"] == "my.jinja"
    assert str(run).encode() not in hub.received()


@pytest.mark.parametrize("private", ["as in {run}/my-file", "with hf_ABCDEFGHIJKLMNOPQRSTUVWX", "with {token}"])
def test_a_template_that_tells_of_this_machine_is_refused(hub, run, capfd, private):
    text = private.format(run=run, token=hub_server.TOKEN) + " {{ instruction }}"
    rewritten(run / "final", "tokenizer_config.json", lambda config: config["diptych_template"].update(source=text))
    (run / "validation.json").unlink()
    assert cli.run("publish", [str(run), "--to", REPO]) == 2
    said = capfd.readouterr().err
    assert said.startswith("diptych publish: tokenizer_config.json") and not hub.requests
    assert hub_server.TOKEN not in said and "hf_ABC" not in said


def test_a_dry_run_shows_files_and_card_and_connects_to_nothing(hub, run, capfd):
    assert cli.run("publish", [str(run), "--to", REPO, "--dry_run", "true"]) == 0
    said = capfd.readouterr().out
    size = (run / "final" / "model.safetensors").stat().st_size
    assert f"{size:,} bytes  model.safetensors" in said and "model-index:" in said and "not published: " in said
    assert not hub.requests


def test_without_a_token_or_offline_no_connection_is_made(hub, run, monkeypatch, tmp_path, capfd):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert cli.run("publish", [str(run), "--to", REPO]) == 7 and "hf auth login" in capfd.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.run("publish", [str(run), "--to", REPO]) == 7 and "HF_HUB_OFFLINE is set" in capfd.readouterr().err
    assert not hub.requests


def test_what_is_no_finished_run_is_told_apart(run, tmp_path, capfd):
    cases = {tmp_path: "no config.yaml", run / "final": f"publish {run}", run / "checkpoints": "no config.yaml"}
    for folder, said in cases.items():
        assert cli.run("publish", [str(folder), "--to", REPO]) == 2
        assert said in capfd.readouterr().err
    shutil.rmtree(run / "final")
    assert cli.run("publish", [str(run), "--to", REPO]) == 2
    assert "--resume true" in capfd.readouterr().err


def test_where_to_is_owner_and_name(run, capfd):
    for to in ("", "translate", "me/translate/final", "../me/x", "me/", "https://hub/me/x"):
        assert cli.run("publish", [str(run), "--to", to]) == 2 and "--to" in capfd.readouterr().err


def test_no_pattern_of_the_allow_list_lets_in_what_it_should_not():
    inside = ["model-00001-of-00002.safetensors", "source.spm", "sentencepiece.bpe.model", "adapter_config.json"]
    outside = ["optimizer.safetensors", "optimizer.model", "model.safetensors.bak", "data.json", "modeling_other.py"]
    outside += ["x/config.json", "model-a/b-of-cdefg.safetensors", "Config.json", "state.json", ".env"]
    assert [name for name in inside if not publish.is_allowed(name)] == []
    assert [name for name in outside if publish.is_allowed(name)] == []
