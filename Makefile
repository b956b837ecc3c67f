# Six verbs. `make serve` and `make test` work on a machine that has python3 (3.11 or newer) and make.

PYTHON ?= python3
# The uv of this machine, or one of the project's own.
UV ?= $(shell command -v uv || echo .uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never

.DEFAULT_GOAL := all
.PHONY: all install check test fix serve lock

all: check test

install: .venv/installed

serve: install
	.venv/bin/hazelnut serve

test: install
	.venv/bin/python -m pytest

check: install
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

fix: install
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# Everything at the version and with the hash that requirements/dev.txt names, then the project itself.
.venv/installed: requirements/dev.txt pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip sync --quiet --require-hashes --python .venv requirements/dev.txt
	$(UV) pip install --quiet --no-deps --no-build-isolation --python .venv --editable .
	touch $@

# Debian keeps venv in a package of its own; pip alone will do.
.uv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11: set PYTHON=... to a newer one." >&2; exit 1; }
	$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet uv \
		|| { rm -rf .uv && $(PYTHON) -m pip install --quiet --target .uv uv; } \
		|| { echo "$(PYTHON) has neither venv nor pip: install one (python3-venv on Debian), or uv." >&2; exit 1; }

# The newest versions that fit pyproject.toml. --no-header and no index options: the locks name no addresses.
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --upgrade
lock: | $(UV)
	$(COMPILE) pyproject.toml --extra service --output-file requirements/service.txt
	$(COMPILE) pyproject.toml --extra training --output-file requirements/training.txt
	$(COMPILE) pyproject.toml --all-extras --group dev --output-file requirements/dev.txt
