"""What a question asks for, written out from the model's own logits: nothing of the engine is used.

Explained are columns: the embeddings of what was read, [rows, columns, dim], and without a foil
those of the answer's own tokens before its last.
"""

import torch


def columns(model, question):
    """The embeddings that are explained, [1, columns, dim]."""
    ids = question.input_ids
    if question.foil is None:
        ids = torch.cat([ids, torch.tensor([question.target[:-1]], dtype=ids.dtype)], dim=1)
    return model.get_input_embeddings()(ids).detach()


def each_value(model, question, embeds, normalised=None):
    """[rows, outputs]: one number for each token of the target and, negated, of the foil."""
    if normalised is None:
        normalised = question.objective == "log_probability"
    seq, table = question.input_ids.shape[1], model.get_input_embeddings()

    def branch(ids):
        behind = table(torch.tensor(ids[:-1], dtype=torch.long)).expand(len(embeds), -1, -1)
        rows = embeds if question.foil is None else torch.cat([embeds[:, :seq], behind], dim=1)
        logits = model(inputs_embeds=rows, use_cache=False).logits[:, seq - 1 :].float()
        logits = logits.log_softmax(dim=-1) if normalised else logits
        return logits.gather(2, torch.tensor(ids).expand(len(rows), -1)[..., None])[..., 0]

    found = branch(question.target)
    return found if question.foil is None else torch.cat([found, -branch(question.foil)], dim=1)


def value(model, question, embeds=None):
    """[rows]: log p(target | prompt) - log p(foil | prompt), or the same of raw logits."""
    embeds = columns(model, question) if embeds is None else embeds
    return each_value(model, question, embeds).sum(dim=1)


def gradient(model, question, embeds=None):
    """The gradient of ``value`` with respect to the columns, of their shape."""
    embeds = columns(model, question) if embeds is None else embeds
    embeds = embeds.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(value(model, question, embeds).sum(), embeds)
    return grad


def per_unit(scores, question):
    """Scores [columns] added up inside each unit: [units]."""
    return torch.stack([scores[list(unit.positions)].sum() for unit in question.units])


def blank(model, question, replacement):
    """What stands in for an erased column, [columns, dim]."""
    embeds, table = columns(model, question)[0], model.get_input_embeddings().weight
    if replacement == "zero":
        return torch.zeros_like(embeds)
    if replacement == "mean":
        every = torch.arange(len(table))  # as the layer gives them, which may scale them
        return model.get_input_embeddings()(every).float().mean(dim=0).expand_as(embeds)
    if replacement == "eos":
        return table[model.config.eos_token_id].expand_as(embeds)
    found = embeds.clone()  # the neighbour before a unit, and after the first one
    for unit in question.units:
        first, last = unit.positions[0], unit.positions[-1]
        there = first - 1 if first else (last + 1 if last + 1 < len(embeds) else 0)
        found[list(unit.positions)] = embeds[there]
    return found


def falls(model, question, replacement):
    """How far the value falls without each unit: [units]."""
    whole = value(model, question).item()
    units = range(len(question.units))
    return torch.tensor([whole - without(model, question, [unit], replacement) for unit in units])


def without(model, question, gone, replacement):
    """The value with some units erased, a float; ``remove`` asks the shortened text anew."""
    positions = [position for unit in gone for position in question.units[unit].positions]
    if replacement != "remove":
        embeds = columns(model, question)
        embeds[0, positions] = blank(model, question, replacement)[positions]
        return value(model, question, embeds).item()
    ids, seq = question.input_ids[0].tolist(), question.input_ids.shape[1]
    prompt = [token for position, token in enumerate(ids) if position not in positions]
    prompt = prompt or [model.config.eos_token_id]  # an empty text

    def read(tokens, target):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
        logits = logits.log_softmax(-1) if question.objective == "log_probability" else logits
        return logits[target].item()

    def branch(tokens):
        total = 0.0
        for place, token in enumerate(tokens):
            before = [t for i, t in enumerate(tokens[:place]) if seq + i not in positions]
            total += read(prompt + before, token)
        return total

    return branch(question.target) - (branch(question.foil) if question.foil else 0.0)
