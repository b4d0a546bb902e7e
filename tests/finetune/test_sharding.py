"""One model over two ranks, on real processes with gloo: what one process computes, writes and goes on from."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForSeq2SeqLM
from safetensors.torch import load_file
from torture import DEADLINE, differences_of
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.run_files import checkpoints
from diptych.finetune.train import run_recipe

STEPS, SUMS_IN_ANOTHER_ORDER = 8, 1e-5
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ON_CPUS = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def train(nursery, training_folder, checkpoint_of, tmp_path):
    """`train("run", ranks, …)`: a short run, sharded if there are several ranks; its folder. The epsilon is one with
    which a step is in proportion to its gradient, so that sums in another order stay together (test_train.py)."""

    def start(name: str, ranks: int, family="t5", die_at=None, codes=(0, 0), is_sharded=True, **changes) -> Path:
        settings = {
            "model": str(checkpoint_of(family)),
            "data": str(training_folder),
            "out": str(tmp_path / name),
            "precision": "fp32",
            "sharding": "full" if ranks > 1 else "none",
            "max_steps": STEPS,
            "batch_size": 6 // ranks,
            "learning_rate": 2e-3,
            "epsilon": 1e-2,
            "group_by_length": False,
            "eval_every": 4,
            "save_every": 4,
            "logging_every": 1,
            "metrics": "exact_match,chrf",
            "max_new_tokens": 6,
            "keep_last": 9,
            "rank_timeout": 60.0,
        }
        file, log = tmp_path / f"{name}.yaml", tmp_path / f"{name}.log"
        file.write_text(yaml.safe_dump(settings | changes))
        for earlier in tmp_path.glob(f"{log.name}.*"):
            earlier.unlink()
        processes = nursery.train(["--config", str(file), "--resume", "true"], log, ranks, die_at=die_at)
        ended = [process.wait(DEADLINE) for process in processes]
        said = "\n".join(Path(f"{log}.{rank}").read_text() for rank in range(ranks))
        assert ended == list(codes[:ranks]), said
        assert (", sharded |" in said) == (ranks > 1 and is_sharded), said
        return tmp_path / name

    return start


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "final").glob("*.safetensors")
    return load_file(file)


def figures(run: Path, *names: str) -> list[list[float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [[line[name] for name in names if name in line] for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Losses, gradients' lengths, metrics, what AdamW has seen of each gradient, and weights."""
    for name, relative in {"step": 0, "loss": SUMS_IN_ANOTHER_ORDER, "gradient_norm": 1e-4}.items():
        for values, expected in zip(figures(one, name), figures(other, name), strict=True):
            assert values == pytest.approx(expected, rel=relative, abs=relative)
    assert figures(one, "chrf", "exact_match", "unfinished") == figures(other, "chrf", "exact_match", "unfinished")
    last = f"checkpoints/step-{STEPS:06d}/optimizer.safetensors"
    assert_close(load_file(one / last), load_file(other / last))
    assert_close(weights_of(one), weights_of(other))


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=SUMS_IN_ANOTHER_ORDER)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["diptych", "t5", "bart"])
def test_two_sharded_ranks_are_one_rank(family, method, train, training_folder):
    """3 rows a rank; in the last step of an epoch 2 are left for both. And what was gathered and saved is a checkpoint
    as any other, here for transformers and peft alone."""
    runs = [train(name, ranks, family, method=method) for name, ranks in (("alone", 1), ("shared", 2))]
    assert_same_run(*runs)
    load = AutoModelForSeq2SeqLM if method == "full" else AutoPeftModelForSeq2SeqLM
    models = [load.from_pretrained(run / "final").eval() for run in runs]
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        one, other = (model(input_ids=ids, decoder_input_ids=ids).logits for model in models)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


SLOW = 3e-4
"""Learning rate of runs that amplify differences of rounding: at 2e-3, these grew beyond the bounds on a CPU with AVX2
alone."""
CHANGES = {
    "accumulated": {"gradient_accumulation_steps": 3, "batch_size": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "embeddings": {"method": "lora", "lora_embeddings": True},
    "schedule_free": {"optimizer": "schedule_free", "schedule": "constant"},
    "ema": {"ema": 0.9},
    "dora": {"method": "lora", "lora_variant": "dora"},
    "padded": {"family": "longt5", "learning_rate": SLOW},
    "global attention": {"family": "led", "learning_rate": SLOW},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_whatever_is_trained_is_the_same_sharded(changes, train):
    shared = changes | ({"batch_size": changes["batch_size"] // 2} if "batch_size" in changes else {})
    assert_same_run(
        train("alone", 1, **{"family": "bart"} | changes), train("shared", 2, **{"family": "bart"} | shared)
    )


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"weights": "bf16", "precision": "bf16"}], ids=str)
def test_what_is_rounded_to_bf16_is_nearly_the_same_sharded(changes, train):
    """Muon makes its updates in bf16, too. Sums in another order round to other numbers of it."""
    alone, shared = (
        train(name, ranks, learning_rate=SLOW, **changes) for name, ranks in (("alone", 1), ("shared", 2))
    )
    for values, expected in zip(figures(shared, "loss"), figures(alone, "loss"), strict=True):
        assert values == pytest.approx(expected, rel=1e-2)


def test_experts_are_not_sharded(train, tmp_path):
    """torch's FSDP2 would exchange gradients of other sizes on each rank, and die or hang."""
    train("shared", 2, family="switch_transformers", codes=(2, 2), is_sharded=False)
    assert "experts of a switch_transformers may get no token" in (tmp_path / "shared.log.0").read_text()


def test_packed_rows_are_the_same_sharded(train, packed_folder):
    """With the layers' own copies of keys and masks; 2 rows, one a rank."""
    settings = {"family": "diptych", "data": str(packed_folder(0))}
    assert_same_run(train("alone", 1, batch_size=2, **settings), train("shared", 2, batch_size=1, **settings))


@pytest.mark.slow
def test_of_a_grown_table_only_new_rows_are_trained(train, tmp_path, new_model):
    """Their hook stands on a weight that torch replaces by its share."""
    new_model("bart", vocab_size=360).save_pretrained(tmp_path / "small")
    settings = {"model": str(tmp_path / "small"), "method": "lora", "grow_vocabulary": True}
    runs = [train(name, ranks, **settings) for name, ranks in (("alone", 1), ("shared", 2))]
    assert_same_run(*runs)
    (table,) = (weight for name, weight in weights_of(runs[1]).items() if "lora" not in name)
    before = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small").get_input_embeddings().weight
    assert torch.equal(table[:360], before) and len(table) == 368


@pytest.mark.slow
def test_two_sharded_ranks_go_on_as_one_and_one_as_two(train):
    """batch_size × ranks stays the same, and so does the order of the rows."""
    early = {"max_steps": 4, "schedule": "constant"}
    whole = train("whole", 1, schedule="constant")
    for name, first, then in (("fewer", 2, 1), ("more", 1, 2)):
        train(name, first, **early)
        assert_same_run(whole, train(name, then, schedule="constant"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_sharded_run_goes_on_with_the_same_bits(method, train, tmp_path, new_model):
    """Rank 0 dies inside a save; rank 1 ends by itself. There is dropout, so random states matter."""
    new_model("diptych", residual_dropout=0.1).save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "method": method, "lora_dropout": 0.1 if method == "lora" else 0.0}
    whole = train("whole", 2, **settings)
    killed = train("killed", 2, die_at=60, codes=(-signal.SIGKILL, 6), **settings)
    assert len(checkpoints.complete_checkpoints(killed / "checkpoints")) == 1
    train("killed", 2, **settings)
    assert differences_of(whole, killed) == []


SHARES = """
import copy, sys
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSeq2SeqLM
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.training.sharding import spread

accelerator = Accelerator()
whole = Seq2SeqObjective(AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])).train()
objective = spread(copy.deepcopy(whole), "full", accelerator)
ids = torch.arange(3, 27).view(4, 6)
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids + 7, "labels": ids + 9}
whole(batch, ids.numel()).backward()
for rows in ([0, 1], [2]) if accelerator.process_index else ([3], []):  # the last one has no rows left
    part = {name: tensor[rows or [0]] for name, tensor in batch.items()}
    if not rows:
        part["labels"] = torch.full_like(part["labels"], -100)
    (objective(part, ids.numel()) * 2).backward()
shares = dict(objective.named_parameters())
for name, weight in whole.named_parameters():
    assert isinstance(shares[name], DTensor) and isinstance(shares[name].grad, DTensor), name
    torch.testing.assert_close(shares[name].grad.full_tensor(), weight.grad, rtol=1e-4, atol=1e-5)
held = sum(weight.to_local().numel() for weight in shares.values())
total = sum(weight.numel() for weight in whole.parameters())
assert 0.45 < held / total < 0.55, (held, total)
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["diptych", "t5", "bart"])
def test_each_rank_holds_its_share_and_the_gradient_is_that_of_all_rows(family, checkpoint_of, nursery, tmp_path):
    """Also of tied tables, whose gradient comes from embedding and head; in two micro-batches of uneven rows."""
    (tmp_path / "shares.py").write_text(SHARES)
    nursery.run_script([tmp_path / "shares.py", checkpoint_of(family)], tmp_path / "log", ranks=2)


def test_launches_that_cannot_share_are_refused_with_what_can(train, tmp_path):
    train("one", 1, sharding="full", codes=(2,))
    said = (tmp_path / "one.log.0").read_text()
    assert "one process was launched" in said and "torchrun --nproc_per_node=N" in said and "--sharding none" in said
    train("quantized", 1, sharding="full", method="lora", quantize="4bit", codes=(2,))
    assert "weights in 4 bits are not spread over ranks" in (tmp_path / "quantized.log.0").read_text()


@pytest.mark.parametrize("engine, said", [("FSDP", "asks for FSDP"), ("DEEPSPEED", "DeepSpeed, which does not run")])
def test_what_accelerate_is_asked_for_and_the_recipe_is_not_is_refused(
    engine, said, short_run, training_folder, monkeypatch
):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=f"{said}.*torchrun .*--sharding full"):
        run_recipe(short_run(data=str(training_folder)))


@pytest.mark.slow
def test_where_the_recipe_shards_accelerates_own_fsdp_has_no_part(train, tmp_path):
    """On a CPU it would be DDP, and transformers would load weights on rank 0 alone."""
    alone = train("alone", 1)
    recipe = yaml.safe_load((tmp_path / "alone.yaml").read_text())
    recipe |= {"out": str(tmp_path / "shared"), "batch_size": 3, "sharding": "full"}
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump(recipe))
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    command = [*TORCHRUN, "-m", "diptych.finetune.train", "--config", str(tmp_path / "shared.yaml")]
    done = subprocess.run(command, env=ON_CPUS | asked, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accelerate's FSDP settings are not used") == 1 and ", sharded |" in done.stdout
    assert_same_run(alone, tmp_path / "shared")
