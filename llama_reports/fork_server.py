"""A process that has imported everything and loaded the model, and forks a kernel for every run.

Started by ``llama_reports.kernels``, which speaks with it over a pipe: one message asks for a
kernel, one message answers with its process number. A kernel is a copy of this process as it was
before any run, so nothing of one run is left for the next: no variable, seed, setting, imported or
patched module, changed weight or leaked memory. Pages that a kernel does not write to, such as the
weights, are shared.

Two rules make forking safe. This process never runs an operation on several threads, since the
thread pool of OpenMP does not survive a fork; and it never touches a GPU, since CUDA does not.
"""

import contextlib
import os
import random
import select
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

START = 60  # seconds for a kernel to be ready, as Jupyter waits


def serve(channel: Connection, model: str | None, dtype: str) -> None:
    """Get ready, say so, and fork kernels until the other end of ``channel`` is closed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _get_ready(model, dtype)
    channel.send("ready")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead kernels are reaped by the system
    while True:
        try:
            request = channel.recv()
        except EOFError:
            return
        listening, tell = os.pipe()
        kernel = os.fork()
        if kernel == 0:
            channel.close()
            os.close(listening)
            _become_kernel(**request, threads=threads, tell=tell)
        os.close(tell)
        # a client that came before the kernel listens would try again later
        select.select([listening], [], [], START)
        os.close(listening)
        channel.send(kernel)


def _get_ready(model, dtype):
    """Import what notebooks import, and load the model.

    A model that cannot be loaded is left to the run that needs it, which will say why.
    """
    import captum.attr  # noqa: F401
    import IPython.core.completer  # noqa: F401
    import matplotlib_inline.backend_inline  # noqa: F401
    import pandas  # noqa: F401
    from ipykernel import debugger, kernelapp  # noqa: F401

    from helpers import (  # noqa: F401  # noqa: F401
        attribution,
        faithfulness,
        ground_truth,
        patching,
        plots,
        provenance,
        summary,
    )
    from helpers.errors import InputError
    from helpers.models import hold_model

    if model is not None:
        with contextlib.suppress(InputError):
            hold_model(model, dtype=dtype)


def _become_kernel(connection_file, cwd, environment, threads, tell):
    """Turn this fork into an IPython kernel, and end the process when the kernel ends."""
    from ipykernel.kernelapp import IPKernelApp

    status = 1
    try:
        os.setsid()  # so that the kernel and what it starts can be stopped together
        # if memory runs out, the system ends this run rather than all that come after it
        Path("/proc/self/oom_score_adj").write_text("500")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment, JPY_PARENT_PID=str(os.getppid()))
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or threads))
        for draw_seed in (random.seed, np.random.seed, torch.seed):  # as in a new process
            draw_seed()
        sys.argv = ["ipykernel_launcher", "-f", connection_file]
        app = IPKernelApp.instance(parent_handle=os.getppid())
        app.initialize(sys.argv[1:])
        os.close(tell)
        app.start()
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    descriptor, model, dtype = sys.argv[1:]
    serve(Connection(int(descriptor)), model or None, dtype)
