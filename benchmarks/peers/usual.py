"""The usual attribution code, made to run and otherwise as written.

What had to change: the model, the tokenizer and the inputs are handed in instead of being globals,
the gradient is taken of a leaf, and the integrated gradients are returned before their norm, so
that they can be compared with others.
"""

import torch
from captum.attr import IntegratedGradients


def gradient_based_attribution(model, input_ids, target_token_idx=-1):
    embeddings = model.get_input_embeddings()
    token_embeddings = embeddings(input_ids).detach()
    token_embeddings.requires_grad_(True)
    outputs = model(inputs_embeds=token_embeddings)
    logits = outputs.logits
    target_logits = logits[0, target_token_idx]
    predicted_token_id = target_logits.argmax(dim=-1)
    target_score = target_logits[predicted_token_id]
    target_score.backward()
    gradients = token_embeddings.grad
    return gradients.norm(dim=-1).squeeze().cpu().detach(), predicted_token_id.item()


def compute_integrated_gradients(model, tokenizer, input_ids, baseline_type, n_steps):
    def model_forward(embeddings, attention_mask=None):
        outputs = model(inputs_embeds=embeddings, attention_mask=attention_mask)
        return outputs.logits[:, -1, :]

    embeddings_layer = model.get_input_embeddings()
    input_embeddings = embeddings_layer(input_ids)
    if baseline_type == "zero":
        baseline_embeddings = torch.zeros_like(input_embeddings)
    else:
        baseline_ids = torch.full_like(input_ids, tokenizer.pad_token_id)
        baseline_embeddings = embeddings_layer(baseline_ids)
    with torch.no_grad():
        outputs = model(input_ids)
        predicted_token_id = outputs.logits[0, -1].argmax().item()
    ig = IntegratedGradients(model_forward)
    attributions = ig.attribute(
        inputs=input_embeddings,
        baselines=baseline_embeddings,
        target=predicted_token_id,
        n_steps=n_steps,
        internal_batch_size=1,
    )
    return attributions.detach(), predicted_token_id
