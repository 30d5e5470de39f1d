# One command a chore; each makes its own virtual environment when there is none.
#   make demo    data, training, testing and pictures on the CPU in under ten minutes
#   make pictures   those of README.md, from the demo's results; needs chromium and chromedriver
#   make test    the fast tests      make test-slow   the slow ones      make lint   style and types
#   make test-gpu   what only a GPU can show
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
STAMP = $(VENV)/.installed

OPS = mmseg/models/decode_heads/mask2former/pixel_decoder/ops

.PHONY: demo pictures test test-slow test-gpu lint cuda-check format clean

$(STAMP): the_requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r the_requirements.txt
	$(BIN)/pip install -q -e '.[test,video]'
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py

pictures: $(STAMP)
	$(BIN)/python docs/make_pictures.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 1800

test-gpu: $(STAMP)
	THEMASK_TEST_GPU=1 $(BIN)/python -m pytest tests/test_gpu.py -n $(WORKERS) -m 'slow or not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

cuda-check: $(STAMP)
	PYTHON=$(CURDIR)/$(BIN)/python sh $(OPS)/make.sh --cuda

format: $(STAMP)
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
