"""nbval runs notebooks in warm kernels, as reports do: forked with imports done, the model loaded.

Each notebook still has a kernel of its own. Where kernels cannot be forked they start from scratch.
"""

import nbval.kernel
from jupyter_client.manager import KernelManager


class WarmManager(KernelManager):
    def __init__(self, **kwargs):
        import papermill  # noqa: F401, which imports the engine itself

        from helpers.models import BUNDLED  # and torch, which is not needed where no notebook runs
        from llama_reports.warm import CAN_FORK, ForkProvisioner, WarmEngine

        super().__init__(**kwargs)
        if CAN_FORK:
            self.server, self.peaks = WarmEngine._server_for(BUNDLED, "float32"), []
            self.provisioner = ForkProvisioner(parent=self, kernel_spec=self.kernel_spec)


def pytest_configure():
    nbval.kernel.KernelManager = WarmManager
