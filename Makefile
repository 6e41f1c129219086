# `make demo` and `make test` are all the set-up there is: both create what they need in .venv, once.

# The first Python that is new enough. `make PYTHON=...` chooses another.
PYTHON ?= $(firstword $(foreach python,python3.11 python3.12 python3.13 python3.14 python3,$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(python))))
BIN := .venv/bin

.PHONY: demo test lint format bench wheels sanitize docs clean
.NOTPARALLEL:

demo: .venv/export.stamp
	$(BIN)/python export/build_engines.py --force
	$(BIN)/python export/build_engines.py --model blip2rt/bundled/retriever --force
	$(BIN)/blip2rt caption blip2rt/bundled/images/* --engine engines/
	$(BIN)/blip2rt answer blip2rt/bundled/images/night.jpg --question "what is left of the axe?" --engine engines/
	rm -rf build/gallery
	$(BIN)/blip2rt embed blip2rt/bundled/images/* --gallery build/gallery --engine engines/
	$(BIN)/blip2rt search "three pineapples on a beach" "a sheep" --k 2 --gallery build/gallery --engine engines/

# As many processes as cores, with a thread each for torch.
test: .venv/dev.stamp .venv/chromium.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The quick suite: ratios against transformers in the same run. benchmarks/README.md lists the long ones.
bench: .venv/dev.stamp
	$(BIN)/pytest benchmarks

# The wheels, native and pure, each in an environment of its own, with the captioner of `make demo`.
wheels: .venv/export.stamp
	$(BIN)/blip2rt export --precision int8 --output build/engines/captioner-int8 --force
	$(BIN)/python .ci/try_wheels.py engines/captioner-fp32-cpu build/engines/captioner-int8

# The native kernels under sanitizers and valgrind.
sanitize: .venv/dev.stamp
	$(BIN)/python .ci/check_kernels.py

docs: .venv/dev.stamp
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# An extra is installed again when what it depends on has changed, the native kernels included. dev contains export.
.venv/%.stamp: pyproject.toml CMakeLists.txt $(wildcard blip2rt/native/*.cpp blip2rt/native/*.h)
	@test -n "$(PYTHON)" || { echo "blip2rt needs Python 3.11 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@ $(if $(filter dev,$*),.venv/export.stamp)

# Without npm the tests of the page are skipped, and say why.
.venv/chromium.stamp: .venv/dev.stamp tests/get_chromium.py
	-$(BIN)/python tests/get_chromium.py .venv/chromium
	@touch $@
