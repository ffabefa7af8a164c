"""What went through a model during a call: rows, and the size of the tensors that were made."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def rows_run(model, run):
    """Rows that went through ``model`` during ``run()``: with a gradient, without."""
    rows = {True: 0, False: 0}

    def count(module, inputs, named):
        given = [named.get("inputs_embeds"), named.get("input_ids"), *inputs]
        batch = next(each for each in given if each is not None)
        rows[torch.is_grad_enabled() and batch.requires_grad] += len(batch)

    # what has layers, without its output layer: some methods run only that
    inner = getattr(model, "base_model", model)
    handle = inner.register_forward_pre_hook(count, with_kwargs=True)
    try:
        result = run()
    finally:
        handle.remove()
    return result, rows[True], rows[False]


def backward_passes(module, run):
    """``run()``, and how often a gradient went back through ``module`` on the way."""
    passes = []
    handle = module.register_full_backward_pre_hook(lambda module, grads: passes.append(1))
    try:
        return run(), len(passes)
    finally:
        handle.remove()


@contextlib.contextmanager
def tensor_sizes():
    """The number of elements of every tensor that is made inside, as a list that grows."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(out) if torch.is_tensor(t))
            return out

    with Watch():
        yield sizes
