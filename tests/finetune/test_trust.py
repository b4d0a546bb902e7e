"""A stranger's files run no code, reach no network, take no memory that they do not fill, and write nowhere.

`aftermath` is a day of every command over a checkpoint, a dataset and an adapter that are full of canaries (code and
pickles that leave a mark where they run), in processes that note each connection and each file opened to write.
"""

import importlib.util
import itertools
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow
import pytest
import torch
import xxhash
import yaml
from nursery import free_port
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, T5ForConditionalGeneration

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands import cli
from diptych.finetune.model.loading import load_checkpoint, load_model, load_tokenizer
from diptych.finetune.model.untrusted_files import open_prepared

PICKLES = [
    *("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt"),
    *("rng_state.pth", "rng_state_0.pth", "scaler.pt", "random_states_0.pkl", "consolidated.00.pth", ".metadata"),
    *("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.pkl", "added_tokens.pkl"),
    *("dataset.pkl", "cache.pkl", "indices.pkl", "state.pkl", "tf_model.h5", "flax_model.msgpack"),
]
# In every process of the day, those that a command starts included.
WATCH = """
import os, socket, sys

def _note(kind, what):
    with open({log!r}, "a") as log:
        log.write(f"{{kind}}\\t{{what}}\\n")

def _watch(event, arguments):
    if getattr(_watch, "busy", False):
        return
    _watch.busy = True
    try:
        if event in ("socket.connect", "socket.sendto") and arguments[0].family != socket.AF_UNIX:
            if arguments[1][0] not in ("127.0.0.1", "::1", "0.0.0.0"):
                _note("connection", arguments[1])
        elif event == "socket.getaddrinfo" and arguments[0] not in (None, "", "localhost", "127.0.0.1", "::1"):
            _note("connection", arguments[0])
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                _note("written", os.path.abspath(os.fsdecode(arguments[0])))
        elif event in ("os.mkdir", "os.rename"):
            _note("written", os.path.abspath(os.fsdecode(arguments[1 if event == "os.rename" else 0])))
    finally:
        _watch.busy = False

sys.addaudithook(_watch)
"""
DAY = """
import json, os, signal, sys, threading, time, urllib.request
from diptych.finetune.commands import cli

def visit(port):
    # What serves is asked once, and then told to end.
    body = json.dumps({"prompt": "Add.", "input": "1 + 1"}).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            opener.open(f"http://127.0.0.1:{port}/v1/completions", body)
        except ConnectionError:
            continue
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionError):
                time.sleep(0.1)
                continue
            print("served:", error)
        os.kill(os.getpid(), signal.SIGTERM)
        return

days = os.fdopen(os.dup(0))
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for day in days:
    for arguments in json.loads(day):
        print("$", *arguments, flush=True)
        if "--port" in arguments:
            threading.Thread(target=visit, args=[arguments[-1]]).start()
        try:
            code = cli.main(arguments)
        except SystemExit as error:
            code = error.code
        print(f"\\n= {code}", flush=True)
    print("= night", flush=True)
"""


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def save_canary(file: Path, mark: Path) -> None:
    """In torch's own format, by its stream, which takes any name."""
    with file.open("wb") as stream:
        torch.save(Canary(mark), stream)


def plant_pickles(folder: Path, marks: Path) -> None:
    for name in PICKLES:
        if not (folder / name).exists():
            save_canary(folder / name, marks / f"{folder.name}-{name}")
    (folder / "raw.pkl").write_bytes(pickle.dumps(Canary(marks / f"{folder.name}-raw")))


def plant_code(folder: Path, marks: Path, name: str = "code.py") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    lines = f"open({str(marks / (folder.name + '-' + name.replace('/', '-')))!r}, 'w')\n"
    (folder / name).write_text(lines + "class Any: ...\ndef generate(*a, **k): ...\n")


def edit(file: Path, **changes) -> None:
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(values | changes), encoding="utf-8")


HOSTILE = {"trust_remote_code": True, "custom_generate": "custom_generate", "extra": {"trust_remote_code": True}}
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM")
AUTO_MAP = {name: "code.Any" for name in AUTO_CLASSES}
CHAT_TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for a in range(10**9) %}{% endfor %}"


def make_hostile(checkpoint: Path, marks: Path) -> None:
    edit(checkpoint / "config.json", **HOSTILE, auto_map=AUTO_MAP, nested={"auto_map": AUTO_MAP, **HOSTILE})
    edit(checkpoint / "generation_config.json", **HOSTILE, auto_map=AUTO_MAP)
    tokens = {"trust_remote_code": True, "auto_map": {"AutoTokenizer": ["code.Any", "code.Any"]}}
    edit(checkpoint / "tokenizer_config.json", **tokens, chat_template=CHAT_TEMPLATE)
    plant_pickles(checkpoint, marks)
    plant_code(checkpoint, marks)
    plant_code(checkpoint, marks, "custom_generate/generate.py")


def make_llm(folder: Path, checkpoint: Path) -> None:
    """A decoder-only model of the same tokens."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), **shape, num_key_value_heads=1, head_dim=16, eos_token_id=1)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): xxhash.xxh3_128_hexdigest(file.read_bytes()) for file in files}


class Aftermath(NamedTuple):
    place: Path
    codes: list[tuple[str, str]]
    output: str
    marks: list[str]
    noted: list[tuple[str, str]]
    asked: list[str]
    before: dict[str, str]


class Listener(BaseHTTPRequestHandler):
    def handle(self):
        self.server.asked.append(str(self.rfile.readline()))


@pytest.fixture(scope="module")
def new_listener():
    """Makes servers that note what they are asked, in `asked`."""
    servers = []

    def make() -> ThreadingHTTPServer:
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Listener))
        servers[-1].asked = []
        threading.Thread(target=servers[-1].serve_forever).start()
        return servers[-1]

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def listener(new_listener):
    return new_listener()


@pytest.fixture(scope="module")
def aftermath(tmp_path_factory, t5_checkpoint, new_listener):
    place = tmp_path_factory.mktemp("a-day")
    theirs, marks = place / "theirs", place / "marks"
    for name in ("theirs", "marks", "cwd", "home", "cache", "tmp", "watch"):
        (place / name).mkdir()
    (place / "watch" / "sitecustomize.py").write_text(WATCH.format(log=str(place / "log")))
    shutil.copytree(t5_checkpoint, theirs / "checkpoint")
    make_hostile(theirs / "checkpoint", marks)
    make_llm(theirs / "llm", t5_checkpoint)
    make_hostile(theirs / "llm", marks)
    edit(theirs / "llm" / "tokenizer_config.json", chat_template=None)  # pair would refuse what the other one asks for
    plant_code(theirs, marks, "rows.py")
    plant_code(place / "cwd", marks, "canary_library.py")
    rows = [{"instruction": "Add.", "input": f"{n} + 1", "output": str(n + 1)} for n in range(40)]
    (theirs / "data").mkdir()
    (theirs / "data" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plant_code(theirs / "data", marks, "data.py")
    plant_code(theirs / "data", marks, "rows.py")
    (place / "prompts.jsonl").write_text('{"instruction": "Add.", "input": "1 + 1"}\n')
    before = contents(theirs)

    server = new_listener()
    hub = f"http://127.0.0.1:{server.server_port}"
    folders = {"HOME": "home", "XDG_CACHE_HOME": "cache", "HF_HOME": "cache/huggingface", "TMPDIR": "tmp"}
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "XDG_", "PYTEST", "MPL")) and not name.lower().endswith("_proxy")
    }
    environment |= {name: str(place / folder) for name, folder in folders.items()}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub, "HTTP_PROXY": hub, "HTTPS_PROXY": hub}
    environment |= {"NO_PROXY": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_CACHE_DIR": str(place / "cache" / "inductor")}
    environment["PYTHONPATH"] = os.pathsep.join([str(place / "watch"), str(place / "cwd")])
    codes, output = [], ""
    spender = subprocess.Popen(
        [sys.executable, "-P", "-c", DAY], cwd=place / "cwd", env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    patience = threading.Timer(600, spender.kill)
    patience.start()

    def spend(*day: list[str]) -> None:
        nonlocal output
        spender.stdin.write(json.dumps(day) + "\n")
        spender.stdin.flush()
        said = "".join(itertools.takewhile(lambda line: line != "= night\n", spender.stdout))
        output += said
        found = re.findall(r"^= (\w+)$", said, flags=re.MULTILINE)
        assert len(found) == len(day), said
        codes.extend((line[0], code) for line, code in zip(day, found, strict=True))

    model, out = str(theirs / "checkpoint"), place / "out"
    train = ["train", "--data", f"{out}/prepared", "--model", model, "--batch_size", "2", "--save_every", "1"]
    train += ["--eval_every", "2", "--metrics", "chrf", "--metrics_limit", "2", "--max_new_tokens", "4"]
    full, lora = [*train, "--out", f"{out}/full"], [*train, "--out", f"{out}/lora", "--method", "lora"]
    spend(
        ["prepare", "--data", str(theirs / "data" / "rows.jsonl"), "--tokenizer", model, "--template", "translate",
         "--validation_fraction", "0.2", "--out", f"{out}/prepared"],
        ["tokenizer", "report", model, "--data", str(theirs / "data" / "rows.jsonl")],
        ["tokenizer", "extend", model, "--data", str(theirs / "data" / "rows.jsonl"), "--tokens", "2", "--out",
         f"{out}/extended", "--minimum_frequency", "2"],
    )  # fmt: skip
    for folder in (out / "prepared", out / "prepared" / "train", out / "prepared" / "tokenizer"):
        plant_pickles(folder, marks)
        plant_code(folder, marks)
    spend([*full, "--max_steps", "2"], [*lora, "--max_steps", "2"])
    for run in (out / "full", out / "lora"):
        for folder in (run, *run.glob("checkpoints/step-*"), *run.glob("checkpoints/step-*/model")):
            plant_pickles(folder, marks)
            plant_code(folder, marks)
    spend(
        [*full, "--max_steps", "3", "--resume", "true"],
        [*lora, "--max_steps", "3", "--resume", "true"],
        ["publish", f"{out}/full", "--to", "me/full", "--dry_run"],
    )
    for run in (out / "full", out / "lora"):  # not before: what others put there is neither replaced nor published
        plant_pickles(run / "final", marks)
        plant_code(run / "final", marks)
    adapter = shutil.copytree(out / "lora" / "final", place / "theirs" / "adapter")
    edit(
        adapter / "adapter_config.json", **HOSTILE, task_type=None, auto_map=AUTO_MAP,
        auto_mapping={"base_model_class": "Any", "parent_library": "canary_library"},
    )  # fmt: skip
    before |= {f"adapter/{name}": digest for name, digest in contents(adapter).items()}
    (place / "recipe.yaml").write_text(yaml.safe_dump({"model": model, "data": f"{out}/prepared", "max_steps": 1}))
    spend(
        ["evaluate", model, "--data", f"{out}/prepared", "--split", "validation", "--out", f"{out}/report.json"],
        ["generate", model, "--in_file", str(place / "prompts.jsonl"), "--out_file", f"{out}/answers.jsonl"],
        ["generate", str(adapter), "--instruction", "Add.", "--input", "1 + 1"],
        ["sample", str(adapter), "--data", str(theirs / "data" / "rows.jsonl"), "--temperature", "2",
         "--max_new_tokens", "6", "--out", f"{out}/samples.jsonl"],
        ["rank", f"{out}/samples.jsonl", "--unfinished", "true", "--out", f"{out}/pairs.jsonl"],
        ["inspect", str(adapter), "--source", "1 + 1", "--out", f"{out}/inspect.html"],
        ["merge", str(adapter), "--out", f"{out}/merged"],
        ["export", model, "--out", f"{out}/exported"],
        ["generate", f"{out}/exported", "--engine", "ctranslate2", "--instruction", "Add.", "--input", "1 + 1"],
        ["compare", f"{out}/full", f"{out}/lora", "--out", f"{out}/compared.png"],
        ["sweep", str(place / "recipe.yaml"), "--trials", "1", "--out", f"{out}/sweep"],
        ["distil", model, model, "--data", str(theirs / "data" / "rows.jsonl"), "--out", f"{out}/taught", "--samples",
         "1", "--max_new_tokens", "4", "--train", json.dumps({"max_steps": 1}), "--prepare",
         json.dumps({"template": "translate"})],
        ["pair", str(theirs / "llm"), "--out", f"{out}/paired"],
        ["denoise", "--data", str(theirs / "data" / "rows.jsonl"), "--tokenizer", model, "--out", f"{out}/raw"],
        ["demo", str(adapter), "--port", str(free_port())],
        ["serve", str(adapter), "--port", str(free_port())],
        ["doctor", model, "--data", str(theirs / "data" / "rows.jsonl")],
    )  # fmt: skip
    spender.stdin.close()
    assert spender.wait(60) == 0
    patience.cancel()
    noted = [tuple(line.split("\t", 1)) for line in (place / "log").read_text().splitlines()]
    return Aftermath(place, codes, output, sorted(os.listdir(marks)), noted, server.asked, before)


def test_every_command_did_its_work(aftermath):
    assert {command for command, _ in aftermath.codes} == set(cli.COMMANDS)
    failed = [command for command, code in aftermath.codes if code not in (("0", "1") if command == "doctor" else "0")]
    assert not failed, aftermath.output
    assert "Traceback" not in aftermath.output, aftermath.output


def test_no_code_of_theirs_ran(aftermath):
    assert aftermath.marks == []


@pytest.mark.slow
def test_the_canaries_are_alive(tmp_path, t5_checkpoint):
    """Otherwise, that none ran would mean nothing."""
    marks, folder = tmp_path / "marks", shutil.copytree(t5_checkpoint, tmp_path / "checkpoint")
    marks.mkdir()
    make_hostile(folder, marks)
    for name in PICKLES:
        torch.load(folder / name, weights_only=False).close()
    pickle.loads((folder / "raw.pkl").read_bytes()).close()
    assert len(os.listdir(marks)) == len(PICKLES) + 1
    edit(folder / "config.json", model_type="stranger")
    code = f"import transformers; transformers.AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    environment = os.environ | {"HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (marks / "checkpoint-code.py").exists()


def test_offline_no_command_made_a_connection(aftermath):
    assert aftermath.asked == []
    assert [what for kind, what in aftermath.noted if kind == "connection"] == []


def test_the_watch_sees_connections_and_files(tmp_path, listener):
    (tmp_path / "sitecustomize.py").write_text(WATCH.format(log=str(tmp_path / "log")))
    code = f"import socket; open({str(tmp_path / 'file')!r}, 'w'); socket.getaddrinfo('nowhere.invalid', 80)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert (tmp_path / "log").read_text().splitlines() == [
        f"written\t{tmp_path / 'file'}", "connection\tnowhere.invalid",
    ]  # fmt: skip
    online = {"HF_ENDPOINT": f"http://127.0.0.1:{listener.server_port}", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    ask = "from diptych.data_prep.text_to_ids.checkpoint_config import check_place; check_place('nobody/nothing')"
    subprocess.run([sys.executable, "-c", ask], env=os.environ | online, capture_output=True)
    assert listener.asked


def test_nothing_is_written_outside_the_out_and_cache_folders(aftermath):
    place = aftermath.place
    assert contents(place / "theirs") == aftermath.before
    assert not [path for path in (place / "home").rglob("*") if path.is_file()]
    assert sorted(path.name for path in (place / "cwd").iterdir()) == ["canary_library.py"]
    assert list((place / "tmp").rglob("*")) == []
    allowed = (f"{place}/out", f"{place}/cache", f"{place}/tmp", "/dev/", "/proc/")
    allowed += (f"{place}/home/.config",)  # matplotlib makes the folder of its settings, and leaves it empty
    gradio = Path(importlib.util.find_spec("gradio").origin).parent
    allowed += (f"{gradio}/hash_seed.txt",)  # a number of its own, when it is imported for the first time
    assert sorted({what for kind, what in aftermath.noted if kind == "written" and not what.startswith(allowed)}) == []


# Weights


@pytest.fixture
def copy(tmp_path, t5_checkpoint):
    """A checkpoint to do anything with."""
    return shutil.copytree(t5_checkpoint, tmp_path / "copy")


def refusal(folder: Path, load=load_model) -> str:
    with pytest.raises(UserError) as caught:
        load(str(folder))
    return str(caught.value)


@pytest.mark.slow
def test_each_kind_of_pickle_is_refused_and_the_command_that_is_named_converts_it(copy, tmp_path, learned_t5):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    assert "has no *.safetensors file. Weights are read" in refusal(copy)
    for name in ("tf_model.h5", "model.pt", "pytorch_model.bin.index.json", "pytorch_model.bin"):
        torch.save(Canary(tmp_path / "ran"), copy / name)
        assert "has no *.safetensors file, only " in refusal(copy) and "because a pickle can run code" in refusal(copy)
    assert not (tmp_path / "ran").exists()
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "pytorch_model.bin.index.json").unlink()
    command = refusal(copy).split("convert it: ")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, capture_output=True)
    converted = load_checkpoint(tmp_path / "copy-safetensors").model
    assert torch.equal(converted.shared.weight, learned_t5.shared.weight)


@pytest.fixture
def adapter(tmp_path, t5_checkpoint, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model

    base = T5ForConditionalGeneration.from_pretrained(t5_checkpoint)
    get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", r=4)).save_pretrained(tmp_path / "adapter")
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_pickled_adapter_is_refused_also_beside_other_safetensors_and_can_be_converted(adapter, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").rename(adapter / "other.safetensors")
    torch.save(Canary(tmp_path / "ran"), adapter / "adapter_model.bin")
    assert "has no adapter_model.safetensors, only adapter_model.bin" in refusal(adapter, load_checkpoint)
    assert not (tmp_path / "ran").exists()
    torch.save(weights, adapter / "adapter_model.bin")
    command = refusal(adapter, load_checkpoint).split("convert it: ")[1]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, capture_output=True)
    load_checkpoint(adapter)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "BOFT"}, "has the peft_type 'BOFT'. Adapters of LORA, HRA"),
        ({"megatron_config": {"a": 1}, "megatron_core": "canary_library"}, "would import 'canary_library'"),
        ({"r": 10**9}, "has the rank 1000000000: 192,000,000,000 bytes or more a layer"),
        ({"r": -1}, "has the rank -1"),
        ({"rank_pattern": {"q": 10**9}}, "has the rank 1000000000"),
        ({"base_model_name_or_path": ["a"]}, "holds no settings of an adapter"),
    ],
)
def test_an_adapter_that_wants_more_than_to_be_read_is_refused(adapter, changes, said):
    edit(adapter / "adapter_config.json", **changes)
    assert said in refusal(adapter, load_checkpoint)


@pytest.mark.parametrize(
    "shard",
    ["pytorch_model.bin", "../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", 7, "a" * 999 + ".safetensors"],
)
def test_an_index_leads_to_safetensors_in_its_own_folder_or_nowhere(copy, tmp_path, shard):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    torch.save(Canary(tmp_path / "ran"), copy / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"model.safetensors.index.json of {copy} names {repr(shard)[:80]}" in refusal(copy)
    assert not (tmp_path / "ran").exists()


def test_shards_load_and_one_that_is_missing_is_named(copy, learned_t5):
    (copy / "model.safetensors").unlink()
    learned_t5.save_pretrained(copy, max_shard_size="50kB")
    assert len(list(copy.glob("model-*.safetensors"))) > 1
    assert torch.equal(load_model(str(copy)).shared.weight, learned_t5.shared.weight)
    next(copy.glob("model-00002*")).unlink()
    assert "lacks model-00002" in refusal(copy)
    for text in ("[]", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'):
        (copy / "model.safetensors.index.json").write_text(text)
        assert "is no index of weights" in refusal(copy)


def test_a_link_to_a_pickle_is_not_opened_as_one(copy, tmp_path):
    torch.save(Canary(tmp_path / "ran"), tmp_path / "pickle.bin")
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to(tmp_path / "pickle.bin")
    assert "model.safetensors is damaged, or no safetensors" in refusal(copy)
    assert not (tmp_path / "ran").exists()


HUB_LOADS = """
import sys
from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.model.loading import load_checkpoint
for name in sys.argv[1:]:
    try:
        print(type(load_checkpoint(name).model).__name__)
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_what_was_downloaded_from_the_hub_is_looked_at_as_a_folder_is(copy, adapter, tmp_path, listener):
    """Offline: the cache as huggingface_hub lays it out."""
    edit(adapter / "adapter_config.json", base_model_name_or_path="me/whole")
    place = {}
    for name in ("whole", "pickled", "absurd", "adapter", "adapter-bin"):
        there = tmp_path / "hub" / f"models--me--{name}"
        place[name] = there / "snapshots" / ("0" * 40)
        shutil.copytree(adapter if name.startswith("adapter") else copy, place[name])
        (there / "refs").mkdir()
        (there / "refs" / "main").write_text("0" * 40)
    (place["pickled"] / "model.safetensors").unlink()
    save_canary(place["pickled"] / "pytorch_model.bin", tmp_path / "ran")
    edit(place["absurd"] / "config.json", d_ff=10**9)
    (place["adapter-bin"] / "adapter_model.safetensors").unlink()
    save_canary(place["adapter-bin"] / "adapter_model.bin", tmp_path / "ran")
    names = ["me/whole", "me/adapter", "me/pickled", "me/absurd", "me/adapter-bin"]
    hub = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    hub |= {"HF_ENDPOINT": f"http://127.0.0.1:{listener.server_port}"}
    ended = subprocess.run(
        [sys.executable, "-c", HUB_LOADS, *names], env=os.environ | hub, capture_output=True, text=True
    )
    whole, adapted, pickled, absurd, pickled_adapter = ended.stdout.splitlines() or [ended.stderr] * 5
    assert whole == adapted == "T5ForConditionalGeneration"
    assert "me/pickled has no *.safetensors file" in pickled
    assert "config.json of me/absurd asks for" in absurd
    assert "me/adapter-bin has no *.safetensors file" in pickled_adapter
    assert not (tmp_path / "ran").exists() and not listener.asked


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
LIES = {
    "a header of 2**60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "longer than the file": header(a=TENSOR | {"shape": [2**40], "data_offsets": [0, 2**42]}) + bytes(16),
    "overlapping": header(a=TENSOR, b=TENSOR | {"data_offsets": [8, 24]}) + bytes(24),
    "beginning before the data": header(a=TENSOR | {"data_offsets": [-8, 8]}) + bytes(16),
    "a shape of another size": header(a=TENSOR | {"shape": [2**50]}) + bytes(16),
    "nothing": b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(copy, lie):
    (copy / "model.safetensors").write_bytes(LIES[lie])
    assert "model.safetensors is damaged, or no safetensors" in refusal(copy)


# Sizes

ABSURD = [
    ({"d_model": 10**9}, r"asks for .* at least \d{3},\d{3},\d{3},\d{3},\d{3} bytes|asks for"),
    ({"vocab_size": 10**12}, r"at least 192,\d{3},\d{3},\d{3},\d{3} bytes in fp32, and its files hold"),
    ({"num_layers": 10**7}, r"asks for 10,000,000 layers \(num_layers\): at least 184,\d{3},\d{3},\d{3} bytes"),
    ({"num_layers": 900}, r"asks for 900 layers and at least"),
    ({"num_heads": 10**9}, r"asks for weights of [\d,]{15,} bytes"),
    ({"d_kv": 10**9}, r"asks for weights of [\d,]{15,} bytes"),
    ({"d_model": 10**12, "vocab_size": 10**12}, r"asks for"),
    ({"relative_attention_num_buckets": 10**12}, r"asks for weights of [\d,]{15,} bytes"),
    ({"relative_attention_max_distance": 1}, "relative_attention_max_distance 1, which gives no logarithms"),
    ({"d_model": -48}, "d_model is '-48', which is no size"),
    ({"vocab_size": "many"}, "vocab_size is 'many', which is no size"),
    ({"num_layers": 2.5}, "num_layers is '2.5', which is no size"),
    ({"d_ff": True}, "d_ff is 'True', which is no size"),
    ({"vocab_size": 0}, "vocab_size is '0', which is no size"),
]


@pytest.mark.parametrize(("changes", "said"), ABSURD, ids=[str(changes) for changes, _ in ABSURD])
def test_an_absurd_size_is_refused_with_the_bytes_that_it_would_take(copy, changes, said):
    """Where it would be allocated, this process would not live to say so."""
    edit(copy / "config.json", **changes)
    assert re.search(said, refusal(copy))


def test_the_tokenizer_of_a_checkpoint_with_absurd_layers_is_refused_too(copy, tmp_path, capsys):
    """T5Gemma's config makes a list as long as it has layers: 80 GB."""
    edit(copy / "config.json", model_type="t5gemma", decoder={"num_hidden_layers": 10**10})
    assert "asks for 10,000,000,000 layers" in refusal(copy, load_tokenizer)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    data = ["--data", str(tmp_path / "rows.jsonl")]
    assert cli.main(["prepare", *data, "--tokenizer", str(copy), "--out", str(tmp_path / "out")]) == 2
    assert cli.main(["tokenizer", "report", str(copy), *data]) == 2
    assert capsys.readouterr().err.count("asks for 10,000,000,000 layers") == 2


def test_a_model_larger_than_memory_is_refused_with_both_figures(copy, capsys):
    """Its file has all its weights, as holes on the disk: two tables of four terabytes."""
    rows, width = 2**36, 16
    table = {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, rows * width * 4]}
    layers = {f"layer.{n}": {"dtype": "F32", "shape": [0], "data_offsets": [rows * width * 4] * 2} for n in range(9)}
    start = header(shared=table, **layers)
    (copy / "model.safetensors").write_bytes(start)
    try:
        os.truncate(copy / "model.safetensors", len(start) + rows * width * 4)
    except OSError:
        pytest.skip("this file system has no files of four terabytes")
    edit(copy / "config.json", vocab_size=rows, d_model=width)
    code = cli.main(["generate", str(copy), "--instruction", "a", "--device", "cpu"])
    assert code == 4 and "takes 4,398,0" in (said := capsys.readouterr().err) and "bytes of memory left" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attn_implementation": "a-stranger/attention"}, "would load code"),
        ({"_attn_implementation": {"": "a-stranger/attention@main:run"}}, "would load code"),
        ({"attn_implementation": "flash_attention_2"}, "would load code"),
        ({"decoder": {"experts_implementation": "a-stranger/experts"}}, "would load code"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "has a quantization_config"),
        ({"transformers_weights": "../other.safetensors"}, "has a transformers_weights"),
        ({"text_config": {"a": 1}}, "is not one that a model can be made of"),
        ({"model_type": "stranger", "auto_map": AUTO_MAP}, "the config of"),
    ],
)
def test_a_config_that_asks_for_code_or_other_weights_is_refused(copy, changes, said):
    edit(copy / "config.json", **changes)
    assert said in refusal(copy)


def test_code_of_a_panel_is_not_run_either(checkpoint_of, tmp_path):
    """T5Gemma's config holds two others, of its encoder and its decoder."""
    folder = shutil.copytree(checkpoint_of("t5gemma"), tmp_path / "copy")
    panels = json.loads((folder / "config.json").read_text())
    hostile = {panel: panels[panel] | HOSTILE | {"auto_map": AUTO_MAP} for panel in ("encoder", "decoder")}
    edit(folder / "config.json", **hostile, auto_map=AUTO_MAP, **HOSTILE)
    plant_code(folder, tmp_path)
    assert type(load_model(str(folder))).__name__ == "T5GemmaForConditionalGeneration"
    edit(folder / "config.json", encoder=hostile["encoder"] | {"model_type": "stranger"})
    load_model(str(folder))
    assert not (tmp_path / "copy-code.py").exists()


@pytest.mark.parametrize("content", ["[]", "{", '"text"', "7", "null", "[" * 10**5, "\x00"])
def test_a_config_that_is_none_is_refused(copy, content):
    (copy / "config.json").write_text(content)
    assert "config" in refusal(copy) and "config" in refusal(copy, load_tokenizer)


def test_a_chat_template_with_a_path_for_a_name_is_refused_before_anything_is_saved(copy, tmp_path, capsys):
    edit(copy / "tokenizer_config.json", chat_template=[{"name": "../../escaped", "template": "{{ 1 }}"}])
    assert "chat_template has one named '../../escaped'" in refusal(copy, load_tokenizer)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    data = ["--data", str(tmp_path / "rows.jsonl")]
    assert cli.main(["prepare", *data, "--tokenizer", str(copy), "--out", str(tmp_path / "out")]) == 2
    assert "chat_template has one named" in capsys.readouterr().err
    assert not list(tmp_path.rglob("escaped*"))


# Data and recipes


def test_a_prepared_folder_with_columns_that_open_files_is_refused(tmp_path):
    features = datasets.Features({"source": datasets.Image(), "labels": datasets.List(datasets.Value("int32"))})
    picture = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = {"source": [{"bytes": None, "path": "http://127.0.0.1/picture.png"}], "labels": [[1]]}
    rows = datasets.Dataset.from_dict(rows, features=datasets.Features(features | {"source": picture}))
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "data")
    edit(tmp_path / "data" / "train" / "dataset_info.json", features=features.to_dict())
    with pytest.raises(UserError, match="has a column source of type Image"):
        open_prepared(tmp_path / "data")
    (tmp_path / "data" / "train" / "state.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read as a prepared dataset"):
        open_prepared(tmp_path / "data")


def test_a_pickle_in_an_arrow_file_stays_one(tmp_path):
    """Of extension types, which pyarrow once unpickled when it read a schema (CVE-2023-47248)."""
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    kind[b"ARROW:extension:metadata"] = pickle.dumps(Canary(tmp_path / "ran"))
    schema = pyarrow.schema([pyarrow.field("labels", pyarrow.int64(), metadata=kind)])
    table = pyarrow.table([pyarrow.array([1, 2])], schema=schema)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"labels": [1, 2]})}).save_to_disk(tmp_path / "data")
    shard = next((tmp_path / "data" / "train").glob("*.arrow"))
    with pyarrow.OSFile(str(shard), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="no lists of whole numbers as column input_ids"):
        open_prepared(tmp_path / "data")
    cli.main(["prepare", "--data", str(shard), "--train_tokenizer", "bpe", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "generate", "doctor", "publish", "merge"])
def test_recipes_are_data_and_unknown_keys_name_the_nearest(tmp_path, capsys, command):
    target = [] if command in ("prepare", "train") else ["x"]
    recipe = tmp_path / "recipe.yaml"
    key = {"merge": "dtype", "publish": "license", "doctor": "device"}.get(command, "seed")

    def said_of(text: str) -> str:
        recipe.write_text(text)
        try:
            code = cli.main([command, *target, "--config", str(recipe)])
        except SystemExit as error:
            code = error.code
        assert code == 2
        return capsys.readouterr().err

    for value in ("!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system", "!!python/module:os"):
        assert "no YAML" in said_of(f"{key}: {value.format(tmp_path / 'ran')}\n")
    said = said_of(f"{key[:-1]}x: 1\n")
    assert key[:-1] + "x" in said and f"Did you mean {key}?" in said
    assert not (tmp_path / "ran").exists()
