"""The losses of cpo, simpo and orpo against those of TRL's own trainers, on the same batch and weights.

    pip install --no-deps --target trl-alone trl
    PYTHONPATH=trl-alone python benchmarks/preference_trl.py

TRL 1.x keeps an encoder-decoder path in CPO and ORPO alone. Its methods are called here as they are, on a small random
T5 and BART in fp32, with the batch that its collator makes. Printed: both losses, and the largest difference
between gradients as a share of the largest gradient.
"""

from types import SimpleNamespace

import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, T5Config
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from diptych.data_prep.packing.packed_row import MARKS_COLUMN
from diptych.finetune.batches.padded_rows import Items, pad_sources, pad_targets
from diptych.finetune.model.families import SOURCE_ROWS
from diptych.finetune.preferences.losses import PreferenceLoss
from diptych.finetune.preferences.objective import PreferenceObjective

IDS = {"vocab_size": 200, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
MODELS = {
    "t5": T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0, initializer_factor=1.5, **IDS
    ),
    "bart": BartConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, dropout=0.0, init_std=0.2, bos_token_id=2, **IDS,
    ),
}  # fmt: skip
CASES = {
    "cpo": (CPOTrainer, "cpo", {"beta": 0.1}, {"loss_type": "sigmoid", "cpo_alpha": 1.0}),
    "cpo, smoothed": (
        *(CPOTrainer, "cpo", {"beta": 0.3, "label_smoothing": 0.1}),
        {"loss_type": "sigmoid", "cpo_alpha": 1.0, "label_smoothing": 0.1},
    ),
    "simpo": (
        *(CPOTrainer, "simpo", {"beta": 2.0, "gamma": 1.0}),
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0},
    ),
    "orpo": (ORPOTrainer, "orpo", {"beta": 0.1}, {}),
}


def rows() -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    draw = torch.Generator().manual_seed(0)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(3, most, (1,), generator=draw))
        return [*torch.randint(3, 200, (length,), generator=draw).tolist(), 1]

    return [ids(20) for _ in range(6)], [ids(9) for _ in range(6)], [ids(9) for _ in range(6)]


def theirs(model, trainer, settings: dict) -> torch.Tensor:
    sources, chosen, rejected = rows()
    prompts = pad_sources(sources, 0)
    batch = {"prompt_input_ids": prompts["input_ids"], "prompt_attention_mask": prompts["attention_mask"]}
    for name, answers in (("chosen", chosen), ("rejected", rejected)):
        batch[f"{name}_labels"] = pad_targets([{"labels": ids} for ids in answers], 0, 0)["labels"]
    own = {"alpha": 0.0, "label_smoothing": 0.0, "aux_loss_enabled": False, "is_encoder_decoder": True}
    own |= {"padding_value": 0, "accelerator": SimpleNamespace(device="cpu", gather_for_metrics=lambda it: it)}
    own |= {"pad_token_id": 0, "decoder_start_token_id": 0, "model": model}
    methods = "concatenated_inputs concatenated_forward get_batch_logps cpo_loss odds_ratio_loss _shift_right".split()
    fake = type("Fake", (), {name: vars(trainer)[name] for name in methods if name in vars(trainer)})()
    for name, value in (own | settings).items():
        setattr(fake, name, value)
    return trainer.get_batch_loss_metrics(fake, model, batch)[0]


def ours(model, objective: str, settings: dict) -> torch.Tensor:
    sources, chosen, rejected = rows()
    answers = [{"labels": ids} for pair in zip(chosen, rejected, strict=True) for ids in pair]
    batch = pad_sources(sources, 0) | pad_targets(answers, 0, 0)
    batch |= {MARKS_COLUMN: torch.tensor([1, -1]).repeat(6), SOURCE_ROWS: torch.arange(6).repeat_interleave(2)}
    loss = PreferenceObjective(model, PreferenceLoss.of(objective, settings), tokens_at_once=8)
    return loss(batch, Items(6, sum(map(len, chosen))))


def main() -> None:
    print("| model | objective | TRL | Diptych | largest difference of gradients |")
    for family, config in MODELS.items():
        for case, (trainer, objective, own, settings) in CASES.items():
            torch.manual_seed(0)
            model = AutoModelForSeq2SeqLM.from_config(config).train()
            found = []
            for loss in (theirs(model, trainer, {"beta": own["beta"]} | settings), ours(model, objective, own)):
                model.zero_grad(set_to_none=True)
                loss.backward()
                grads = {
                    name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
                }
                found.append((loss.item(), grads))
            (one, gradients), (other, others) = found
            largest = max(float(gradient.abs().max()) for gradient in gradients.values())
            apart = max(float((gradients[name] - others[name]).abs().max()) for name in gradients) / largest
            print(f"| {family} | {case} | {one:.6f} | {other:.6f} | {apart:.1e} |")


if __name__ == "__main__":
    main()
