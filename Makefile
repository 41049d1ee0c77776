# `make train` trains a language model on this machine; `make help` lists the rest.

NP   = 8
RUN  = runs/first
ARGS =

VENV   = .venv
PY     = $(VENV)/bin/python
MPIRUN = $(VENV)/bin/mpirun
READY  = $(VENV)/ready

.DEFAULT_GOAL = help
.PHONY: setup train test lint bench gpu-check doctor clean help

setup: $(READY)  ## make .venv with all that is needed (PYTHON=, TORCH_INDEX=; see setup-env.sh)

train: data/stdlib  ## train on Python's own source: NP=8 ranks, RUN=runs/first (ARGS="--train.steps 100")
	$(MPIRUN) -n $(NP) $(PY) -m mpipar.train --data.dir data/stdlib --run.dir $(RUN) $(ARGS)

test: $(READY)  ## run all tests: without MPI, then on 1, 2 and 4 ranks, then whole jobs
	@status=0; \
	part() { \
	    echo "== $$*"; begin=$$(date +%s); \
	    "$$@" && verdict=passed || { verdict=FAILED; status=1; }; \
	    summary="$$summary$$verdict in $$(($$(date +%s) - begin)) s: $$*\n"; \
	}; \
	part $(PY) -m pytest tests/single; \
	for n in 1 2 4; do part $(MPIRUN) -n $$n $(PY) -m pytest --color=no -p no:cacheprovider tests/parallel; done; \
	part $(PY) -m pytest tests/jobs; \
	printf "\n$$summary"; exit $$status

lint: $(READY)  ## check style and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

bench: $(READY)  ## time the all-reduce and the training step against MPI, gloo and DDP, on 2 ranks
	$(MPIRUN) -n 2 $(PY) -m benchmarks allreduce
	$(MPIRUN) -n 2 $(PY) -m benchmarks step

# Needs no .venv: make gpu-check PY=python3 MPIRUN=mpirun
gpu-check:  ## all that needs a GPU, in 8 minutes: tests, collectives, training, the same bits (PY=, MPIRUN=)
	$(PY) -m benchmarks.gpu_check --mpirun "$(MPIRUN)"

doctor: $(READY)  ## say what this machine offers, and what will bite
	$(MPIRUN) -n $(NP) $(PY) -m mpipar.doctor

clean:  ## remove what tests and tools leave; .venv, data and runs stay
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*##/  make \1\t/p' Makefile | expand -t 18

data/stdlib: | $(READY)
	$(MPIRUN) -n $(NP) $(PY) -m mpipar.data pack stdlib --out $@

$(READY): setup.py setup-env.sh $(wildcard mpipar/*/*.[ch])
	@./setup-env.sh
	@touch $@
