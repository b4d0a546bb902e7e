"""The loss of preferences for a batch in which several answers read one source.

    objective = PreferenceObjective(model, PreferenceLoss.of("dpo", {}))
    loss = objective(batch, Items(examples=8, chosen_tokens=310))       counted over the whole optimizer step
    objective.answer_log_probabilities(batch)                           (A,), without gradient

The encoder runs once for each source. A padded batch has `source_rows` (A,), the row of input_ids that each row of
labels reads, and `marks` (A,); in packed rows, several decoder segments read one encoder segment, and `marks` (R, T)
has the mark of each target token.

The loss is a small function of the log-probabilities p of all target tokens, and autograd gives its derivative by each
p. The gradient of the loss by the weights is the sum of the gradients of all p, times these derivatives, which is
computed as that of cross-entropy is (loss.py). Where the logits of a batch take no more than ALL_AT_ONCE chunks of
memory, they are computed once. Otherwise the head is applied twice, in chunks: for the p, and for the gradient.

A answers, N target tokens, P examples (pairs, or marked answers), R packed rows.
"""

from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from diptych.data_prep.packing.packed_row import MARKS_COLUMN, PACKED_COLUMNS, SHARED_COLUMN
from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.finetune.batches.packed_rows import REFERENCE
from diptych.finetune.batches.padded_rows import Items
from diptych.finetune.model.families import SOURCE_ROWS, without_adapter
from diptych.finetune.model.loss import Extras, Seq2SeqObjective, cross_entropy, summed_loss
from diptych.finetune.preferences.figures import FIGURES, preference_figures
from diptych.finetune.preferences.losses import AnswerFigures, PreferenceLoss

Batch = dict[str, torch.Tensor]


OF_MODEL = {"attention_mask", SOURCE_ROWS, SHARED_COLUMN, *PACKED_COLUMNS}


ALL_AT_ONCE = 4
ENTROPIES = 64
"""Of so many tokens of a batch the entropy is computed, and of fewer than twice as many."""


class TokenFigures(NamedTuple):
    """Of each target token, (N,): its log-probability, and the answer that it is of; of every `every`-th one, the
    entropy of the prediction in nats, too."""

    log_probabilities: torch.Tensor
    answer_of: torch.Tensor
    entropies: torch.Tensor
    every: int


class PreferenceObjective(Seq2SeqObjective):
    """A model with a loss of preferences, which adds up the figures that a run logs."""

    has_all_streams = False  # each answer is predicted once

    def __init__(
        self, model: PreTrainedModel | PeftModel, loss: PreferenceLoss | None, tokens_at_once: int | None = None
    ):
        super().__init__(model, tokens_at_once=tokens_at_once)
        self.loss = loss
        self.divergence = 0.0
        """Of kto: the mean of π − ρ over the unrelated answers of the whole step."""
        if loss is not None:
            self.figure_names = (*FIGURES, "entropy", *(() if loss.is_marked else ("margin",)))
        self._figures: dict[str, torch.Tensor] = {}

    def forward(self, batch: Batch, num_items_in_batch: Items) -> torch.Tensor:
        """A scalar. A batch without targets gives a zero that still has a gradient."""
        states, labels, head, routed = self._states_labels_and_head(self._inputs(batch))
        answer_of, plain, found = answers_of(batch), cross_entropy(Extras()), []

        def factors_of(tokens: TokenFigures) -> torch.Tensor:
            with torch.enable_grad():
                leaf = tokens.log_probabilities.requires_grad_()
                loss = self.loss_of_tokens(tokens, batch, num_items_in_batch)
                found.append(loss.detach())
                return -torch.autograd.grad(loss, leaf)[0]

        def all_at_once(logits: torch.Tensor, labels: torch.Tensor, rows: slice) -> torch.Tensor:
            entropies, every = _entropies(logits, 0, len(labels))
            losses = plain(logits, labels, rows)
            factors = factors_of(TokenFigures(-losses, answer_of, entropies, every))
            logits.mul_(factors[:, None])
            return losses * factors

        def in_chunks(logits: torch.Tensor, labels: torch.Tensor, rows: slice) -> torch.Tensor:
            losses = plain(logits, labels, rows)
            logits.mul_(factors[rows, None])
            return losses * factors[rows]

        if len(labels) <= ALL_AT_ONCE * head.tokens_at_once:
            head = head._replace(tokens_at_once=max(1, len(labels)))
            weighed = summed_loss(states, labels, head, all_at_once)
        else:
            factors = factors_of(self._token_figures(batch, states.detach(), labels, head))
            weighed = summed_loss(states, labels, head, in_chunks)
        loss = found[0] if found else weighed.detach()
        # routers' part is a mean over this batch, weighted by its share of the step's answers
        share = self.examples_in(batch, answer_of) / num_items_in_batch.examples
        return loss + weighed - weighed.detach() + routed * share

    def examples_in(self, batch: Batch, answer_of: torch.Tensor) -> int:
        return _count(answer_of) // 2

    def loss_of_tokens(self, tokens: TokenFigures, batch: Batch, items: Items) -> torch.Tensor:
        """A function of `tokens.log_probabilities`: the share of this batch in the step's loss."""
        answers = self._answers(tokens, batch)
        losses = self.loss.of_examples(answers, self.divergence)
        self._add_figures(answers, tokens)
        total = losses.sum() / items.examples
        if self.loss.supervised_weight:
            chosen = answers.log_probabilities[answers.marks > 0].sum()
            total = total - self.loss.supervised_weight * chosen / items.chosen_tokens
        return total

    @torch.no_grad()
    def answer_log_probabilities(self, batch: Batch) -> torch.Tensor:
        """(A,), summed over the tokens of each answer."""
        states, labels, head, _ = self._states_labels_and_head(self._inputs(batch))
        tokens = self._token_figures(batch, states, labels, head)
        return _summed(tokens.log_probabilities, tokens.answer_of, _count(tokens.answer_of))

    @property
    def needs_divergence(self) -> bool:
        """Whether `divergence` has to be set before each step."""
        return self.loss.is_marked

    @torch.no_grad()
    def divergence_of(self, batch: Batch) -> torch.Tensor:
        """Sum and count, (2,) in fp64, of π − ρ over the unrelated answers of a batch."""
        if REFERENCE not in batch:  # a rank for which no row is left
            return torch.zeros(2, dtype=torch.float64, device=batch["labels"].device)
        states, labels, head, _ = self._states_labels_and_head(self._inputs(batch))
        answers = self._answers(self._token_figures(batch, states, labels, head), batch)
        return _sum_and_count(answers.ratios[answers.marks == 0])

    def take_figures(self) -> torch.Tensor:
        """Sums and counts since they were last taken, (figures, 2) in fp64, by `figure_names`."""
        none = torch.zeros(2, dtype=torch.float64, device=self.model.device)
        found = torch.stack([self._figures.get(name, none) for name in self.figure_names])
        self._figures = {}
        return found

    @staticmethod
    def _inputs(batch: Batch) -> Batch:
        """What the model reads, and labels."""
        return {name: tensor for name, tensor in batch.items() if name in OF_MODEL}

    def _answers(self, tokens: TokenFigures, batch: Batch) -> AnswerFigures:
        answer_of, log_probabilities = tokens.answer_of, tokens.log_probabilities
        count = _count(answer_of)
        marks = batch[MARKS_COLUMN]
        marks = marks[:, None].expand_as(batch["labels"]) if marks.ndim == 1 else marks
        of_tokens = marks[batch["labels"] != IGNORE_INDEX]
        of_answers = of_tokens.new_zeros(count).scatter(0, answer_of, of_tokens)
        reference = batch.get(REFERENCE)
        return AnswerFigures(
            _summed(log_probabilities, answer_of, count),
            torch.bincount(answer_of, minlength=count).to(log_probabilities.dtype),
            of_answers.to(log_probabilities.dtype),
            reference if reference is None else reference.to(log_probabilities.dtype),
        )

    def _token_figures(self, batch: Batch, states: torch.Tensor, labels: torch.Tensor, head) -> TokenFigures:
        log_probabilities, entropies = [], []
        with torch.no_grad():
            for rows in head.chunks(len(labels)):
                logits = head.logits_of(states[rows], head.weights)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                log_probabilities.append(logits.gather(1, labels[rows, None])[:, 0] - logits.logsumexp(-1))
                entropies.append(_entropies(logits, rows.start, len(labels))[0])
        none = states.new_zeros(0, dtype=torch.promote_types(states.dtype, torch.float32))
        found = torch.cat([*log_probabilities, none]), answers_of(batch), torch.cat([*entropies, none])
        return TokenFigures(*found, max(1, len(labels) // ENTROPIES))

    def _add_figures(self, answers: AnswerFigures, tokens: TokenFigures) -> None:
        for name, values in preference_figures(self.loss, answers, self.divergence).items():
            self._add(name, values)
        self._add("entropy", tokens.entropies)

    def _add(self, name: str, values: torch.Tensor) -> None:
        found = _sum_and_count(values)
        self._figures[name] = self._figures[name] + found if name in self._figures else found


def switch_off_dropout(model: PreTrainedModel | PeftModel) -> None:
    """Also of whole layers; an adapter's own dropout stays as it was asked for. The config is not changed."""
    for place, module in without_adapter(model).named_modules():
        if "lora_dropout" in place:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def answers_of(batch: Batch) -> torch.Tensor:
    """Which answer of the batch each target token is of, (N,): rows of labels, or decoder segments, counted on."""
    is_target = batch["labels"] != IGNORE_INDEX
    rows = torch.arange(len(is_target), device=is_target.device)[:, None].expand_as(is_target)
    if "decoder_segment_ids" not in batch:
        return rows[is_target]
    segments = batch["decoder_segment_ids"]
    before = segments.amax(dim=1).cumsum(0) - segments.amax(dim=1)
    return (before[:, None] + segments - 1)[is_target]


def _entropies(logits: torch.Tensor, start: int, tokens: int) -> tuple[torch.Tensor, int]:
    """Of every n-th of the batch's tokens, and n. `logits` (tokens, V) are of those from `start` on."""
    every = max(1, tokens // ENTROPIES)
    some = log_softmax(logits[-start % every :: every], dim=-1)
    return -(some.exp() * some).nan_to_num(0.0).sum(-1), every  # a logit may be -inf


def _sum_and_count(values: torch.Tensor) -> torch.Tensor:
    values = values.detach().double()
    return torch.stack((values.sum(), values.new_tensor(len(values))))


def _count(answer_of: torch.Tensor) -> int:
    return int(answer_of.max()) + 1 if len(answer_of) else 0


def _summed(values: torch.Tensor, answer_of: torch.Tensor, count: int) -> torch.Tensor:
    return values.new_zeros(count).index_add(0, answer_of, values)
