# make report, make test and make lab each do the set-up first: a virtual environment in .venv, the
# exact packages of requirements.lock, and the bundled model in the user's cache folder. Of the packages
# make report installs those that a report needs; what else is made completes the same environment.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready
WHOLE := .venv/whole
# Most of what is installed is never imported, and what is gets its bytecode at the first import: half
# of the set-up's time. So that must be written, whatever the environment says.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
PROMPTS ?= notebooks/prompts.yml
OUT ?= outputs/reports
# Workers for the tests. Two torch processes with two threads each crawl, so each gets one thread.
WORKERS ?= 2

.PHONY: report test test-all test-other-cpu coverage mutants models hostile lint lab student book test-book figures bench evidence model execute lock clean help

help:
	@echo "make report   run the comparison over notebooks/prompts.yml; prints where the index is"
	@echo "make test     before a commit: all but the thorough tests, and the notebooks that have changed"
	@echo "make test-all every test and every notebook"
	@echo "make coverage which branches of helpers/ and llama_reports/ the tests reach"
	@echo "make test-other-cpu   some of them, computed as an older processor would"
	@echo "make mutants  does a test fail where the mathematics is changed? hours; can be interrupted"
	@echo "make models   which families and checkpoints take which method, tried and told in a table"
	@echo "make hostile  20,000 damaged checkpoints: one sentence, or a model that works"
	@echo "make lab      JupyterLab on the notebooks"
	@echo "make student  the notebooks without solutions, with checks in their place; outputs/student"
	@echo "make book     a site of notebooks, docs and functions in outputs/book/html; opens with no network"
	@echo "make test-book   every page of it in a browser, narrow and wide, in the light and in the dark"
	@echo "make figures  every notebook's figures as PNG and SVG, with a manifest, in outputs/figures"
	@echo "make bench    speed and accuracy beside other libraries, over two hours; benchmarks/results.md"
	@echo "make evidence which method to believe, over 154 prompts, 20 minutes; can be interrupted; of your"
	@echo "              own model: make evidence MODEL=hub name, folder or .gguf; outputs/evidence"
	@echo "make lint     ruff, codespell and mypy"
	@echo "make execute  run every notebook in place, as they are committed"
	@echo "make lock     new requirements.lock and environment.yml from pyproject.toml"

# torch goes first and pinned: nothing else may then draw in another build of it.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) "$$(grep '^torch==' requirements.lock)"
	$(INSTALL) --constraint requirements.lock --editable ".[reports]"
	touch $(READY)

$(WHOLE): $(READY)
	$(INSTALL) -r requirements.lock
	touch $(WHOLE)

model: $(READY)
	@$(BIN)/python -m helpers.models

# The reports fetch the model themselves, where it is not there yet. As many workers as fit.
report: $(READY)
	$(BIN)/python -m llama_reports $(PROMPTS) --out $(OUT) --workers 0

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	--nbval --nbval-sanitize-with tests/notebooks/nbval_sanitize.cfg --nbval-kernel-startup-timeout 600

test: $(WHOLE) model
	$(PYTEST) -m "not thorough" --skip-unchanged

test-all: $(WHOLE) model
	$(PYTEST)

# Of the tests' own folder, which runs notebooks, too, and the processes that they start.
coverage: $(WHOLE) model
	$(PYTEST) tests --cov --cov-report=term --cov-fail-under=95

# What changes are noticed, by the toy tests: each mutant runs those that reach its function. What was
# tried is kept in mutants/. ONLY= names the mutants, such as "helpers.attribution.path.*". mutmut is
# in no lock: nothing else needs it. It forks, so that torch is imported once.
mutants: $(WHOLE)
	$(INSTALL) "mutmut==3.8.1"
	TOY_EVERY=1 OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run --max-children $(WORKERS) $(ONLY)
	$(BIN)/python -m mutmut results

# The same sums in another order: torch, MKL and oneDNN without the wide registers of this machine.
# A few minutes' worth of notebooks and of tests that compare numbers.
OTHER_CPU := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41
NUMERIC := attribution decompositions relevance patching ground_truth
test-other-cpu: $(WHOLE) model
	$(OTHER_CPU) $(PYTEST) notebooks/02_*.ipynb notebooks/03_*.ipynb notebooks/04_*.ipynb \
		$(NUMERIC:%=tests/helpers/test_%.py)

# Families x methods and checkpoints x methods, on small models: a few minutes. The table is printed
# at the end and kept in outputs/models.md.
models: $(WHOLE) model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -p tests.matrix \
		tests/helpers/test_architectures.py tests/helpers/test_checkpoints.py

# For the night: folders and .gguf files, one process each.
hostile: $(WHOLE) model
	HOSTILE=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests/helpers/test_hostile.py

lint: $(WHOLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

lab: $(WHOLE) model
	$(BIN)/jupyter lab --notebook-dir=notebooks

# What lies there already is left as it is: it may hold answers.
student: $(WHOLE) model
	@$(BIN)/python -m helpers.exercises

# From the notebooks as they are committed. Reports of make report, where they are there, come along.
BOOK := outputs/book/html
book: $(WHOLE)
	rm -rf outputs/book
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -d outputs/book/doctrees . $(BOOK)
	@echo "The book is $(CURDIR)/$(BOOK)/index.html"

test-book: book
	BOOK=$(BOOK) $(BIN)/python -m pytest -q -n $(WORKERS) tests/book

# As SVG and PNG, with the numbers that they plot, compared with docs/figures.json. ACCEPT=--accept
# writes that file anew.
figures: $(WHOLE) model
	$(BIN)/python -m llama_reports.figures $(ACCEPT)

# inseq needs an environment of its own. torch goes first there too, and by itself.
INSEQ := outputs/benchmarks/inseq
$(INSEQ)/ready: benchmarks/peers/inseq-requirements.txt
	$(PYTHON) -m venv $(INSEQ)
	$(INSEQ)/bin/python -m pip install --quiet "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $<)"
	$(INSEQ)/bin/python -m pip install --quiet -r $<
	touch $@

# The first keeps the machine to itself for twenty minutes; the second can be interrupted. SHAPIQ=
# is the python of an environment with benchmarks/peers/shapiq-requirements.txt, from 3.12.
bench: $(WHOLE) model $(INSEQ)/ready
	$(BIN)/python benchmarks/reports.py
	$(BIN)/python benchmarks/reports.py --killed
	$(BIN)/python benchmarks/reports.py --make
	$(BIN)/python benchmarks/long_prompts.py
	$(BIN)/python benchmarks/scores.py
	$(BIN)/python benchmarks/gallery.py
	$(BIN)/python benchmarks/attribution.py --inseq $(INSEQ)/bin/python
	$(BIN)/python benchmarks/integrated_gradients.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ig_answers.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/yardsticks.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/trust.py
	$(BIN)/python benchmarks/planner.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/precision.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coalitions.py $(if $(SHAPIQ),--shapiq $(SHAPIQ))

# As many processes as cores. Finished prompts are kept in outputs/evidence/parts. Writes a verdict, a
# table and a figure into outputs/evidence/<name of the model>; of the bundled model also the table
# that the notebooks read, the summary in benchmarks/results.md, README's table and docs/evidence.png.
evidence: $(WHOLE) model
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence.py $(if $(MODEL),--model "$(MODEL)")

# One thread, as in the tests: sums in another order differ in their last digits.
execute: $(WHOLE) model
	OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level WARN \
		--ExecutePreprocessor.record_timing=False \
		--CoalesceStreamsPreprocessor.enabled=True notebooks/*.ipynb

# A lock is what pip resolves in an empty environment; environment.yml repeats it pin by pin.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	.venv-lock/bin/python -m pip install --quiet ".[reports,lab,test,book]"
	( echo "# Written by make lock: the exact set the tests pass with."; \
	  .venv-lock/bin/python -m pip freeze --exclude llama-notebooks | sed 's/+cpu$$//' ) > requirements.lock
	( echo "# Written by make lock: the same set as requirements.lock, for conda users."; \
	  echo "name: llama-notebooks"; echo "channels:"; echo "  - conda-forge"; echo "dependencies:"; \
	  echo "  - python=3.11"; echo "  - pip"; echo "  - pip:"; \
	  sed -n 's/^\([^#].*\)/      - \1/p' requirements.lock ) > environment.yml
	rm -rf .venv-lock

clean:
	rm -rf .venv outputs/reports outputs/figures outputs/book
