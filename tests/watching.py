"""What went through a model during a call: rows, and the size of the tensors that were made."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def rows_run(model, run):
    """Rows that went through ``model`` during ``run()``: with a gradient, without."""
    rows = {True: 0, False: 0}

    def count(module, inputs, named):
        batch = named.get("inputs_embeds", inputs[0] if inputs else named.get("input_ids"))
        rows[torch.is_grad_enabled() and batch.requires_grad] += len(batch)

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        result = run()
    finally:
        handle.remove()
    return result, rows[True], rows[False]


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
