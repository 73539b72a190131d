# make setup | demo | fleet-demo | test | test-slow | check | lock

PYTHON ?= python3
TORCH ?= torch==2.13.0
# A GPU user sets TORCH_INDEX_URL to the index that pytorch.org names for his CUDA version.
TORCH_INDEX_URL ?=
export TTT3R_DEMO_OUTPUT ?= out/demo

BIN := .venv/bin
READY := .venv/.ready
# Nothing is sent anywhere; warnings of a missing pip upgrade help nobody.
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo fleet-demo test test-slow check lock clean

setup: $(READY)

# Another index than the last one: torch is installed anew, though its version is the same.
ifneq ($(TORCH_INDEX_URL),)
ifneq ($(TORCH_INDEX_URL),$(shell cat .venv/.torch-index 2>/dev/null))
.PHONY: $(READY)
OTHER_TORCH := yes
endif
endif

$(READY): requirements.lock pyproject.toml deploy/apt-packages.txt
	deploy/install-system-packages.sh
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes --no-deps -r requirements.lock
	$(if $(OTHER_TORCH),-$(BIN)/pip uninstall --quiet --yes torch)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH)
	$(if $(OTHER_TORCH),echo $(TORCH_INDEX_URL) > .venv/.torch-index)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/ttt3r demo --output $(TTT3R_DEMO_OUTPUT)

# A server, S3, workers and a lost machine, all on this one.
fleet-demo: setup
	deploy/install-system-packages.sh deploy/apt-packages-fleet.txt
	PYTHONPATH=.:tests $(BIN)/python deploy/fleet_demo.py

# Two processes: most tests wait for servers. Files stay whole, as their fixtures are dear.
PYTEST := $(BIN)/pytest -q -n 2 --dist loadfile

test: setup
	$(PYTEST)

# One of its servers is on SQLite, which answers late or not at all beside other tests.
OPERATOR := tests/deploy/test_operator_lines.py

# What takes longer and guards a promise: kills, real recordings, memory. The order is that of
# tests/conftest.py.
test-slow: setup
	deploy/install-system-packages.sh deploy/apt-packages-fleet.txt
	$(PYTEST) --no-loadscope-reorder -m 'slow and not gpu' --timeout 1200 --durations 20 --ignore $(OPERATOR)
	$(BIN)/pytest -q -m slow --timeout 1200 $(OPERATOR)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Resolves every pin anew; torch stays out (see deploy/lock-overrides.txt).
lock: setup
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml deploy/lock-additions.txt \
	  --extra dev --extra docker --extra kubernetes --extra open3d-cpu \
	  --override deploy/lock-overrides.txt --python-version 3.11 --generate-hashes --upgrade --quiet --no-header \
	  --no-emit-index-url --no-emit-find-links -o requirements.lock

clean:
	rm -rf .venv build out *.egg-info
