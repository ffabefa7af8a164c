"""A papermill engine whose kernels start warm: imports done, model loaded (``kernels``).

Registered for papermill as ``warm`` (``papermill --engine warm``, ``engine_name="warm"``). Every
run gets a kernel of its own, which ends with the run. Where forking is not safe (anything but
Linux) the kernel starts from scratch, as with papermill's own engine.
"""

import ast
import contextlib
import sys
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from papermill.engines import NBClientEngine
from papermill.translators import papermill_translators
from papermill.utils import find_first_tagged_cell_index

from llama_reports.kernels import CAN_FORK, Forking, PromptClient, server_for


class ForkingManager(Forking, AsyncKernelManager):
    client_factory = PromptClient


class WarmEngine(NBClientEngine):
    """Papermill's own engine, with kernels that are forked from one process that is ready.

    That process is started by the first run and kept for the next one that asks for the same
    model: what the notebook's parameters call ``model_name`` and ``dtype``. There is at most one,
    and it ends with the process that uses the engine.
    """

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> None:
        save, peaks = nb_man.save, list[int]()
        nb_man.save = lambda **kwargs: None  # twice a cell is dear; papermill saves at the end
        try:
            if CAN_FORK and _runs_this_python(kernel_name):
                server = server_for(*_model_of(nb_man.nb, kernel_name))
                manager = type("Manager", (ForkingManager,), {"server": server, "peaks": peaks})
                # nothing in a kernel needs saying goodbye to: it ends with all it holds
                kwargs |= {"kernel_manager_class": manager, "shutdown_kernel": "immediate"}
            super().execute_managed_notebook(nb_man, kernel_name, **kwargs)
        finally:
            nb_man.save = save
            if any(peaks):
                nb_man.nb.metadata.papermill["peak_memory"] = max(peaks)


def _runs_this_python(kernel_name):
    """Whether a kernel of that name is an IPython kernel of this very environment."""
    command = AsyncKernelManager(kernel_name=kernel_name).format_kernel_cmd()
    return command[0] == sys.executable and "ipykernel_launcher" in command


def _model_of(notebook, kernel_name):
    """``(model_name, dtype)`` among the parameters that ``notebook`` will run with."""
    place = find_first_tagged_cell_index(notebook, "parameters")
    given = notebook.metadata.get("papermill", {}).get("parameters", {})
    found = {}
    if place >= 0:
        translator = papermill_translators.find_translator(kernel_name, "python")
        for parameter in translator.inspect(notebook.cells[place]):
            with contextlib.suppress(ValueError, SyntaxError):  # not a literal
                found[parameter.name] = ast.literal_eval(parameter.default)
    found |= given
    return found.get("model_name"), found.get("dtype", "float32")
