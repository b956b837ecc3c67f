# Eight verbs. `make serve` and `make test` work on a machine that has python3 (3.11 or newer) and make.

PYTHON ?= python3
# The uv of this machine, or one of the project's own.
UV ?= $(shell command -v uv || echo .uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never
# Of this machine, or the project's own; see below.
PROMTOOL := $(shell command -v promtool || echo .promtool/usr/bin/promtool)

.DEFAULT_GOAL := all
.PHONY: all install check test test-browser fix serve lock release-check

all: check test

install: .venv/installed

serve: install
	.venv/bin/hazelnut serve

# Two at a time. Without -n they run one after the other, as a debugger wants them.
test: install
	.venv/bin/python -m pytest -n 2 --dist worksteal

# The page in a real browser; it also makes the pictures of it in docs/images.
test-browser: .venv/browser
	@command -v chromium >/dev/null \
		|| { echo "chromium is not installed: install it (apt-get install chromium on Debian) and try again." >&2; exit 1; }
	.venv/bin/python -m pytest tests/browser

check: install $(PROMTOOL)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/hadolint Dockerfile
	.venv/bin/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml docker-compose.gpu.yml
	.venv/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml

fix: install
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# Everything at the version and with the hash that requirements/dev.txt names, then the project itself.
.venv/installed: requirements/dev.txt pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip sync --quiet --require-hashes --python .venv requirements/dev.txt
	$(UV) pip install --quiet --no-deps --no-build-isolation --python .venv --editable .
	touch $@

.venv/browser: requirements/browser.txt .venv/installed
	$(UV) pip install --quiet --require-hashes --python .venv --requirement requirements/browser.txt
	touch $@

# Tests the alerts. No wheel has it, but Debian's packages do, and are unpacked here without root. Where there is no such
# package, this line says so, and so does the test that is skipped.
.promtool/usr/bin/promtool:
	@mkdir -p .promtool && cd .promtool \
		&& { apt-get download prometheus || { apt-get update && apt-get download prometheus; }; } >apt.log 2>&1 \
		&& dpkg-deb --fsys-tarfile prometheus_*.deb | tar --extract ./usr/bin/promtool && rm prometheus_*.deb \
		|| echo "promtool cannot be had here (.promtool/apt.log): the alerts in deploy/ are not tested." >&2

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
	$(COMPILE) --group browser --constraint requirements/dev.txt --output-file requirements/browser.txt

# Before a tag. The version is in pyproject.toml; whatever repeats it is held to that by a test.
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
release-check:
	@test -z "$$(git status --porcelain)" || { echo "The tree has changes that are not committed." >&2; exit 1; }
	@grep --quiet --fixed-strings "## [$(VERSION)]" CHANGELOG.md || { echo "CHANGELOG.md has no $(VERSION)." >&2; exit 1; }
	$(MAKE) check test
