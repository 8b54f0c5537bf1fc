# `make demo` and `make test` set up .venv themselves; they need Python 3.11 or newer and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-newest test-lowest lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/elpv/demo.py

test: $(VENV)/test.stamp lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The tests with the newest release of every package that setup.py allows.
test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	$(VENV)-newest/bin/python -m pytest -n 2 --dist loadfile

# The tests with the oldest release of every package that setup.py names; uv is the tool that resolves to these.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet uv
	$(VENV)-lowest/bin/uv pip install --python $(VENV)-lowest/bin/python --resolution lowest-direct --editable '.[test]'
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The stamp is older than setup.py when a dependency changes, and the extra is installed again.
$(VENV)/%.stamp: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lowest runs data build *.egg-info
