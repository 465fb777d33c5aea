# make run       accuracy against budget on the embedded models: table, plot, report   (FAST=1: a smaller subset)
# make test      default tests           make test-slow   the slow ones
# make test-oldest  the contract tests on the oldest supported transformers
# make test-vllm the vLLM plugin, in .venv-vllm: an environment of its own (4 minutes, 3 GB)
# make lint      ruff check and format   make types       pyright
# make bench     speed and memory
# make demo      the browser demo on http://127.0.0.1:7860
# Every target sets up .venv by itself the first time and whenever pyproject.toml changes.

PYTHON ?= python3
# torch and torchvision only fit in matching pairs, so both are pinned, and first: a later "torch>=" is then satisfied.
# For another pair (a CPU build, say): make setup TORCH="torch==2.9.1 torchvision==0.24.1"
TORCH ?= torch==2.14.1 torchvision==0.29.1
# --no-deps: lmms-eval asks for 49 packages, about 1 GB; the part used here needs those of the extra eval-light
LMMS_EVAL ?= lmms-eval==0.7.3
OUT ?= runs
MODELS ?= tiny:llava,tiny:qwen2_vl,tiny:internvl
# the named methods, the strongest rivals and the baselines, two with depths that suit twelve layers, and chains of a cut
# in the tower with one in the decoder; METHODS=all runs everything that is registered, in about twice the time
METHODS ?= atp,cdpruner,divprune,dyvte,fastv,flowcut,gemfilter,pool,random,relevance,sparsevlm,transprune,uniform,visionzip,gemfilter(layer=3),transprune(layers=(5,6,8)),flowcut(text_cut=False)@1/2+gemfilter(layer=3),flowcut@1/3+transprune(layers=(5,6,8))
ARGS ?=
# the oldest supported transformers, and the hub client it needs, in a folder that goes before the environment's own
OLDEST ?= transformers==5.16.*
OLDEST_HUB ?= huggingface_hub<2
CONTRACT := $(addprefix tests/test_,families.py invariants.py conversations.py generation.py tower.py signals.py any_token.py)
# test processes; each loads torch once
JOBS ?= 2

VENV := .venv
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.ready
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: run test test-slow test-oldest test-vllm lint types bench demo setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,eval-light]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps '$(LMMS_EVAL)'
	touch $@

run: $(STAMP)
	$(BIN)/vtprune eval --model $(MODELS) --methods '$(METHODS)' --out $(OUT)/latest $(if $(filter 1,$(FAST)),--fast) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

test-oldest: $(STAMP)
	rm -rf .oldest
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .oldest '$(OLDEST_HUB)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .oldest --no-deps '$(OLDEST)'
	PYTHONPATH=.oldest $(BIN)/python -c "import transformers as t; assert t.__version__.startswith('5.16'), t"
	PYTHONPATH=.oldest $(BIN)/python -m pytest -n $(JOBS) $(CONTRACT) $(ARGS)

# the tool that builds vtprune is on the frozen list too
$(VLLM_STAMP): pyproject.toml tests/serving/requirements.txt tests/serving/torchvision_beside_cpu.py
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r tests/serving/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	site=$$($(VLLM_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])") && \
		cp tests/serving/torchvision_beside_cpu.py $$site && echo "import torchvision_beside_cpu" >$$site/torchvision_beside_cpu.pth
	touch $@

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -c tests/serving/pytest.ini tests/serving $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/vtprune bench --model random:llama-0.3b --methods all --keeps 1/3,2/9,1/9 --out $(OUT)/bench.jsonl --table $(OUT)/bench.md --plot $(OUT)/bench.png $(ARGS)

demo: $(STAMP)
	$(BIN)/vtprune demo $(ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) .oldest build dist
