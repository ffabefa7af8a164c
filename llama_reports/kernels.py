"""Kernels that start warm, imports done and a model loaded: forked from a process that is ready.

Each kernel is a process of its own, and ends as any other. It costs some tenths of a second where a
kernel from scratch costs seconds, and gives the isolation that resetting a used kernel cannot.
Forking is safe on Linux only (``CAN_FORK``).
"""

import asyncio
import atexit
import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import Pipe
from pathlib import Path
from queue import Empty
from typing import Any

from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.provisioning import LocalProvisioner

INLINE = "module://matplotlib_inline.backend_inline"
LAST_SAID = 4096  # bytes of a fork server's errors that are looked at
CAN_FORK = sys.platform == "linux"


class ForkServer:
    """The process that forks kernels; see ``llama_reports.fork_server``.

    It ends when ``close`` is called or this process ends, however that comes about. Raises
    ``ConnectionError``, with the reason, where it has died.
    """

    def __init__(self) -> None:
        self.holds: tuple[str | None, str] | None = None
        self.channel, theirs = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by close()
        with theirs:
            # -P: a file in the current folder must not stand in for a module
            command = [sys.executable, "-P", "-m", "llama_reports.fork_server"]
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # as a kernel has it before matplotlib is imported; and no threads to lose in a fork
                env=os.environ | {"MPLBACKEND": INLINE, "TOKENIZERS_PARALLELISM": "false"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for the caller to deal with
            )
        self._read()

    def hold(self, model: str | None, dtype: str) -> None:
        """Have the kernels to come find ``model`` loaded. Ends those that found another."""
        if self.holds == (model, dtype):
            return
        if self.holds is not None:
            self._send(None)
        self._send((model, dtype))
        self._read()
        self.holds = model, dtype

    def fork(self, connection_file: str, cwd: str, environment: dict[str, str]) -> "Forked":
        """A new kernel's process."""
        self._send({"connection_file": connection_file, "cwd": cwd, "environment": environment})
        return Forked(self._read())

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with what it forked, but for kernels
        self.process.wait()
        self._errors.close()

    def _send(self, message):
        try:
            self.channel.send(message)
        except OSError:
            raise self._died() from None

    def _read(self):
        try:
            return self.channel.recv()
        except (EOFError, OSError):
            raise self._died() from None

    def _died(self):
        """The error that it has died, with the last that it said, or the signal that ended it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - LAST_SAID))
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        why = said[-1].strip() if said else f"exit status {self.process.returncode}"
        if (self.process.returncode or 0) < 0:
            why = signal.Signals(-self.process.returncode).name
        return ConnectionError(f"the process that starts kernels has died: {why}")


class Forked:
    """A kernel's process as Jupyter sees it: the part of ``subprocess.Popen`` that it uses.

    The process is not our child, so it is watched through a pidfd, which cannot come to mean
    another process.
    """

    stdin = stdout = stderr = None

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.returncode = -1

    def poll(self) -> int | None:
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> int | None:
        if self.returncode is None and select.select([self._pidfd], [], [], timeout)[0]:
            os.close(self._pidfd)
            self.returncode = -1  # how it ended is known to the fork server only
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class ForkProvisioner(LocalProvisioner):
    """Jupyter's local kernel, forked instead of started."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        self.cwd = str(kwargs.get("cwd") or Path.cwd())
        environment = dict(kwargs.get("env") or os.environ)
        manager: Any = self.parent
        self.process = manager.server.fork(manager.connection_file, self.cwd, environment)
        self.pid = self.pgid = self.process.pid
        return self.connection_info

    async def kill(self, restart: bool = False) -> None:
        """Kill the kernel, what it started, and see it gone: Jupyter looks only every 0.1 s."""
        manager: Any = self.parent
        if self.process is not None and self.process.poll() is None:
            manager.peaks.append(_peak_memory(self.process.pid))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        await super().kill(restart)
        if self.process is not None:
            await asyncio.to_thread(self.process.wait, 5)


def _peak_memory(pid):
    """The most memory that a process had, in bytes; 0 if the system does not say."""
    with contextlib.suppress(OSError, ValueError):
        told = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        return 1024 * int(told.partition("VmHWM:")[2].split(maxsplit=1)[0])
    return 0


class PromptClient(AsyncKernelClient):
    """Jupyter's client, ready 0.2 s sooner: it reads the greeting, where that waits for silence."""

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or float("inf"))
        while not await self._greeted(self.kernel_info()):
            if not await self.is_alive():
                raise RuntimeError("The kernel died before it was ready.")
            if time.monotonic() > deadline:
                raise RuntimeError(f"The kernel was not ready within {timeout} seconds.")

    async def _greeted(self, request):
        """Whether both channels brought what answers ``request``, so that no output can be lost."""
        try:
            while True:
                message = await self.get_iopub_msg(timeout=1)
                state = message["content"].get("execution_state")
                if message["parent_header"].get("msg_id") == request and state == "idle":
                    break
            await self.get_shell_msg(timeout=1)
        except Empty:
            return False
        return True


class Forking:
    """What makes a manager of Jupyter fork its kernels: goes before one of its classes.

    A subclass says from which ``server``; the most bytes that each had are added to its ``peaks``.
    """

    server: ForkServer
    peaks: list[int]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        manager: Any = self
        manager.provisioner = ForkProvisioner(parent=self, kernel_spec=manager.kernel_spec)


_lock = threading.Lock()
_server: ForkServer | None = None


def server_for(model: str | None, dtype: str) -> ForkServer:
    """The process that forks kernels which hold ``model``; started at the first call.

    There is one at most, which holds one model. It ends with the process that asked. Raises
    ``ConnectionError``, with the reason, if it does not start.
    """
    global _server
    with _lock:
        if _server is not None and not _server.alive():
            close()
        if _server is None:
            _server = ForkServer()
            atexit.register(_server.close)
        try:
            _server.hold(model, dtype)
        except BaseException:
            close()  # an answer may be on its way that nobody waits for
            raise
        return _server


def close() -> None:
    """End the process that kernels are forked from; the next call of ``server_for`` starts one."""
    global _server
    if _server is not None:
        atexit.unregister(_server.close)
        _server.close()
        _server = None
