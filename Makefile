# Two commands: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check
STAMP = .venv/.installed
WORKERS ?= 2

.PHONY: install demo test check clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "taskray needs Python 3.11 or newer; $$($(PYTHON) --version) was found. Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "taskray needs Python's venv and pip (on Debian: apt-get install python3-venv python3-pip)"; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "Installing taskray and the pinned versions of constraints.txt into .venv (a few minutes) ..."
	@$(PIP) install -q -c constraints.txt -e '.[dev]' || \
		{ echo "The installation failed, see above. The pinned torch (constraints.txt) must be one that pip can find for your Python and machine."; exit 2; }
	@touch $(STAMP)

demo: install
	@echo; echo "1/2  every task alone, on simulated labels"
	@.venv/bin/taskray train jobs/depth_normals.yaml --out runs/demo/alone --resume never \
		--set consistency.depth_normals.weight=0
	@echo; echo "2/2  the collective: the same labels, and consistency on unlabelled real frames"
	@.venv/bin/taskray train jobs/depth_normals.yaml --out runs/demo/collective --resume never
	@echo; echo "What consistency gains, on real-domain test frames that no training step has seen:"
	@.venv/bin/taskray report runs/demo/collective --baseline runs/demo/alone

# Tests on Ray one after the other: they use both cores, and look at what happens when.
test: install
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not ray" -n $(WORKERS) --dist loadfile
	.venv/bin/python -m pytest -m ray

check: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
