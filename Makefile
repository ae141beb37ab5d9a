# Every target sets up what it needs on a fresh machine: Python 3.11 or newer with venv, a C++17 compiler, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo
EXTRAS := train,export,bench,dev
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PACKAGES := -p dlrm_deploy
CPP := $(shell git ls-files 'engines/native/*.cc' 'engines/native/*.h' 'tests/engines/native/*.cc' 'tests/engines/native/*.h' 2>/dev/null)

.PHONY: demo test setup build lint format sanitize test-native clean

demo: $(VENV)/ready ## the whole road on MovieLens-100K, into $(OUT)/
	$(BIN)/dlrm-deploy demo --out $(OUT)

test: $(VENV)/ready ## every test, with coverage of at least 90 %
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=90

setup: $(VENV)/ready ## virtual environment, pinned packages, ONNX Runtime headers, native build

$(VENV)/ready: pyproject.toml constraints.txt CMakeLists.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[$(EXTRAS)]'
	$(PIP_INSTALL) -e '.[tensorrt-rtx]' || echo 'TensorRT-RTX has no package for this machine: plans will not be built.'
	touch $@

build: $(VENV)/ready ## rebuild the native library after a change
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

test-native: ## C++ kernel tests
	cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release -DDLRM_DEPLOY_BUILD_TESTS=ON
	cmake --build build/native --parallel 2
	ctest --test-dir build/native --output-on-failure

sanitize: ## C++ kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDLRM_DEPLOY_BUILD_TESTS=ON -DDLRM_DEPLOY_SANITIZE=ON -DDLRM_DEPLOY_WERROR=ON
	cmake --build build/sanitize --parallel 2
	ctest --test-dir build/sanitize --output-on-failure

clean:
	rm -rf build $(VENV)
