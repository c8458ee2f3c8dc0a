# All commands for readers and contributors. `make` alone lists the targets.
# Needs Python >= 3.11 and a package index that pip can reach. To choose a Python: make run PYTHON=python3.12
# Versions are those of constraints.txt; for the newest ones: make distclean test CONSTRAINTS=

PYTHON ?=
CONSTRAINTS ?= --constraint constraints.txt
SAMPLE ?= 100
VENV   := .venv
LOWEST := .venv-lowest
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
DEV    := $(STAMP)-dev
QUICK  := notebooks/00_quickstart.ipynb

export GHOSTLIB_PROGRESS ?= 1
# Waiting threads do not spin: on cores shared with other work, spinning makes tiny models 50 times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# Images of Python set it; every process would then compile torch and transformers again, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE

# Two at a time, each with half of the cores, finish sooner than one after the other with all of them.
# Freed memory stays with the process: the kernel zeroes every page that it hands out, a sixth of a pass.
PAIR   := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 OMP_NUM_THREADS=$(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$(( n > 1 ? n / 2 : 1 )))
TWICE  := -n 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help run test mutation test-all test-browser test-hour test-interop test-lowest lint unit nbval solutions lab explore notebooks fill \
  format site classroom wheel bench assets clean distclean

# $(call phase,name,command): run the command, print its duration, fail if it fails
define phase
@printf '\n== %s\n' '$(1)'; begin=$$(date +%s); status=0; { $(2); } || status=$$?; \
[ $$status -eq 0 ] && word=passed || word=FAILED; \
printf '== %s %s in %s s\n' '$(1)' $$word $$(( $$(date +%s) - begin )); exit $$status
endef

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(STAMP)-run assets ## install, download the embedded model, run the quickstart, print its table
	@$(PY) tools/notebooks.py run $(QUICK)

test: ## lint, unit tests and notebooks
	@begin=$$(date +%s); \
	$(MAKE) --no-print-directory lint assets unit nbval && \
	printf '\nAll passed in %s s\n' $$(( $$(date +%s) - begin ))

test-all: test solutions test-browser test-hour ## … solutions, the browser, the first hour, and every type of model
	$(call phase,all types,GHOSTLIB_PROGRESS=0 $(PAIR) $(PY) -m pytest -q $(TWICE) --thorough -m every_type tests)

test-lowest: ## unit tests with the lowest versions that pyproject.toml admits (needs python3.11)
	$(call phase,installing the lowest versions,$(ALIVE) python3.11 -m venv --clear $(LOWEST) && \
	  $(LOWEST)/bin/python -m pip install -q uv && \
	  $(LOWEST)/bin/python -m uv pip install --python $(LOWEST) --resolution lowest-direct -e '.[dev]')
	$(call phase,unit tests,GHOSTLIB_PROGRESS=0 $(PAIR) $(LOWEST)/bin/python -m pytest -q $(TWICE) --thorough -m 'not embedded')

test-interop: $(DEV) ## a repaired checkpoint in lm-eval, PEFT and CTranslate2 (installs them)
	$(call phase,installing,$(PY) -m pip install -q $(CONSTRAINTS) -e '.[interop]')
	$(call phase,interoperability,GHOSTLIB_PROGRESS=0 $(PAIR) $(PY) -m pytest -q --thorough -m interop tests/interop)

test-hour: $(DEV) assets ## a new environment from environment.yml, binder/, memory and minutes of the short course
	$(call phase,installing,$(PY) -m pip install -q $(CONSTRAINTS) -e '.[binder]')
	$(call phase,first hour,GHOSTLIB_PROGRESS=0 $(PY) -m pytest -q -rsP --thorough -m first_hour --durations=0 tests/first_hour)

mutation: $(DEV) ## mutants of the mathematics that the tests do not notice (installs cosmic-ray); SAMPLE=60: 60 per folder
	$(call phase,installing,$(PY) -m pip install -q $(CONSTRAINTS) -e '.[mutation]')
	$(call phase,mutation,OMP_NUM_THREADS=1 GHOSTLIB_PROGRESS=0 $(PY) tools/mutation.py --sample $(SAMPLE))

lint: $(DEV) ## formatting, style, types, and the house rules of the notebooks
	$(call phase,ruff,$(PY) -m ruff format --check . && $(PY) -m ruff check .)
	$(call phase,mypy,$(PY) -m mypy)
	$(call phase,house rules,$(PY) tools/rules.py)

unit: $(DEV) ## unit tests and docstring examples, with coverage
	$(call phase,unit tests,GHOSTLIB_PROGRESS=0 $(PAIR) $(PY) -m pytest -q $(TWICE) --thorough -m 'not interop and not browser' --durations=10 --cov)

# The longest first, so that both workers end at about the same time.
LONG  := $(wildcard notebooks/12_*.ipynb notebooks/17_*.ipynb)
NBVAL  = PYTHONPATH=tests GHOSTLIB_PROGRESS=0 $(PAIR) $(PY) -m pytest -p forked $(TWICE) --dist loadscope \
  --no-loadscope-reorder --nbval-lax --nbval-current-env --durations=10

nbval: $(DEV) ## every notebook of the course, cell by cell
	$(call phase,notebooks,$(NBVAL) $(LONG) $(filter-out $(LONG),$(sort $(wildcard notebooks/*.ipynb))))

solutions: $(DEV) assets ## solutions of the exercises, cell by cell
	$(call phase,solutions,$(NBVAL) notebooks/solutions)

lab: $(STAMP)-notebooks ## open JupyterLab on the notebooks
	@$(PY) -m jupyterlab notebooks

explore: $(STAMP)-notebooks assets ## the explorer alone, as a page
	@$(PY) -m voila notebooks/explore.ipynb

notebooks: $(DEV) assets fill ## execute all notebooks, store clean outputs, fill and check
	@$(PY) tools/notebooks.py execute
	@$(PY) tools/fill.py
	@$(PY) tools/rules.py

fill: $(DEV) ## write generated parts: setup cells, badges, tables, the ledger, the README's picture
	@$(PY) tools/fill.py

format: $(DEV) ## format and fix with ruff
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

site: $(STAMP)-docs ## the site, in build/site, to read offline; from stored outputs, without execution
	$(call phase,site,mkdir -p build/site-source && \
	  $(PY) -m sphinx -E -q -W --keep-going -c docs -d build/doctrees build/site-source build/site)
	@echo 'To read: build/site/index.html'

classroom: $(DEV) ## the notebooks without solutions and outputs, in build/classroom
	@rm -rf build/classroom && mkdir -p build && cp -R notebooks build/classroom && rm -rf build/classroom/solutions
	@$(PY) -m nbconvert --log-level=WARN --clear-output --inplace build/classroom/*.ipynb
	@echo 'To hand out: build/classroom'

wheel: $(STAMP)-run ## the package as one file, in dist/, to put next to a notebook elsewhere
	@$(PY) -m pip wheel -q --no-deps --wheel-dir dist .

test-browser: $(STAMP)-browser assets ## JupyterLab, the explorer and the site in Debian's Chromium
	$(call phase,site,$(MAKE) --no-print-directory site)
	$(call phase,browser,GHOSTLIB_PROGRESS=0 $(PY) -m pytest -q -m browser --durations=0 tests/browser)

bench: $(DEV) assets ## run the benchmarks
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(PY) "$$script" || exit 1; done

assets: $(STAMP)-run ## download and check the embedded model and corpora (once)
	@echo 'Checking the embedded model and corpus …'
	@$(PY) -c 'from ghostlib.text import assets; assets.fetch_all()'

clean: ## remove the outputs of other targets, except the environments
	rm -rf build dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find ghostlib tests tools notebooks benchmarks -name __pycache__ -o -name .ipynb_checkpoints \
	  2>/dev/null | xargs rm -rf

distclean: clean ## … and the environments
	rm -rf $(VENV) $(LOWEST)

# One for each extra of pyproject.toml, made again only when the list of dependencies changes.
# Modules are compiled on their first import; most are never imported.
$(STAMP)-%: pyproject.toml constraints.txt | $(PY)
	$(call phase,installing the project and its dependencies for $*,$(ALIVE) \
	  $(PY) -m pip install -q --no-compile $(CONSTRAINTS) -e '.[$*]')
	@touch $@

# pip is silent (otherwise it prints everything, bars included), so this prints the seconds.
ALIVE = (s=0; while sleep 10 && kill -0 $$$$; do s=$$((s + 10)); echo "   $$s s"; done) 2>/dev/null &

$(PY):
	@$(ALIVE) for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then echo "Creating the environment $(VENV)" && exec "$$python" -m venv --clear --upgrade-deps $(VENV); fi; \
	done; \
	echo 'Found no Python >= 3.11 with the venv module (tried: $(PYTHON) python3 python3.13 python3.12 python3.11).' >&2; \
	echo 'Install one, or name it: make run PYTHON=path' >&2; exit 1
