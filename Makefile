# Everything sets itself up: a machine with python3 and make is enough.
VENV ?= .venv
PYTHON_VERSION ?=
BIN := $(VENV)/bin
STUDY ?= studies/quickstart
# one process a core; the tests of a file stay together and share what they compile; the long files of few tests,
# which would come last by their number, stay in their place
PARALLEL ?= -n auto --dist loadfile --no-loadscope-reorder

# what a version of JAX, flax, optax or orbax changes first: programs, optimizers, checkpoints, the kernels' plain forms
in = $(patsubst %,tests/$(1)/test_%.py,$(2))
CORE := tests/test_imports.py tests/scaling/data \
  $(call in,scaling,train branches pack guard optim flops export tracking) \
  $(call in,scaling/models,model_lm model_loss model_families moe) \
  $(call in,pallas_kernels,kernel_attention linear_scan selective_scan mlstm sharding dispatch package) \
  $(call in,fits,compiled) $(call in,launch,cli preflight)

.PHONY: quickstart families test test-long test-fast test-oldest test-oldest-core aot aot-gpu oracles manifests lint format clean venv

venv:
	@python3 tools/venv.py $(VENV) $(if $(PYTHON_VERSION),--python $(PYTHON_VERSION))

quickstart: venv  ## plan, train, fit and report a small compute-optimal study (about 6 minutes on 2 cores)
	@$(BIN)/scaling plan experiments/quickstart.py --study $(STUDY)
	@$(BIN)/scaling run $(STUDY)
	@$(BIN)/scaling fit $(STUDY)
	@$(BIN)/scaling allocate $(STUDY) --budget 1e13
	@$(BIN)/scaling report $(STUDY)

families: venv  ## compare seven families of small models on this machine
	@$(BIN)/scaling families experiments/families.py

# The interpreter of GPU kernels holds a thread of XLA for each warpgroup that waits: two cores give too few.
test: venv lint  ## lint and the tests, of many slow cases alike a few
	@$(BIN)/python -m pytest -m "not long" $(PARALLEL)
	@NPROC=16 $(BIN)/python -m pytest tests/pallas_kernels/test_gpu_attention.py tests/pallas_kernels/test_ssd_gpu.py

test-long: venv  ## the slow cases that `make test` leaves out: training and coordinate checks of every family
	@$(BIN)/python -m pytest -m long -n auto

test-fast: venv  ## the tests that take seconds
	@$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-oldest:  ## the fast tests on the oldest supported pair, Python 3.11 with jax 0.10.2 (no interpreted kernels)
	@python3 tools/venv.py .venv-oldest --python 3.11
	@.venv-oldest/bin/python -m pytest -m "not slow" $(PARALLEL) --ignore-glob "*/pallas_kernels/*_[tg]pu.py" $(TESTS)

test-oldest-core:  ## of those the ones that meet JAX most, and a study from plan to fit
	@$(MAKE) test-oldest TESTS="$(CORE)"
	@.venv-oldest/bin/python -m pytest tests/launch/test_cli.py -k whole_path

aot:  ## compile every kernel with the real TPU compiler, for chips that are not here
	@python3 tools/venv.py .venv-aot --extras dev,tpu
	@JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest tests -m aot $(PARALLEL)

aot-gpu:  ## compile the GPU kernels for an H100 that is not here: no spills
	@python3 tools/venv.py .venv-aot-gpu --extras dev,aot-gpu
	@JAX_PLATFORMS=cpu .venv-aot-gpu/bin/python -m pytest tests -m aot_gpu

oracles:  ## compare with torch and transformers, in an environment of its own
	@python3 tools/venv.py .venv-oracles --python 3.11 --extras dev,oracles
	@.venv-oracles/bin/python -m pytest tests/oracles -m oracle

manifests:  ## validate the files of --on jobset and --on skypilot with Kubernetes' schemas and SkyPilot's loader
	@python3 tools/venv.py .venv-manifests --extras dev,manifests
	@python3 tools/venv.py .venv-skypilot --python 3.11 --requirements tests/manifests/skypilot.txt
	@.venv-manifests/bin/python -m pytest tests/manifests

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: venv
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-* studies build *.egg-info
