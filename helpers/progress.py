"""A bar for what takes longer than two seconds, where somebody is there to see it.

That is a terminal, or a notebook whose front end would let its user answer a question
(``allow_stdin``), as JupyterLab does. papermill, nbval and nbconvert would not, so no bar is ever
stored in what they run. Nor has a process that another one started a bar. A bar that has come to
its end is wiped out.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing import parent_process
from typing import Any

from tqdm import tqdm

DELAY = 2.0  # seconds before a bar is shown
_open: ContextVar[Any] = ContextVar("open", default=None)


def bar(what: str, over: Iterable | None = None, **options: Any) -> tqdm:
    """A bar ``over`` what is iterated, or of a ``total``; ``options`` are those of ``tqdm``."""
    return tqdm(over, what, delay=DELAY, leave=False, disable=not _watched(), **options)


@contextmanager
def progress(what: str, rows: float = 0) -> Iterator[None]:
    """Show how many of about so many rows the model has run, as ``advance`` says, while inside.

    Inside of another one its rows are added to those of that one, which stays the only bar. Never
    hand out anything by ``yield`` inside: what a caller runs then would be counted.
    """
    outer = _open.get()
    if outer is not None:
        outer.total += round(rows)
        yield
        return
    with bar(what, total=round(rows), unit="row") as shown:
        token = _open.set(shown)
        try:
            yield
        finally:
            _open.reset(token)


def advance(rows: int) -> None:
    """Tell the bar that is shown, if one is, of rows that are done."""
    shown = _open.get()
    if shown is not None:
        shown.update(rows)


def _watched():
    if parent_process() is not None:  # of several at work, who share a terminal
        return False
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(shell, "kernel"):
        return False
    return bool(shell.kernel.get_parent("shell").get("content", {}).get("allow_stdin"))
