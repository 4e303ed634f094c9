.PHONY: style check docs test test-oldest test-slow test-transformers wheel

TRANSFORMERS_VERSION := $(shell python -c 'from importlib import metadata; print(metadata.version("transformers"))')
TRANSFORMERS_SOURCE := build/transformers-$(TRANSFORMERS_VERSION)

style:  ## format the code
	ruff check --fix .
	ruff format .

check:  ## what style would change
	ruff check .
	ruff format --check .

test:  ## minutes; no network
	python -m pytest

test-oldest: build/oldest/installed  ## the quick tests on the oldest versions that pyproject.toml admits
	HF_HUB_OFFLINE=1 build/oldest/bin/python -m pytest

build/oldest/installed: constraints/oldest.txt pyproject.toml
	rm -rf build/oldest
	python -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet --constraint constraints/oldest.txt --editable ".[test]"
	touch $@

test-slow: test-transformers  ## and the folders of four versions of transformers in one another; uses the package index
	python -m pytest -m slow

test-transformers: $(TRANSFORMERS_SOURCE)  ## transformers' own tests on our classes, with every skip and its reason
	python tests/transformers_suite/run.py --source $(TRANSFORMERS_SOURCE)
	python tests/transformers_suite/run.py --source $(TRANSFORMERS_SOURCE) --remote-code

build/transformers-%:
	mkdir -p build
	python -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest build transformers==$*
	tar --extract --file build/transformers-$*.tar.gz --directory build
	touch $@

wheel:  ## the distribution
	python -m build

docs:  ## the site, in build/site; needs pip install -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build
