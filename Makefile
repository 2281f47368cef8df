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
	$(PYTHON) -m benchmarks.accuracy.report
	for part in unseen counting chance hard long; do \
	  $(PYTHON) -m benchmarks.accuracy.report --results benchmarks/accuracy/$$part || exit 1; done
	$(PYTHON) -m benchmarks.accuracy.studies.baselines
	for study in choose margin adsc ccam selector selector_features tower long_video newer retrieval session \
	  "long_video --model tiny-llava-onevision"; do \
	  $(PYTHON) -m benchmarks.accuracy.studies.$$study --report > /dev/null || exit 1; done
	for page in models.prefill models.chunked_prefill models.tower serving.run serving.ratio_zero \
	  serving.positions serving.agents peers.run gpu.prefill kernels.weights real.run real.clips real.candidates \
	  real.clip_answers sounds.run files.clock files.stream files.accuracy; do \
	  $(PYTHON) -m benchmarks.$$page --report > /dev/null || exit 1; done
	$(PYTHON) -m benchmarks.gpu.recompute
	$(PYTHON) -m benchmarks.kernels.roofline
	$(PYTHON) -m benchmarks.picture

site:  ## build the site into build/site; needs the extra [docs]
	$(PYTHON) -m mkdocs build --strict

release:  ## build both wheels and the sdists into dist/; .ci/run wheels also uses them without the checkout
	rm -rf dist build zoo/build
	$(PYTHON) -m build --outdir dist .
	$(PYTHON) -m build --outdir dist zoo
	$(PYTHON) -m twine check --strict dist/*
	rm -rf build zoo/build
