# Targets follow the files: a stage whose inputs did not change is not run again.
# PRESET and ROOT pick the experiment: make report PRESET=paper ROOT=/scratch/experiment
PRESET ?= demo
ROOT ?= .
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
D := $(ROOT)/data
# A cohort without a truth is one of own studies: nothing is simulated beside it.
TRUTH := $(D)/truth.zarr/zarr.json
OWN := $(filter-out $(D)/raw/mouse% $(D)/raw/lego,$(wildcard $(D)/raw/*))
SIMULATED := $(if $(OWN)$(wildcard $(D)/cohort.csv),$(wildcard $(TRUTH)),$(TRUTH))

.PHONY: setup setup-dev demo report tune apddm test lint bench clean
.DELETE_ON_ERROR:

demo: report

setup: $(VENV)/.run
setup-dev: $(VENV)/.dev

$(VENV)/.run: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.dev: requirements.txt requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/.run

# The libraries a stage needs are no reason to run it again: the environment is an order-only prerequisite.
$(TRUTH): 00_simulate.py scanner.py anatomy.py paravision_writer.py common.py | $(VENV)/.run
	$(PY) 00_simulate.py --preset $(PRESET) --root $(ROOT)

$(D)/curated.zarr/zarr.json: 01_curate.py cohort.py quality.py formats.py paravision.py common.py $(SIMULATED) $(wildcard $(D)/raw $(D)/cohort.csv $(D)/slices.csv) | $(VENV)/.run
	$(PY) 01_curate.py --preset $(PRESET) --root $(ROOT)

$(D)/pairs.zarr/zarr.json: 02_preprocess.py common.py $(D)/curated.zarr/zarr.json | $(VENV)/.run
	$(PY) 02_preprocess.py --preset $(PRESET) --root $(ROOT)

$(ROOT)/runs/unet/summary.json: 03_train_unet.py networks.py parallel.py likeness.py common.py $(D)/pairs.zarr/zarr.json | $(VENV)/.run
	$(PY) 03_train_unet.py --preset $(PRESET) --root $(ROOT) $(FRESH)

$(ROOT)/results/summary.json: 06_evaluate.py merit.py networks.py anchored.py rois.py common.py $(ROOT)/runs/unet/summary.json $(wildcard $(D)/rois.csv) | $(VENV)/.run
	$(PY) 06_evaluate.py --preset $(PRESET) --root $(ROOT)

define page
	mkdir -p $(ROOT)/reports
	$(VENV)/bin/papermill --no-progress-bar -p root $(abspath $(ROOT)) $< $(@:.html=.ipynb)
	$(VENV)/bin/jupyter nbconvert --log-level ERROR --to html --no-input \
		--HTMLExporter.require_js_url= --HTMLExporter.mathjax_url= $(@:.html=.ipynb)
endef

$(ROOT)/reports/curation.html: notebooks/curation.ipynb $(D)/pairs.zarr/zarr.json | $(VENV)/.run
	$(page)

$(ROOT)/reports/results.html: notebooks/results.ipynb $(ROOT)/results/summary.json | $(VENV)/.run
	$(page)

report: $(ROOT)/reports/results.html $(ROOT)/reports/curation.html
	@echo "report: $^"

# The search and the diffusion model take longer than the demo may: targets of their own, resumed by the same command.
tune: $(D)/pairs.zarr/zarr.json
	$(PY) 04_tune.py --preset $(PRESET) --root $(ROOT)

apddm: $(ROOT)/runs/unet/summary.json
	$(PY) 05_apddm.py --preset $(PRESET) --root $(ROOT)

lint: setup-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: setup-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

# Each goes on where it was stopped; the ablations train on the experiment in ROOT and take long.
bench: $(ROOT)/runs/unet/summary.json
	$(PY) benchmarks/train_step.py
	$(PY) benchmarks/viewer.py
	$(PY) benchmarks/scale.py
	$(PY) benchmarks/slice_quality.py --root $(ROOT)
	$(PY) benchmarks/kill_resume.py
	$(PY) benchmarks/fuzz.py
	$(PY) benchmarks/alignment.py --root $(ROOT)
	$(PY) benchmarks/apddm_ablation.py --root $(ROOT)

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__
