"""Two processes, each with half of every layer, compute what one computes: a real run over gloo on the CPU."""

import json
import logging

import pytest
import torch
from transformers.distributed.tensor_parallel import verify_tp_plan

SHAPES = {
    "tied, all parts": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "qk_norm": True,
    },
    "joint norms after": {"norm_placement": "after", "qk_norm": True, "joint_qk_norm": True},
    "untied, unequal": {"encoder": {"hidden_size": 48, "num_hidden_layers": 1}, "decoder": {"num_hidden_layers": 2}},
}

# Each rank loads every folder twice: whole, and split by the model's own plan.
RANK = """
import json, sys
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from diptych.modeling import DiptychForConditionalGeneration as Model

dist.init_process_group("gloo")
result, *folders = sys.argv[1:]
report = {}
for folder in folders:
    whole = Model.from_pretrained(folder).eval()
    split = Model.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto")).eval()
    tokens = torch.randint(3, 53, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.flip(1)}
    ours, theirs = whole(**batch), split(**batch)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = 0.0
    for (name, one), (other_name, two) in zip(whole.named_parameters(), split.named_parameters(), strict=True):
        assert name == other_name
        gradient = two.grad.full_tensor() if isinstance(two.grad, DTensor) else two.grad
        gradients = max(gradients, (one.grad - gradient).abs().max().item())
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    written = [model.generate(tokens, attention_mask=mask, **settings) for model in (whole, split)]
    report[folder] = {
        "logits": (ours.logits - theirs.logits).abs().max().item(),
        "loss": (ours.loss - theirs.loss).abs().item(),
        "gradients": gradients,
        "same tokens": torch.equal(*written),
        "whole": [name for name, weight in split.named_parameters() if not isinstance(weight, DTensor)],
    }
if dist.get_rank() == 0:
    json.dump(report, open(result, "w"))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plan_names_every_matrix_and_nothing_that_is_not_there(shape, build_model, caplog, monkeypatch):
    with torch.device("meta"):
        model = build_model(**SHAPES[shape])
    norms = [name for name in model.state_dict() if "q_norm" in name or "k_norm" in name]
    norms = [] if model.config.joint_qk_norm else norms  # whole on every rank, as OLMo 2's
    matrices = [name for name, weight in model.state_dict().items() if weight.ndim == 2]
    plan = {rule: style for rule, style in model.tp_plan.items() if norms or "_norm" not in rule}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING", logger="transformers"):
        verify_tp_plan(matrices + norms, plan)
    assert not caplog.messages
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    assert model.tp_plan["model.encoder.embed_tokens"] == model.tp_plan["model.decoder.embed_tokens"]


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(build_model, nursery, tmp_path, hinge):
    folders = []
    for shape, fields in SHAPES.items():
        if hinge == "merged" and "unequal" in shape:
            continue
        folders.append(str(tmp_path / shape))
        build_model(**fields, vocab_size=54).save_pretrained(folders[-1])
    script, result = tmp_path / "rank.py", tmp_path / "report.json"
    script.write_text(RANK)
    nursery.run_script([script, result, *folders], tmp_path / "log", ranks=2)
    for folder, figures in json.loads(result.read_text()).items():
        assert max(figures["logits"], figures["loss"], figures["gradients"]) < 1e-4, (folder, figures)
        assert figures["same tokens"], folder
        assert all("norm" in name for name in figures["whole"]), "only norms are held whole by every rank"
