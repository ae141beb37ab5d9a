# Every target sets up what it needs on a fresh machine: Python 3.11 or newer with venv, a C++17 compiler, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo
RUNS ?= runs/models
SEEDS ?= 3
REPORT ?= bench-report
EXTRAS := train,export,bench,dev
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALL_PACKAGES = $(PIP_INSTALL) -e '.[$(EXTRAS)]' && \
	$(BIN)/python packaging/install_optional.py TensorRT-RTX -c constraints.txt -e '.[tensorrt-rtx]'
PACKAGES := -p dlrm_deploy
NATIVE := CMakeLists.txt $(wildcard cmake/* dlrm_deploy/engines/native/* $(addprefix dlrm_deploy/engines/native/,*/* */*/*))
CPP := $(shell git ls-files 'engines/native/*.cc' 'engines/native/*.h' 'tests/engines/native/*.cc' 'tests/engines/native/*.h' 2>/dev/null)

# ThreadSanitizer of older compilers does not know the address spaces of newer Linux kernels.
FIXED_ADDRESSES = $(shell setarch -R true 2>/dev/null && echo setarch -R)
# Python and ONNX Runtime are not built with the sanitizer, so its runtime has to be there before them, and what they leave
# allocated at their end is not ours to report.
IN_ADDRESS_SANITIZER = DLRM_DEPLOY_LIBRARY=$(CURDIR)/build/address/libdlrm_deploy_ops.so ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$(foreach library,asan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))"

.PHONY: demo test models-table precision-table bench-report setup build lint format sanitize sanitize-address sanitize-thread test-native clean

demo: $(VENV)/ready ## the whole road on MovieLens-100K, into $(OUT)/
	$(BIN)/dlrm-deploy demo --out $(OUT)

test: $(VENV)/ready ## every test, with coverage of at least 90 %
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=90

models-table: $(VENV)/ready ## the comparison in docs/models.md: every MovieLens recipe with SEEDS seeds, runs kept in $(RUNS)/
	$(BIN)/python -m dlrm_deploy.models_table --runs $(RUNS) --seeds $(SEEDS) --jobs 2 --write docs/models.md

precision-table: $(VENV)/ready ## the table in docs/precision.md: two recipes with SEEDS seeds in every number format, runs kept in $(RUNS)/
	$(BIN)/python -m dlrm_deploy.precision_table --runs $(RUNS) --seeds $(SEEDS) --jobs 2 --write docs/precision.md

$(OUT)/bundle/manifest.json: | $(VENV)/ready
	$(BIN)/dlrm-deploy demo --out $(OUT)

bench-report: $(VENV)/ready $(OUT)/bundle/manifest.json ## the goals of docs/performance.md with every peer, rows and HTML report in $(REPORT)/ (15 minutes)
	$(BIN)/python -m dlrm_deploy.bench.suite --out $(REPORT) --demo $(OUT)/bundle --write docs/performance.md

setup: $(VENV)/ready ## virtual environment, pinned packages, ONNX Runtime headers, native build

# Packages are asked for when their lists have changed; a change of native sources alone rebuilds the library.
$(VENV)/ready: pyproject.toml constraints.txt packaging/install_optional.py $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(filter-out $(NATIVE),$?),$(INSTALL_PACKAGES),$(PIP_INSTALL) --no-deps -e .)
	touch $@

build: $(VENV)/ready ## rebuild the native library, also where nothing has changed
	$(PIP_INSTALL) --no-deps -e .

lint: $(VENV)/ready ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/ready ## rewrite all sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

test-native: $(VENV)/ready ## C++ kernel tests
	$(BIN)/cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release -DDLRM_DEPLOY_BUILD_TESTS=ON
	$(BIN)/cmake --build build/native --parallel 2
	$(BIN)/ctest --test-dir build/native --output-on-failure

sanitize: sanitize-address sanitize-thread ## C++ kernel tests and operator tests under the compiler's sanitizers

sanitize-address sanitize-thread: sanitize-%: $(VENV)/ready
	$(BIN)/cmake -S . -B build/$* -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDLRM_DEPLOY_BUILD_TESTS=ON -DDLRM_DEPLOY_SANITIZE=$* \
		-DDLRM_DEPLOY_WERROR=ON
	$(BIN)/cmake --build build/$* --parallel 2
	$(FIXED_ADDRESSES) $(BIN)/ctest --test-dir build/$* --output-on-failure
	$(if $(filter address,$*),$(IN_ADDRESS_SANITIZER) $(BIN)/python -m pytest \
		$(addprefix tests/engines/native/test_,custom_ops.py fused_ops.py int8_mlp.py mlp.py))

clean:
	rm -rf build $(VENV)
