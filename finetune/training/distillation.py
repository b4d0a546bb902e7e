"""The loss with a teacher (distillation): the targets, and another model's predictions in their place.

    teacher = load_teacher("my-llm", tokenizer, device, torch.bfloat16)
    objective = DistilledObjective(model, teacher, weight=0.5, temperature=2.0)

    loss = (1 − weight) · cross-entropy + weight · temperature² · KL(teacher ‖ student)      per target token, summed,
                                                                                             ÷ those of the whole step

Hinton, Vinyals and Dean, arXiv 1503.02531. Both distributions are softmax(logits / temperature); its square keeps the
gradient's size. A decoder-only teacher reads each example as one text, source then target, as the merged hinge does: a
pair that was made of it begins with the same predictions. An encoder-decoder is fed as the student is. Logits, the
teacher's and the student's, are held for one chunk of tokens at a time.

B rows, S source tokens, T target tokens, N target tokens picked from B × T, n in a chunk, V words.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, library_errors
from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.data_prep.text_to_ids.two_vocabularies import all_tokens
from diptych.finetune.model.donor_llm import llm_logits, open_donor, tokenizers_differ
from diptych.finetune.model.families import decoder_start_token
from diptych.finetune.model.loading import load_config, load_model, load_tokenizer
from diptych.finetune.model.loss import Criterion, Seq2SeqObjective, cross_entropy
from diptych.finetune.model.untrusted_files import check_model

Batch = dict[str, torch.Tensor]
LogitsOf = Callable[[torch.Tensor], torch.Tensor]


class Teacher(NamedTuple):
    model: PreTrainedModel
    is_decoder_only: bool


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype) -> Teacher:
    """UserError if it is no model, or has another vocabulary."""
    if difference := tokenizers_differ(all_tokens(load_tokenizer(name)), all_tokens(tokenizer)):
        raise UserError(
            f"the teacher {name} has another tokenizer than the data ({difference}): its predictions are of other"
            f" words. Take a teacher of the same family."
        )
    is_decoder_only = not load_config(name).is_encoder_decoder
    if is_decoder_only:
        open_donor(name)  # checks that it is safetensors, and no larger than this machine
        with library_errors(f"the weights of {name} could not be read", "Copy it again."):
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    else:
        model = load_model(name, dtype)
    check_model(model, name)
    model = model.to(device).eval().requires_grad_(False)
    if is_decoder_only:
        ids = torch.arange(3, device=device)[None]
        of_states = llm_logits(model, model.get_decoder()(ids, use_cache=False).last_hidden_state)
        if not torch.allclose(of_states, model(ids, use_cache=False).logits, rtol=1e-2, atol=1e-2):
            raise UserError(
                f"the teacher {name} ({model.config.model_type}) does more with the output of its head than Diptych"
                f" knows, so its predictions would be wrong. Take another teacher."
            )
    return Teacher(model, is_decoder_only)


class DistilledObjective(Seq2SeqObjective):
    """As `Seq2SeqObjective`; in training, with the teacher. Validation stays in plain nats."""

    has_all_streams = False  # a teacher predicts each target once

    def __init__(
        self, model: PreTrainedModel | PeftModel, teacher: Teacher, weight: float, temperature: float, **settings
    ):
        super().__init__(model, **settings)
        start = decoder_start_token(model)
        if not teacher.is_decoder_only and decoder_start_token(teacher.model) != start:
            raise UserError(
                f"the teacher's decoder starts with token {decoder_start_token(teacher.model)}, the student's with"
                f" {start}, and both read the same rows. Take another teacher."
            )
        self.weight, self.temperature = weight, temperature
        self._teacher = (teacher,)  # in a tuple, so that it is not trained, sent to other ranks, or saved

    def _criterion(self, batch: Batch) -> Criterion:
        of_targets, teacher = cross_entropy(self.extras), self._teacher[0]
        with torch.no_grad():
            read = _read_as_one_text if teacher.is_decoder_only else _read_source_and_target
            states, logits_of = read(teacher.model, batch)

        def criterion(logits: torch.Tensor, labels: torch.Tensor, rows: slice) -> torch.Tensor:
            divergence, gradient = _divergence(logits, logits_of(states[rows]), self.temperature)
            losses = of_targets(logits, labels, rows).mul_(1 - self.weight)
            logits.mul_(1 - self.weight)
            logits[:, : gradient.shape[1]].add_(gradient, alpha=self.weight)
            return losses.add_(divergence, alpha=self.weight)

        return criterion


def _divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, V) each -> temperature² · KL of each token (n,), and its gradient by the student's logits. If the
    vocabulary tables were filled up to different lengths, the rows that only one has belong to no token."""
    words = min(student.shape[1], teacher.shape[1])
    student = (student[:, :words] / temperature).log_softmax(-1)
    teacher = (teacher[:, :words].to(student.dtype) / temperature).log_softmax(-1)
    likely = teacher.exp()
    divergence = (likely * (teacher - student)).sum(-1) * temperature**2
    return divergence, (student.exp_() - likely) * temperature


def _read_source_and_target(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, LogitsOf]:
    """An encoder-decoder's states at the targets (N, D), and what makes logits of a chunk of them."""
    states, _, head, _ = Seq2SeqObjective(model).eval()._states_labels_and_head(batch)
    return _like_the_head(states, model), lambda chunk: head.logits_of(chunk, head.weights)


def _read_as_one_text(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, LogitsOf]:
    """The same of a decoder-only LLM: each example's source and decoder input are one right-padded row."""
    texts, places = one_text_each(batch)
    head = partial(llm_logits, model)
    if not texts:  # a rank without rows
        return places.new_empty(0, 0), head
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    states = model.get_decoder()(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return _like_the_head(states[places[:, 0], places[:, 1]], model), head


def _like_the_head(states: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    return states.to(model.get_output_embeddings().weight.dtype)


def one_text_each(batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each example of a padded or packed batch as one text, and the places in the texts that predict the targets:

    source 12 7 9   decoder input 0 31 40   labels 31 40 1   ->   text 12 7 9 0 31 40, places (text, 3), 4, 5

    Places (N, 2) are in the order of `labels[labels != IGNORE_INDEX]`.
    """
    is_target = batch["labels"] != IGNORE_INDEX
    reads = batch.get("segment_ids", batch.get("attention_mask"))
    writes = batch.get("decoder_segment_ids", is_target.long())  # padded: a row is one segment
    of_sources = batch.get("cross_segment_ids", writes)
    place_of = torch.full((*is_target.shape, 2), -1, device=is_target.device)
    texts = []
    for row in range(len(is_target)):
        for segment in writes[row].unique().tolist():
            if segment == 0:
                continue
            written = (writes[row] == segment).nonzero()[:, 0]
            source = batch["input_ids"][row, reads[row] == of_sources[row, written[0]]]
            target = batch["decoder_input_ids"][row, written]
            at = len(source) + torch.arange(len(written), device=written.device)
            place_of[row, written] = torch.stack((torch.full_like(at, len(texts)), at), dim=1)
            texts.append(torch.cat((source, target)))
    return texts, place_of[is_target]
