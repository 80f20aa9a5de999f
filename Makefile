# Everything runs in a virtual environment that `make setup` makes from requirements.lock.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Compiled Python goes there, even where the environment asks for none: `import torch` takes twice as long without.
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/.cache/pycache
export PYTHONDONTWRITEBYTECODE :=
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
PRESET ?= tiny
# Where images are built: their name and tag as in infra/kubernetes/image/image.env
SVD_IMAGES ?= svd-platform
SVD_IMAGE_TAG ?= dev
SVD_BUILD_NETWORK ?= default

.PHONY: help setup pipeline test test-slow drill drill-cluster test-cluster lint lock images up down status ui clean

help:           ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	touch $@

setup: $(STAMP) ## make .venv from requirements.lock

pipeline: setup ## run the whole pipeline with the embedded default (PRESET=tiny)
	svd pipeline --preset $(PRESET)

test: setup     ## run the tests
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile

test-slow: setup ## run the slow tests
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile -m 'slow and not gpu' $(if $(BUDGET),--budget $(BUDGET))

drill: setup    ## break the local stack in twelve ways and say what became of the work
	OMP_NUM_THREADS=1 python tests/e2e/drill.py $(FAULTS)

drill-cluster: setup ## the same on the cluster that KUBECONFIG names, with nodes, pods and servers that go away
	pytest -m cluster tests/cluster/test_survival.py -s

test-cluster: setup ## run the stack on the cluster that KUBECONFIG names
	pytest -m cluster tests/cluster -s

lint: setup     ## format check, lint, types, layers
	ruff format --check . && ruff check . && mypy && lint-imports

lock: setup     ## compile the locks from pyproject.toml and infra/docker/servers.in
	uv pip compile -q pyproject.toml --extra test --extra kubernetes --extra captions \
		--generate-hashes --no-emit-index-url --python-version 3.11 -o requirements.lock
	uv pip compile -q infra/docker/servers.in --constraint requirements.lock \
		--generate-hashes --no-emit-index-url --python-version 3.11 -o infra/docker/servers.lock

images:         ## build servers, worker-cpu and worker-gpu (SVD_IMAGES, SVD_IMAGE_TAG, TORCH_INDEX)
	for target in servers worker-cpu worker-gpu; do \
		docker build --network $(SVD_BUILD_NETWORK) --target $$target -f infra/docker/Dockerfile \
			--build-arg GIT_COMMIT=$$(git describe --always --dirty --abbrev=40 --exclude='*') \
			$(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) \
			-t $(SVD_IMAGES)/$$target:$(SVD_IMAGE_TAG) . || exit; \
	done

up: setup       ## start the local stack: Prefect, workers, MLflow, S3
	svd stack up

down: setup     ## stop what `make up` started
	svd stack down

status: setup   ## what runs
	svd stack status

ui: setup       ## MLflow's page on the runs of the embedded default
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --workers 1 --host 127.0.0.1 --port 5151 \
		--backend-store-uri sqlite:///$(CURDIR)/.local/mlflow.db

clean:          ## remove outputs, work in progress and caches
	rm -rf outputs work .local .cache
