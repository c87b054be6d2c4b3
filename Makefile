# Two commands read the tutorial: `make tutorial` runs it and makes its pages, `make lab` opens it. `make help` lists all.

PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
CIFAR := $(notdir $(basename $(wildcard data/checkpoints/cifar10_*.safetensors)))
SOURCES := $(NOTEBOOKS) $(wildcard notebooks/*.py data/checkpoints/* data/trajectories/* data/results/*) $(shell find karat_lite -name '*.py')

.PHONY: help tutorial lab test train check-cifar bench bench-gpu notebooks address check clean
.DELETE_ON_ERROR:

help:
	@echo "make tutorial    install, run every notebook (smoke profile), write pages to build/index.html"
	@echo "make lab         install, open JupyterLab in notebooks/ (ARGS='--no-browser --port 8899')"
	@echo "make test        install, run every test (ARGS='-k fourier')"
	@echo "make train       install, train twins (ARGS='--data digits --out runs --resume'; ARGS=--help lists all options)"
	@echo "make check-cifar DATA=...  test the committed CIFAR-10 checkpoints on an image folder with test/<class>/ in it"
	@echo "make bench       measure time and memory beside softmax on the CPU (5 minutes; pause whatever else runs)"
	@echo "make bench-gpu   the same on one GPU (8 minutes); both write data/results/bench_*.json and a figure"
	@echo "make notebooks   run the notebooks in the reader profile and write their outputs into them (minutes)"
	@echo "make address     write pyproject's Repository address into badges and bootstrap cells"
	@echo "make check       check the rules for committed notebooks"
	@echo "make clean       remove build/ and caches (the environment stays; remove it with rm -rf $(VENV))"

# The stamp is removed first and written last: an interrupted installation is done again.
$(INSTALLED): pyproject.toml .ci/constraints.txt .ci/ipywidgets7.txt
	@rm -f $@
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here: install Python 3.11 to 3.14."; exit 1; }
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 15); ok or print("$(PYTHON) is Python", \
	  sys.version.split()[0], "but 3.11 to 3.14 is needed: make PYTHON=python3.12"); sys.exit(not ok)'
	@$(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV)/: PyTorch makes it several gigabytes and a few minutes, once."
	$(PY) -m pip install --disable-pip-version-check -c .ci/constraints.txt -e '.[lab,zoo,test]'
	$(PY) -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $(VENV)/ipywidgets7 -r .ci/ipywidgets7.txt
	@touch $@

tutorial: $(INSTALLED)
	@if $(MAKE) --no-print-directory -q build/index.html; then echo "Nothing changed since the last run: open build/index.html"; \
	else $(MAKE) --no-print-directory build/index.html; fi

build/index.html: $(INSTALLED) $(SOURCES)
	@$(PY) notebooks/build.py run --out build

lab: $(INSTALLED)
	cd notebooks && ../$(PY) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

test: $(INSTALLED)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

train: $(INSTALLED)
	@$(PY) -m karat_lite.train $(or $(ARGS),--data digits --out runs --resume)

check-cifar: $(INSTALLED)
	@[ -n "$(DATA)" ] || { echo "make check-cifar DATA=FOLDER: the folder with test/<class>/ that data/README.md names"; exit 2; }
	@$(PY) -m karat_lite.check --data $(DATA) $(CIFAR)

bench: $(INSTALLED)
	@$(PY) -m karat_lite.bench $(ARGS)

bench-gpu: $(INSTALLED)
	@$(PY) -m karat_lite.bench --device cuda $(ARGS)

notebooks: $(INSTALLED)
	@$(PY) notebooks/build.py commit $(ARGS)

address: $(INSTALLED)
	@$(PY) notebooks/build.py address

check: $(INSTALLED)
	@$(PY) notebooks/build.py check

clean:
	rm -rf build .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
