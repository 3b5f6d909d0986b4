# Each target works as the first command on a fresh machine: Linux, Python 3.11 to 3.13 with venv, a package registry.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SHELL  := /bin/bash
.SHELLFLAGS := -o pipefail -c
# What lies on PYTHONPATH would take the place of what is in the environment (`gpu` may run without one).
RUN    := env -u PYTHONPATH -u PYTHONHOME $(BIN)/python

.PHONY: install demo demo-detect demo-pretrained demo-random test test-slow test-all gpu lint clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt tools/install.py
	@env -u PYTHONPATH -u PYTHONHOME $(PYTHON) tools/install.py $(VENV)
	@touch $@

toy: | install
	$(RUN) tools/toy.py toy

# A pre-training in small that learns within minutes on two cores. One thread for the network, one process for the
# pictures: on a machine that does other work, too, more threads would wait for each other.
demo: install | toy
	@echo "A small network is pre-trained in 864 steps: minutes on two idle cores. A line is printed every 4 steps."
	OMP_NUM_THREADS=1 $(RUN) pretrain.py --arch c4 --resnet narrow18 --image-size 64 --batch-size 64 --bn-group 32 \
		--queue-size 128 --fill-queue --ema 0.996 --lr 0.1 --epochs 54 --log-every 4 --device cpu --nprocs 1 --workers 1 \
		--out runs/demo --resume toy/swatches
	@echo "Its features, and those of a random network, are compared on pictures that it never saw."
	@OMP_NUM_THREADS=1 $(RUN) probe_cls.py runs/demo toy/swatches --knn 20 --image-size 64 --device cpu --nprocs 1 \
		--out runs/demo_knn --resume > runs/demo_knn.txt
	@$(RUN) tools/demo.py pairs runs/demo runs/demo_knn

# The whole chain on the toy world: pre-train an FPN, then Mask R-CNN from its weights and from random ones, on the CPU.
DETECT := --protocol coco-fpn-1x --data toy --device cpu --nprocs 1 --resume MODEL.RESNETS.DEPTH 18 \
	INPUT.MIN_SIZE_TRAIN "(128,)" INPUT.MIN_SIZE_TEST 128 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.01 SOLVER.MAX_ITER 100 \
	SOLVER.WARMUP_ITERS 10 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.RPN.POST_NMS_TOPK_TEST 50 \
	TEST.DETECTIONS_PER_IMAGE 10 TEST.PRECISE_BN.NUM_ITER 10 TEST.EVAL_PERIOD 50

demo-detect: install | toy
	$(RUN) pretrain.py --arch fpn --resnet resnet18 --image-size 64 --batch-size 32 --bn-group 8 --queue-size 256 \
		--ema 0.99 --lr 0.005 --epochs 4 --device cpu --nprocs 1 --out runs/demo_fpn --resume toy/images
	$(RUN) finetune_det.py runs/demo_fpn --out runs/demo_detect $(DETECT)
	$(RUN) finetune_det.py random --out runs/demo_detect_random $(DETECT)

# What a change needs, in under five minutes on two quiet cores; then the rest: kills, processes, fine-tunings.
test: install
	$(RUN) -m pytest -q -m "not slow"

test-slow: install
	$(RUN) -m pytest -q -m slow

test-all: install
	$(RUN) -m pytest -q

# On a machine with one NVIDIA GPU: what only a GPU can tell, in nine minutes. Needs no network and no detectron2, and takes
# `python3` where `make install` was not run. IMAGES=/data/imagenet/train if such a folder is at hand.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(RUN),$(PYTHON))
GPU_JSON ?= gpu.jsonl

gpu:
	$(GPU_PYTHON) tools/bench.py gpu --json $(GPU_JSON) $(GPU_FLAGS) $(IMAGES)

lint: install
	@$(BIN)/ruff --version > /dev/null 2>&1 || $(RUN) tools/install.py $(VENV) ruff==0.14.0
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) toy runs/demo*
