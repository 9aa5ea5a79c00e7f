# Every target sets itself up: deploy/setup.sh makes .venv when it is missing or out of date.
SHELL := /bin/bash
BIN := .venv/bin
DEMO_MODEL := smollm2-135m
FOLDERS := server patches sparse_attn kv_cache
# The tests of the CPU kernels, most of which take an instruction set by its name.
EMULATED := $(addprefix tests/patches/test_,decoder_layer.py narrow.py quantize.py quantized_layers.py tune.py) \
	$(addprefix tests/sparse_attn/test_,anchor_native.py gathered.py int8_pages.py moba.py native.py \
	selection_native.py threshold_native.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test emulate sanitize lint bench clean

help: ## say what there is
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

setup: ## make .venv (idempotent)
	@deploy/setup.sh

demo: setup ## a real model answers a question about a long document, dense and sparse
	@$(BIN)/foveate pull $(DEMO_MODEL)
	@$(BIN)/python tests/bench/demo.py

test: setup ## lint, and the whole test suite
	@$(BIN)/foveate pull $(DEMO_MODEL) || printf '\n%s\n\n' \
		'*** The demo model could not be fetched: every test that needs $(DEMO_MODEL) is SKIPPED. ***' >&2
	@# one process per core, and in each one thread: torch's threads would wait for each other;
	@# a file stays in one of them, since what it compiles, loads or builds it would do in each;
	@# mypy takes a minute of one core, so lint runs beside the tests
	@mkdir -p build; $(MAKE) --no-print-directory lint > build/lint.log 2>&1 & lint=$$!; status=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations=15 || status=$$?; \
	wait $$lint || { status=1; cat build/lint.log; }; exit $$status

emulate: setup ## test the CPU kernels that this CPU cannot run, their instructions emulated (SIMDE=folder)
	@grep -rqs simde_mm512_reduce_add_ps "$(SIMDE)/simde/x86/avx512" || { echo "Say SIMDE=folder of a checkout of" \
		"https://github.com/simd-everywhere/simde of August 2026 (c285589a) or later; releases so far lack some." >&2; exit 1; }
	@mkdir -p build; rm -rf build/emulated; echo "Compiling takes minutes."
	@CXX="$(CURDIR)/tests/emulated/cxx" SIMDE="$(SIMDE)" $(BIN)/python setup.py --quiet build \
		--build-base build/emulated --build-lib build/emulated/lib 2> build/emulated.log && \
		PYTHONPATH=build/emulated/lib $(BIN)/python tests/emulated/check.py || { cat build/emulated.log >&2; exit 1; }
	@OMP_NUM_THREADS=1 PYTHONPATH=build/emulated/lib $(BIN)/python -m pytest -q -n auto --dist loadfile $(EMULATED)

sanitize: setup ## test the CPU kernels of this CPU with every address checked (AddressSanitizer, UBSan)
	@mkdir -p build; rm -rf build/sanitized; echo "Compiling takes minutes."
	@CXX="$(CURDIR)/tests/sanitized/cxx" $(BIN)/python setup.py --quiet build \
		--build-base build/sanitized --build-lib build/sanitized/lib 2> build/sanitized.log || \
		{ cat build/sanitized.log >&2; exit 1; }
	@# preloaded, since the interpreter is not built so; Python leaves memory to the end of the process, which is no leak
	@LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitized/lib $(BIN)/python -m pytest -q $(EMULATED)

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@mkdir -p build/types/foveate
	@ln -sfn $(addprefix ../../../src/foveate/,__init__.py py.typed) $(addprefix ../../../,$(FOLDERS)) build/types/foveate/
	@$(BIN)/mypy

bench: setup ## measure speed on this machine
	@$(BIN)/foveate pull $(DEMO_MODEL)
	@$(BIN)/python tests/bench/compare_transformers.py

clean: ## remove .venv and everything that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f sparse_attn/ops/native/*.so.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
