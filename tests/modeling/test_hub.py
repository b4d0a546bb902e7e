"""What travels with a checkpoint is enough: a process without diptych reads it, computes the same, passes it on."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_relative_import_files

import diptych.modeling.modeling_diptych as modeling_file
from diptych.modeling import DiptychEncoderModel, DiptychForConditionalGeneration

TRAVELLING = {"configuration_diptych.py", "modeling_diptych.py"}

# Runs in a process of its own. `diptych` cannot be imported there; the answers are written where the test reads them.
STRANGER = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diptych":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
try:
    import diptych.modeling
except ModuleNotFoundError:
    pass
else:
    sys.exit("diptych can be imported; this process proves nothing")

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding, AutoTokenizer

def read(auto, folder):
    return auto.from_pretrained(folder, trust_remote_code=True)

def answers(folder):
    tokenizer, model = read(AutoTokenizer, folder), read(AutoModelForSeq2SeqLM, folder)
    source = tokenizer(["w10 w20 w30", "w11 w12"], padding=True, return_tensors="pt")
    target = tokenizer(["w40", "w41"], return_tensors="pt").input_ids
    with torch.no_grad():
        return {
            "logits": model(**source, decoder_input_ids=target).logits,
            "base": read(AutoModel, folder)(**source, decoder_input_ids=target).last_hidden_state,
            "encoder": read(AutoModelForTextEncoding, folder)(**source).last_hidden_state,
            "tokens": model.generate(**source, max_new_tokens=8, do_sample=False),
            "beams": model.generate(**source, max_new_tokens=8, num_beams=3, do_sample=False),
        }

folder, again, encoder_again, result = sys.argv[1:]
torch.save(answers(folder), result)
config = read(AutoConfig, folder)
assert type(config).__name__ == "DiptychConfig" and type(config).__module__.startswith("transformers_modules")
model = read(AutoModelForSeq2SeqLM, folder)
model.resize_token_embeddings(60)
model.save_pretrained(again)
read(AutoTokenizer, folder).save_pretrained(again)
read(AutoModelForTextEncoding, folder).save_pretrained(encoder_again)
assert read(AutoModelForTextEncoding, encoder_again).config.vocab_size == 53
assert read(AutoModelForSeq2SeqLM, again).lm_head.out_features == 60
assert not any(name.split(".")[0] == "diptych" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "</s>": 1, "<s>": 2} | {f"w{i}": i for i in range(3, 53)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


@pytest.fixture(scope="module")
def model(build_model):
    return build_model(tie_word_embeddings=True, qk_norm=True)


@pytest.fixture(scope="module")
def published(model, tokenizer, tmp_path_factory):
    """The folder as saved, moved elsewhere: nothing may lean on where it was."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return shutil.move(folder / "model", tmp_path_factory.mktemp("elsewhere") / "copied")


def test_saved_folder_holds_code_config_weights_tokenizer_and_generation_config(published):
    names = {path.name for path in published.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert TRAVELLING | wanted <= names
    assert {name for name in names if name.endswith(".py")} == TRAVELLING
    auto_map = json.loads((published / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM", "AutoModelForTextEncoding"}
    assert {target.split(".")[0] + ".py" for target in auto_map.values()} == TRAVELLING


def test_the_hubs_own_search_finds_the_same_files():
    found = get_relative_import_files(modeling_file.__file__)
    assert {os.path.basename(path) for path in found} == TRAVELLING - {"modeling_diptych.py"}


def test_every_saved_kind_of_model_carries_the_code(model, tmp_path):
    for part in (model, model.model, DiptychEncoderModel(model.config)):
        folder = tmp_path / type(part).__name__
        part.save_pretrained(folder)
        assert {path.name for path in folder.glob("*.py")} == TRAVELLING
        assert json.loads((folder / "config.json").read_text())["architectures"] == [type(part).__name__]
    model.config.save_pretrained(tmp_path / "config alone")
    assert (tmp_path / "config alone" / "configuration_diptych.py").exists()


@torch.no_grad()
def test_a_process_without_diptych_computes_the_same_and_passes_it_on(published, model, tokenizer, tmp_path):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    places = [tmp_path / name for name in ("again", "encoder", "answers.pt")]
    command = [sys.executable, "-c", STRANGER, published, *places]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    theirs = torch.load(places[2], weights_only=True)
    source = tokenizer(["w10 w20 w30", "w11 w12"], padding=True, return_tensors="pt")
    target = tokenizer(["w40", "w41"], return_tensors="pt").input_ids
    ours = {
        "logits": model(**source, decoder_input_ids=target).logits,
        "base": model.model(**source, decoder_input_ids=target).last_hidden_state,
        "encoder": model.get_encoder()(**source).last_hidden_state,
        "tokens": model.generate(**source, max_new_tokens=8, do_sample=False),
        "beams": model.generate(**source, max_new_tokens=8, num_beams=3, do_sample=False),
    }
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name
    again = AutoModelForSeq2SeqLM.from_pretrained(places[0])
    assert isinstance(again, DiptychForConditionalGeneration)
    assert (
        {path.name for path in places[0].glob("*.py")} == {path.name for path in places[1].glob("*.py")} == TRAVELLING
    )
    assert torch.equal(again(**source, decoder_input_ids=target).logits[..., :53], ours["logits"])


def test_where_diptych_is_installed_no_remote_code_is_asked_for_or_used(published):
    for trust in (None, False, True):
        settings = {} if trust is None else {"trust_remote_code": trust}
        assert type(AutoModelForSeq2SeqLM.from_pretrained(published, **settings)) is DiptychForConditionalGeneration
    assert AutoTokenizer.from_pretrained(published).eos_token == "</s>"


REGISTRATION = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding
import diptych.modeling as d
config = AutoConfig.for_model("diptych", hidden_size=32, num_attention_heads=2, vocab_size=9, num_hidden_layers=1)
assert type(config) is d.DiptychConfig
for auto, model in (
    (AutoModel, d.DiptychModel),
    (AutoModelForSeq2SeqLM, d.DiptychForConditionalGeneration),
    (AutoModelForTextEncoding, d.DiptychEncoderModel),
):
    assert type(auto.from_config(config)) is model
assert not any(name.startswith(("diptych.finetune", "diptych.data_prep", "datasets", "peft")) for name in sys.modules)
"""


def test_importing_the_model_registers_it_in_a_fresh_process_and_loads_no_other_room():
    run = subprocess.run([sys.executable, "-c", REGISTRATION], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
