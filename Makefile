# Everything below works on a fresh clone; each verb first makes what it needs.
#
#   make demo       train networks with stock AdamW and with ours, and compare (writes demo.png and
#                   strategy.png)
#   make test       all tests
#   make bench      measure against torch and DeepSpeed (writes build/*.json and tables)
#   make plots      draw benchmarks/results/*.json anew
#   make lint       ruff, mypy, clang-format
#   make sanitize   the C++ core's tests under AddressSanitizer and UBSan
#   make resources  compile the CUDA kernels, list their registers and count their instructions
#                   (needs nvcc, no GPU)
#   make gpu-report build, look, measure and test on a CUDA GPU, in two short calls (PYTHON: one with
#                   torch for CUDA; PARTS: second, or parts by name, such as "bench pipeline")
#   make docs       the documentation's site, in build/site
#   make wheel      build/dist/*.whl and the source archive
#   make clean      remove all that make has made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q install -c constraints.txt
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml

# Those of `fusedopt bench`.
RESULTS := $(wildcard benchmarks/results/c*.json)

ON_A_DEVICE := $(addprefix tests/test_,$(addsuffix .py,accumulate average averaging best_weights \
	checkpoints checks clip device dropin ensemble momentum options precision profiling range_test robust scaler \
	textbook))

# One architecture is enough to develop with; wheels get all (setup.py).
export FUSEDOPT_CUDA_ARCHS ?= 90
wheel: export FUSEDOPT_CUDA_ARCHS :=

.PHONY: demo test bench plots lint sanitize resources gpu-report docs wheel clean build

demo: build
	$(BIN)/python examples/digits.py --plot demo.png
	$(BIN)/python examples/strategy.py --plot strategy.png

# On all processors; the second run is of the CUDA path, on an emulated GPU.
test: build
	$(BIN)/python -m pytest -n auto --dist worksteal
	$(BIN)/python -m pytest -n auto --dist worksteal --device fake $(ON_A_DEVICE)

bench: build
	mkdir -p build
	$(BIN)/python -m fusedopt bench --json build/bench.json
	$(BIN)/python benchmarks/pipeline.py --json build/pipeline.json
	$(BIN)/python benchmarks/training.py --json build/training.json

plots: build
	for json in $(RESULTS); do \
	  $(BIN)/python -m fusedopt bench --from $$json --plot $${json%.json}.png > /dev/null || exit; \
	done

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*.inl csrc/*.cu tests/*.cpp tests/*.h

sanitize: build
	$(BIN)/python -m pytest tests/test_core.py -m sanitize

resources: build
	$(BIN)/python -m pytest -s tests/test_cuda_build.py

# On a machine with a GPU. Uses the Python that has torch for it, not .venv.
gpu-report:
	$(PYTHON) benchmarks/gpu_report.py $(PARTS)

docs: build/docs/installed
	build/docs/bin/mkdocs build

build/docs/installed: requirements-docs.txt
	$(PYTHON) -m venv build/docs
	build/docs/bin/pip --disable-pip-version-check -q install -r requirements-docs.txt
	touch $@

wheel: build
	$(PIP) build
	$(BIN)/python -m build -o build/dist

build: $(VENV)/built

# The build itself runs isolated from the environment, as for any user: it needs no torch.
$(VENV)/built: $(SOURCES) $(VENV)/installed
	@echo "Building the extension: a minute, or some where there is an nvcc (FUSEDOPT_CUDA=0: without CUDA)."
	$(PIP) --no-deps -e .
	touch $@

$(VENV)/installed: constraints.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fusedopt/*.so demo.png strategy.png
