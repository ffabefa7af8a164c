"""A process that has imported everything, and forks one that holds a model and forks kernels.

Started by ``llama_reports.kernels``, which speaks with both over one pipe: a message names a model,
each later one asks for a kernel, until ``None`` makes place for another model; each but ``None`` is
answered. A kernel is a copy of the process that holds its model as it was before any run, so
nothing of one run is left for the next: no variable, seed, setting, imported or patched module,
changed weight or leaked memory. Pages that a kernel does not write to, such as the weights, are
shared. The imports, which take longer than a small model, are done once for all models.

Two rules make forking safe. These processes never run an operation on several threads, since the
thread pool of OpenMP does not survive a fork; and they never touch a GPU, since CUDA does not.
"""

import contextlib
import gc
import os
import random
import select
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

START = 60  # seconds for a kernel to be ready, as Jupyter waits


def serve(channel: Connection) -> None:
    """Get ready, say so, and hold one model after another until the other end is closed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.disable()  # it looks through all that is imported again and again: a fifth of their time
    _import_all()
    channel.send("ready")
    while asked := _received(channel):
        holder = os.fork()
        if holder == 0:
            _hold(channel, threads, *asked)
        ended = os.waitstatus_to_exitcode(os.waitpid(holder, 0)[1])
        if ended < 0:  # by a signal, which ends this process, too: the other end is to know of it
            os.kill(os.getpid(), -ended)
        if ended:
            sys.exit(ended)


def _received(channel):
    """The next message, or ``None``, as where the other end is closed."""
    try:
        return channel.recv()
    except EOFError:
        return None


def _hold(channel, threads, model, dtype):
    """Turn this fork into one that loads a model, says so, and forks kernels."""
    from helpers.errors import InputError
    from helpers.models import hold_model

    status = 1
    try:
        if model is not None:
            with contextlib.suppress(InputError):  # the run that needs the model will say why
                hold_model(model, dtype=dtype)
        gc.freeze()
        channel.send("ready")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # dead kernels are reaped by the system
        _fork_kernels(channel, threads)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _fork_kernels(channel, threads):
    while request := _received(channel):
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


def _import_all():
    """Import what notebooks import."""
    import captum.attr  # noqa: F401
    import IPython.core.completer  # noqa: F401
    import matplotlib_inline.backend_inline  # noqa: F401
    import pandas  # noqa: F401
    from ipykernel import debugger, kernelapp  # noqa: F401

    from helpers import (  # noqa: F401
        attribution,
        faithfulness,
        ground_truth,
        patching,
        plots,
        provenance,
        summary,
    )


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
        gc.enable()
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
    serve(Connection(int(sys.argv[1])))
