"""A causal language model whose right attribution is known, because it is linear by hand.

The logit of token v after position t is ``bias[v] + sum over s <= t of weight[s, v] . e_s``, with
``e_s`` the embedding at position s. A token's share of a logit is therefore exactly
``weight[s, v] . e_s``: what every signed method has to find when the baseline is zero. The
embedding table has mean zero, so the mean baseline is the zero baseline.

All numbers are multiples of 1/8, so sums of them are exact in float32.
"""

from types import SimpleNamespace

import torch
from torch import nn

CONTEXT = 32
DIM = 8


class LinearCausalModel(nn.Module):
    """Called as a transformers model is, with either ``input_ids`` or ``inputs_embeds``."""

    def __init__(self, tokenizer, seed=0):
        super().__init__()
        vocab = len(tokenizer)
        generator = torch.Generator().manual_seed(seed)
        half = _eighths((vocab // 2, DIM), generator)
        odd_one = torch.zeros(vocab % 2, DIM)
        self.embed = nn.Embedding.from_pretrained(torch.cat([half, odd_one, -half]))
        self.weight = nn.Parameter(_eighths((CONTEXT, vocab, DIM), generator), False)
        self.bias = nn.Parameter(_eighths((vocab,), generator), False)
        self.config = SimpleNamespace(
            eos_token_id=tokenizer.eos_token_id, max_position_embeddings=CONTEXT
        )

    def get_input_embeddings(self):
        return self.embed

    def forward(
        self, input_ids=None, inputs_embeds=None, use_cache=None, logits_to_keep=0, **ignored
    ):
        embeds = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        weight = self.weight[: embeds.shape[1]]
        shares = torch.einsum("rsd,svd->rsv", embeds, weight)  # [rows, seq, vocab]
        logits = self.bias + shares.cumsum(dim=1)
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    def known_gradients(self, question):
        """The gradient of each output's raw logit, [outputs, columns, dim]: the same everywhere.

        Output i is the logit of target token i, read behind those before it; with a foil, which is
        one token as the target then is, less the foil's.
        """
        seq, target = question.input_ids.shape[1], question.target
        rows = torch.zeros(len(target), seq + len(target) - 1, DIM)
        for i, token in enumerate(target):
            rows[i, : seq + i] = self.weight[: seq + i, token]
            if question.foil is not None:
                rows[i, : seq + i] -= self.weight[: seq + i, question.foil[0]]
        return rows

    def known_rows(self, question):
        """Each column's exact share of each output's raw logit, [outputs, columns]."""
        read = torch.cat([question.input_ids[0], torch.tensor(question.target[:-1]).long()])
        return (self.known_gradients(question) * self.embed(read)).sum(dim=-1)

    def known_gradient(self, question):
        """The gradient of the sum of the outputs, [columns, dim]."""
        return self.known_gradients(question).sum(dim=0)

    def known_scores(self, question):
        """Each column's exact share of the sum of the outputs, [columns]."""
        return self.known_rows(question).sum(dim=0)


def _eighths(shape, generator):
    return torch.randint(-8, 9, shape, generator=generator) / 8
