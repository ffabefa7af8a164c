"""nbval runs notebooks in warm kernels, as reports do: forked with imports done, the model loaded.

Each notebook still has a kernel of its own. Where kernels cannot be forked they start from scratch.
"""

import nbval.kernel
from jupyter_client.manager import KernelManager

from helpers import BUNDLED
from llama_reports.kernels import CAN_FORK, Forking, server_for


class WarmManager(Forking, KernelManager):
    def __init__(self, **kwargs):
        self.server, self.peaks = server_for(BUNDLED, "float32"), []
        super().__init__(**kwargs)


def pytest_configure():
    if CAN_FORK:
        nbval.kernel.KernelManager = WarmManager
