# Everything is installed into .venv; `make help` lists what there is.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install compare notebook test bench browser-test explore export execute clean-notebooks readme docs

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed-all ## install bavq into .venv with all that it can use (2.6 GB to download the first time)

compare: $(VENV)/.installed-all ## train and compare VQ-EMA and BA-VQ on real images; more options: ARGS="..."
	@$(BIN)/bavq compare $(ARGS)

notebook: $(VENV)/.installed-notebooks ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb $(ARGS)

explore: $(VENV)/.installed-notebooks ## serve the explorer as an application, in the browser
	@$(BIN)/voila nbs/7_comparison/02_explore.ipynb $(ARGS)

test: $(VENV)/.installed-dev ## everything CI checks; the last line reads "N passed, N failed"
	@$(BIN)/python tools/gate.py $(ARGS)

browser-test: $(VENV)/.installed-dev ## use the reading notebooks in JupyterLab and Voilà with a real browser; screenshots in experiments/browser
	@$(BIN)/python tools/browser.py --install $(ARGS)

bench: $(VENV)/.installed-dev ## time and memory beside vector-quantize-pytorch, in results/bench; small: ARGS=--quick
	@$(BIN)/python benchmarks/quantizers.py $(ARGS)
	@$(if $(filter-out --quick,$(ARGS)),,$(BIN)/python benchmarks/training.py $(ARGS))

export: $(VENV)/.installed-dev ## write bavq/*.py from the notebooks
	@$(BIN)/nbdev_export

execute: export ## run the notebooks in place and store their outputs; one of them: NB=01_base
	@$(BIN)/python tools/execute.py $(NB)

clean-notebooks: $(VENV)/.installed-dev ## strip what need not be stored in the notebooks
	@$(BIN)/nbdev_clean

readme: $(VENV)/.installed-dev ## write README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

docs: $(VENV)/.installed-docs ## build the site of the notebooks, with search and reference, in _docs/
	@$(BIN)/python tools/docs.py

# One stamp for each set of requirements: nothing is installed again until settings.ini changes.
# Those of the notebooks, the checks and the site hold all that the package itself can use.
$(VENV)/.installed-%: settings.ini setup.py
	@$(PYTHON) tools/install.py $(VENV) $*
	@touch $@ $(VENV)/.installed-all
