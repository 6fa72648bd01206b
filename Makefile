# make demo   set everything up and run the main job
# make test   set everything up, check style and types, run the tests
# make bench  latency of the demo engine beside PyTorch, with pytest-benchmark
# make sanitize  the tests of the kernels with AddressSanitizer, UBSan and ThreadSanitizer
# make stub   write engine/bertrt/_native.pyi, the types of the kernels' Python module, anew

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := kernels/CMakeLists.txt $(wildcard $(addprefix kernels/,include/*.h src/*.cpp src/*.h src/*.map src/kernels/*))

.PHONY: demo test check bench format sanitize stub clean

demo: $(INSTALLED)
	$(BIN)/bertrt demo --out demo-engine

test: check
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks --benchmark-only

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The folder's tools come from PyPI, as those of an installation do.
sanitize: $(INSTALLED)
	for precision in fp32 bf16 int8; do \
		$(BIN)/bertrt export demo build/sanitize/$$precision-engine --precision $$precision --backend native --overwrite || exit 1; \
	done
	PATH="$(abspath $(BIN)):$$PATH" kernels/sanitize.sh build/sanitize build/sanitize/*-engine/model.bertrt

stub: $(INSTALLED)
	$(BIN)/python -m nanobind.stubgen -m bertrt._native -p kernels/src/python.stub -o engine/bertrt/_native.pyi

# torch goes first and pinned: an open requirement would take the newest build with gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "BertRT needs Python 3.11 or later; run: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable ".[dev]" -C cmake.define.BERTRT_WERROR=ON
	@touch $@

clean:
	rm -rf $(VENV) build dist demo-engine .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
