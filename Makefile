# Everything a reader or a contributor runs. `make` alone lists the targets.
# Needs a Python >= 3.11 and a package index that pip can reach. To choose one: make run PYTHON=python3.12
# The versions are those of constraints.txt; for the newest ones: make distclean test CONSTRAINTS=

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
# Threads that wait do not spin: where other work shares the cores, spinning makes tiny models 50 times slower.
export OMP_WAIT_POLICY ?= PASSIVE
# Images of Python set it; then every process compiles torch and transformers again, ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

# Two at a time, each with half of the cores: less waiting than one after the other with all of them.
# What is freed stays with the process: the kernel zeroes every page that it hands out anew, a sixth of a pass.
PAIR   := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 OMP_NUM_THREADS=$(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$(( n > 1 ? n / 2 : 1 )))
TWICE  := -n 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help run test mutation test-all test-browser test-hour test-interop test-lowest lint unit nbval solutions lab explore notebooks fill \
  format site classroom wheel bench assets clean distclean

# $(call phase,name,command): run the command, say how long it took, fail if it fails
define phase
@printf '\n== %s\n' '$(1)'; begin=$$(date +%s); status=0; { $(2); } || status=$$?; \
[ $$status -eq 0 ] && word=passed || word=FAILED; \
printf '== %s %s in %s s\n' '$(1)' $$word $$(( $$(date +%s) - begin )); exit $$status
endef

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(STAMP)-run assets ## install, fetch the embedded model, run the quickstart, print its table
	@$(PY) tools/notebooks.py run $(QUICK)

test: ## lint, unit tests and the notebooks, from a fresh state
	@begin=$$(date +%s); \
	$(MAKE) --no-print-directory lint assets unit nbval && \
	printf '\nAll passed in %s s\n' $$(( $$(date +%s) - begin ))

test-all: test solutions test-browser test-hour ## … the solutions, the browser, the first hour, and every type of model
	$(call phase,all types,GHOSTLIB_PROGRESS=0 $(PAIR) $(PY) -m pytest -q $(TWICE) --thorough -m every_type tests)

test-lowest: ## unit tests with the lowest versions that pyproject.toml admits (needs python3.11)
	$(call phase,installing the lowest versions,$(ALIVE) python3.11 -m venv --clear $(LOWEST) && \
	  $(LOWEST)/bin/python -m pip install -q uv && \
	  $(LOWEST)/bin/python -m uv pip install --python $(LOWEST) --resolution lowest-direct -e '.[dev]')
	$(call phase,unit tests,GHOSTLIB_PROGRESS=0 $(PAIR) $(LOWEST)/bin/python -m pytest -q $(TWICE) --thorough -m 'not embedded')

test-interop: $(DEV) ## a repaired checkpoint in lm-eval, PEFT and CTranslate2 (installs them)
	$(call phase,installing,$(PY) -m pip install -q $(CONSTRAINTS) -e '.[interop]')
	$(call phase,interoperability,GHOSTLIB_PROGRESS=0 $(PAIR) $(PY) -m pytest -q --thorough -m interop tests/interop)

test-hour: $(DEV) assets ## environment.yml afresh, binder/, memory and minutes of the short course
	$(call phase,installing,$(PY) -m pip install -q $(CONSTRAINTS) -e '.[binder]')
	$(call phase,first hour,GHOSTLIB_PROGRESS=0 $(PY) -m pytest -q -rsP --thorough -m first_hour --durations=0 tests/first_hour)

mutation: $(DEV) ## mutants of the mathematics that the tests do not notice (installs cosmic-ray); SAMPLE=60 for so many a folder
	$(call phase,installing,$(PY) -m pip install -q $(CONSTRAINTS) -e '.[mutation]')
	$(call phase,mutation,OMP_NUM_THREADS=1 GHOSTLIB_PROGRESS=0 $(PY) tools/mutation.py --sample $(SAMPLE))

lint: $(DEV) ## formatting, style, types, and the house rules of the notebooks
	$(call phase,ruff,$(PY) -m ruff format --check . && $(PY) -m ruff check .)
	$(call phase,mypy,$(PY) -m mypy)
	$(call phase,house rules,$(PY) tools/rules.py)

unit: $(DEV) ## unit tests and docstring examples, with coverage
	$(call phase,unit tests,GHOSTLIB_PROGRESS=0 $(PAIR) $(PY) -m pytest -q $(TWICE) --thorough -m 'not interop and not browser' --durations=10 --cov)

# The longest first, so that neither of the two has one left when the other has ended.
LONG  := $(wildcard notebooks/12_*.ipynb notebooks/17_*.ipynb)
NBVAL  = PYTHONPATH=tests GHOSTLIB_PROGRESS=0 $(PAIR) $(PY) -m pytest -p forked $(TWICE) --dist loadscope \
  --no-loadscope-reorder --nbval-lax --nbval-current-env --durations=10

nbval: $(DEV) ## every notebook of the course, cell by cell
	$(call phase,notebooks,$(NBVAL) $(LONG) $(filter-out $(LONG),$(sort $(wildcard notebooks/*.ipynb))))

solutions: $(DEV) assets ## the solutions of the exercises, cell by cell
	$(call phase,solutions,$(NBVAL) notebooks/solutions)

lab: $(STAMP)-notebooks ## open JupyterLab on the notebooks
	@$(PY) -m jupyterlab notebooks

explore: $(STAMP)-notebooks assets ## the explorer alone, as a page
	@$(PY) -m voila notebooks/explore.ipynb

notebooks: $(DEV) assets fill ## execute all notebooks again, store clean outputs, fill and check
	@$(PY) tools/notebooks.py execute
	@$(PY) tools/fill.py
	@$(PY) tools/rules.py

fill: $(DEV) ## write what is generated: setup cells, badges, tables, the ledger, the README's picture
	@$(PY) tools/fill.py

format: $(DEV) ## let ruff format and fix what it can
	@$(PY) -m ruff format . && $(PY) -m ruff check --fix .

site: $(STAMP)-docs ## the site into build/site, to read offline; stored outputs, nothing is executed
	$(call phase,site,mkdir -p build/site-source && \
	  $(PY) -m sphinx -E -q -W --keep-going -c docs -d build/doctrees build/site-source build/site)
	@echo 'To read: build/site/index.html'

classroom: $(DEV) ## the notebooks without solutions and outputs, into build/classroom
	@rm -rf build/classroom && mkdir -p build && cp -R notebooks build/classroom && rm -rf build/classroom/solutions
	@$(PY) -m nbconvert --log-level=WARN --clear-output --inplace build/classroom/*.ipynb
	@echo 'To hand out: build/classroom'

wheel: $(STAMP)-run ## the package as one file, into dist/, to put beside a notebook elsewhere
	@$(PY) -m pip wheel -q --no-deps --wheel-dir dist .

test-browser: $(STAMP)-browser assets ## JupyterLab, the explorer and the site in Debian's Chromium
	$(call phase,site,$(MAKE) --no-print-directory site)
	$(call phase,browser,GHOSTLIB_PROGRESS=0 $(PY) -m pytest -q -m browser --durations=0 tests/browser)

bench: $(DEV) assets ## run the benchmarks
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(PY) "$$script" || exit 1; done

assets: $(STAMP)-run ## fetch and check the embedded model and corpora (once)
	@echo 'Checking the embedded model and corpus …'
	@$(PY) -c 'from ghostlib.text import assets; assets.fetch_all()'

clean: ## remove what the other targets made, except the environment
	rm -rf build dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find ghostlib tests tools notebooks benchmarks -name __pycache__ -o -name .ipynb_checkpoints \
	  2>/dev/null | xargs rm -rf

distclean: clean ## … and the environments
	rm -rf $(VENV) $(LOWEST)

# One for each extra of pyproject.toml. Made once; again only when the list of dependencies changes.
# Modules are compiled when they are first imported: most never are.
$(STAMP)-%: pyproject.toml constraints.txt | $(PY)
	$(call phase,installing the project and what it needs for $*,$(ALIVE) \
	  $(PY) -m pip install -q --no-compile $(CONSTRAINTS) -e '.[$*]')
	@touch $@

# pip is either silent or says everything, its bars included: it is silent, and here is a sign of life.
ALIVE = (s=0; while sleep 10 && kill -0 $$$$; do s=$$((s + 10)); echo "   $$s s"; done) 2>/dev/null &

$(PY):
	@$(ALIVE) for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then echo "Making the environment $(VENV)" && exec "$$python" -m venv --clear --upgrade-deps $(VENV); fi; \
	done; \
	echo 'Found no Python >= 3.11 with the venv module (tried: $(PYTHON) python3 python3.13 python3.12 python3.11).' >&2; \
	echo 'Install one, or name it: make run PYTHON=path' >&2; exit 1
