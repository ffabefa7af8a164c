"""The warm engine: the same numbers, and nothing of one run in the next."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from nbclient.exceptions import DeadKernelError
from running import PATIENCE, wait_for, write_notebook

from llama_reports import kernels
from llama_reports.kernels import CAN_FORK, ForkServer, server_for

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="kernels are forked on Linux only")


@pytest.fixture(scope="module", autouse=True)
def no_server_left():
    yield
    kernels.close()


def notebook(folder, *cells, parameters=""):
    return write_notebook(folder / "in.ipynb", parameters, *cells)


def run(path, engine="warm", **parameters):
    """What the notebook printed."""
    done = papermill.execute_notebook(
        str(path),
        str(path.with_name("out.ipynb")),
        parameters=parameters,
        engine_name=engine,
        kernel_name="python3",
        cwd=str(path.parent),
        progress_bar=False,
    )
    return printed(done)


def printed(nodes):
    outputs = [o for c in nodes.cells if c.cell_type == "code" for o in c.outputs]
    return "".join(o.text for o in outputs if o.get("name") == "stdout")


# Everything that a used kernel would hand on, and a word for the state of each.
STATE = """
import os, sys, random, warnings, locale
import numpy, torch, matplotlib, helpers, helpers.models, transformers
import matplotlib.pyplot as plt
print("variable", "left_behind" in globals())
print("module", "this" in sys.modules)
print("patched", torch.nn.functional.softmax.__name__, helpers.models.public_name("x"))
print("rcParams", matplotlib.rcParams["font.size"], matplotlib.get_backend(), plt.get_fignums())
print("torch settings", torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
print("path", "/nowhere" in sys.path, os.path.basename(os.getcwd()) == "elsewhere")
print("environment", os.environ.get("LEFT_BEHIND"), os.environ.get("MPLBACKEND"))
print("warnings", any(f[0] == "ignore" and f[2] is UserWarning for f in warnings.filters))
print("threads", transformers.logging.get_verbosity())
"""
SPOIL = """
import this
import os, sys, random, warnings, numpy, torch, matplotlib, helpers.models, transformers
import matplotlib.pyplot as plt
left_behind = 1
torch.nn.functional.softmax = print
helpers.models.public_name = lambda name: "spoilt"
matplotlib.rcParams["font.size"] = 99
plt.figure()
torch.manual_seed(1); numpy.random.seed(1); random.seed(1)
torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.set_num_threads(3)
sys.path.append("/nowhere"); os.makedirs("elsewhere", exist_ok=True); os.chdir("elsewhere")
os.environ["LEFT_BEHIND"] = "yes"
warnings.simplefilter("ignore", UserWarning)
transformers.logging.set_verbosity_debug()
"""


def test_a_run_finds_nothing_of_the_one_before_and_what_a_fresh_kernel_finds(tmp_path):
    first = run(notebook(tmp_path, STATE))
    run(notebook(tmp_path, SPOIL, STATE))
    assert run(notebook(tmp_path, STATE)) == first
    assert run(notebook(tmp_path, STATE), engine=None) == first
    for draw in ("numpy.random.rand()", "random.random()", "torch.rand(1)"):
        path = notebook(tmp_path, f"import numpy, random, torch; print({draw})")
        assert run(path) != run(path), f"{draw} started from the same seed twice"


MODEL = """
from helpers import ask, attribute, load_model
model, tokenizer = load_model(model_name, dtype=dtype)
question = ask(model, tokenizer, "The keys to")
print(attribute(model, question, "relevance").scores.tolist())
print(attribute(model, question, "integrated_gradients", max_evaluations=33).scores.tolist())
"""
BREAK = """
import torch
model, tokenizer = load_model(model_name, dtype=dtype)
with torch.no_grad():
    for weight in model.parameters():
        weight.zero_()
model.register_forward_hook(lambda *args: 1 / 0)
tokenizer.padding_side = "right"
"""


@pytest.mark.thorough
def test_same_numbers_as_plain_papermill_whatever_was_done_to_the_model_before(
    tmp_path, tiny_folder, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = f"model_name = {str(tiny_folder)!r}\ndtype = 'float32'"
    plain = run(notebook(tmp_path, MODEL, parameters=given), engine=None)
    assert run(notebook(tmp_path, MODEL, parameters=given)) == plain
    run(notebook(tmp_path, "from helpers import load_model", BREAK, BREAK, parameters=given))
    assert run(notebook(tmp_path, MODEL, parameters=given)) == plain


def test_the_model_is_loaded_once_and_two_of_it_share_no_weights(tmp_path, tiny_folder):
    cell = """
from helpers import load_model, models
held = list(models._HELD)
one, two = (load_model(model_name)[0] for _ in range(2))
print(len(held), one.lm_head.weight.data_ptr() == two.lm_head.weight.data_ptr())
"""
    path = notebook(tmp_path, cell, parameters=f"model_name = {str(tiny_folder)!r}")
    assert run(path) == run(path) == "1 False\n"
    assert run(path, engine=None) == "0 False\n"
    server = server_for(str(tiny_folder), "float32")
    assert run(path, model_name=str(tiny_folder)) == "1 False\n"
    assert server_for(str(tiny_folder), "float32") is server


def test_threads_work_in_a_fork(tmp_path, monkeypatch):
    """OpenMP's threads do not survive a fork: a server that had started them would hang here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    cell = (
        "import torch; a = torch.rand(800, 800); print(torch.get_num_threads(), (a @ a).shape[0])"
    )
    assert run(notebook(tmp_path, cell)) == "2 800\n"


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGSEGV)"])
def test_a_kernel_that_dies_takes_nothing_with_it(tmp_path, end):
    run(notebook(tmp_path, "1"))
    server = server_for(None, "float32")
    with pytest.raises(DeadKernelError):
        run(notebook(tmp_path, f"import os, signal; print('before')\n{end}"))
    # what was reached is saved
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].metadata.papermill
    assert run(notebook(tmp_path, "print('alive')")) == "alive\n"
    assert server_for(None, "float32") is server and server.alive()


@pytest.mark.thorough
@pytest.mark.parametrize("which", ["the one that imports", "the one that holds a model"])
def test_a_server_that_dies_is_replaced(tmp_path, which):
    run(notebook(tmp_path, "1"))
    dead = server_for(None, "float32")
    first = psutil.Process(dead.process.pid)
    (first if which == "the one that imports" else first.children()[0]).kill()
    dead.process.wait()
    assert run(notebook(tmp_path, "print('alive')")) == "alive\n"
    assert kernels._server is not dead  # asked for by name, a dead one would be replaced here


def test_another_model_is_held_without_importing_again(tmp_path, tiny_folder):
    cell = "from helpers import models; print(*models._HELD)"
    path, server = notebook(tmp_path, cell), server_for(None, "float32")
    assert run(path) == "\n"
    path = notebook(tmp_path, cell, parameters=f"model_name = {str(tiny_folder)!r}")
    assert run(path) == f"({str(tiny_folder)!r}, 'float32')\n"
    assert run(notebook(tmp_path, cell)) == "\n"
    assert server_for(None, "float32") is server and server.alive()
    assert len(psutil.Process(server.process.pid).children()) == 1


@pytest.mark.thorough
def test_a_server_that_fails_says_why(tmp_path, monkeypatch):
    broken = tmp_path / "captum"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('captum was built for another torch')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    why = "the process that starts kernels has died: ImportError: captum was built for another"
    with pytest.raises(ConnectionError, match=why):
        ForkServer()
    monkeypatch.undo()
    server = ForkServer()
    server.process.kill()
    server.process.wait()
    for _ in range(2):
        with pytest.raises(ConnectionError, match=r"has died: SIGKILL$"):
            server.fork(str(tmp_path / "connection.json"), str(tmp_path), dict(os.environ))
    server.close()


def test_a_leak_ends_with_its_run(tmp_path):
    leak = "import builtins; builtins.leak = bytearray(b'x' * 300_000_000); import helpers.models\n"
    run(notebook(tmp_path, "1"))
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    before = sum(p.memory_info().rss for p in family)
    for _ in range(3):
        run(notebook(tmp_path, leak + "helpers.models.leak = leak"))
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert sum(p.memory_info().rss for p in family) - before < 150_000_000


@pytest.mark.thorough
def test_no_kernel_and_no_server_outlives_a_killed_caller(tmp_path):
    path = notebook(tmp_path, f"import time; open('started', 'w').close(); time.sleep({PATIENCE})")
    code = f"import sys; sys.path[:] = {sys.path!r}\n"
    code += f"from pathlib import Path; from test_warm import run; run(Path({str(path)!r}))"
    caller = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "started").exists, caller)
    family = psutil.Process(caller.pid).children(recursive=True)
    assert len(family) == 3  # the server, the one that holds a model, and the kernel
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE / 2)  # the kernel sleeps longer
    assert not alive


@pytest.mark.thorough
def test_a_file_in_the_current_folder_stands_in_for_no_module(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('taken')")
    (tmp_path / "json.py").write_text("raise SystemExit('taken')")
    monkeypatch.chdir(tmp_path)
    server = ForkServer()
    server.hold(None, "float32")
    assert server.alive()
    server.close()


@pytest.mark.thorough
def test_papermill_knows_it_by_name(tmp_path):
    path = notebook(tmp_path, "print(value + 1)", parameters="value = 1")
    command = [sys.executable, "-m", "papermill", "--engine", "warm", "-p", "value", "41"]
    done = subprocess.run(
        [*command, str(path), str(tmp_path / "out.ipynb")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert printed(nbformat.read(tmp_path / "out.ipynb", as_version=4)) == "42\n"


def test_a_failing_cell_is_raised_as_papermill_does(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        run(notebook(tmp_path, "1 / 0"))


def test_the_kernel_is_the_first_to_go_when_memory_runs_out(tmp_path):
    score = run(notebook(tmp_path, "print(open('/proc/self/oom_score_adj').read())"))
    assert int(score) > int(Path(f"/proc/{os.getpid()}/oom_score_adj").read_text())
