# Shortcuts; every target is a command that also works alone.
PYTHON ?= python

.PHONY: style test bench docs site release

style:  ## lint, format check, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:  ## all tests, on all cores
	$(PYTHON) -m pytest

bench:  ## measure accuracy again on the embedded models (hours on a laptop; needs committed code)
	$(PYTHON) -m benchmarks.accuracy.run

docs:  ## rebuild every page and picture from the stored results
	$(PYTHON) -m benchmarks.pages
	$(PYTHON) -m benchmarks.figures
	$(PYTHON) -m benchmarks.picture

site:  ## build the site into build/site; needs the extra [docs]
	$(PYTHON) -m mkdocs build --strict

release:  ## build both wheels and the sdists into dist/; .ci/run wheels also uses them without the checkout
	rm -rf dist build zoo/build
	$(PYTHON) -m build --outdir dist .
	$(PYTHON) -m build --outdir dist zoo
	$(PYTHON) -m twine check --strict dist/*
	rm -rf build zoo/build
