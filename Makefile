# Each target works as the first command on a fresh machine: Linux, Python 3.11 to 3.13 with venv, a package registry.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/python
SHELL  := /bin/bash
.SHELLFLAGS := -o pipefail -c

# No setting of this machine decides what is installed, or where. pip and Python would take what lies on PYTHONPATH for
# installed. Container images pin their own torch by PIP_CONSTRAINT. The others name another folder, leave packages out, or ask
# for files that the registry lacks. A pip.conf may say `user = true`. Index, proxy, certificate and cache stay as they are.
unexport PYTHONPATH PYTHONHOME PIP_PYTHON PIP_TARGET PIP_PREFIX PIP_ROOT PIP_CONSTRAINT PIP_REQUIREMENT PIP_NO_DEPS PIP_DRY_RUN
unexport PIP_REQUIRE_HASHES PIP_REQUIRE_VIRTUALENV PIP_NO_BINARY PIP_ONLY_BINARY PIP_PLATFORM PIP_PYTHON_VERSION PIP_ABI PIP_PRE
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# detectron2's Python sources at upstream a59f0563, compared file by file (docs/running.md says what differs). Nothing that R-CNN
# training and COCO/VOC evaluation use is compiled. The wheel is tagged cp310, hence --python-version; the hash pins its bytes.
DETECTRON2 := sal-detectron2==0.7.2 --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561

.PHONY: install demo demo-pretraining demo-detect detect-pretrained detect-random test test-slow test-all gpu lint clean

install: $(VENV)/installed

VERSION := $$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

$(VENV)/installed: requirements.txt Makefile
	@case $(VERSION) in "") exit 1 ;; 3.1[1-3]) ;; \
		3.1[4-9]) echo "NOTE: this was never run on Python $(VERSION), only on 3.11, 3.12 and 3.13." ;; \
		*) echo "Python 3.11 to 3.13 is needed, this is $(VERSION): make install PYTHON=python3.12" >&2; exit 1 ;; esac
	@echo "Installing torch, torchvision, detectron2 and what they need into $(VENV), for Python $(VERSION). This downloads 3.1 GB,"
	@echo "takes 5.7 GB of disk, and minutes, as network, disk and processor are. Nothing is printed meanwhile."
	@$(BIN)/pip --version 2> /dev/null | grep -qF "(python $(VERSION))" || \
		$(PYTHON) -m venv $(if $(wildcard $(VENV)/pyvenv.cfg),--clear) $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	@echo '$(DETECTRON2)' > $(VENV)/detectron2.txt
	$(BIN)/pip install -q --require-hashes --no-deps --only-binary=:all: --python-version 3.10 --upgrade \
		--target "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" -r $(VENV)/detectron2.txt
	@$(RUN) -c 'import torch, torchvision, pycocotools, pytest, safetensors, matplotlib, tensorboard'
	@$(RUN) -W ignore -c 'import detectron2.engine' || case $(VERSION) in 3.1[1-3]) exit 1 ;; \
		*) echo "NOTE: detectron2 does not work here: stage 3, finetune_det.py, is missing. Stages 1 and 2 do without it." ;; esac
	@touch $@
	@echo "Ready: $(RUN) has all that the stages need."

toy: | install
	$(RUN) tools/toy.py toy

# A pre-training in small that learns within minutes on two cores. One thread for the network and one process for the
# pictures: beside other work, more threads would wait for each other.
SMALL := OMP_NUM_THREADS=1 $(RUN)

demo-pretraining: install | toy
	@echo "A small network is pre-trained in 864 steps, which takes minutes on two idle cores. Every 4 steps print a line."
	$(SMALL) pretrain.py --arch c4 --resnet narrow18 --image-size 64 --batch-size 64 --bn-group 32 --queue-size 128 \
		--fill-queue --ema 0.996 --lr 0.1 --epochs 54 --log-every 4 --device cpu --nprocs 1 --workers 1 \
		--out runs/demo --resume toy/swatches

demo: demo-pretraining
	@echo "Its features, and those of a random network, are now compared on pictures that it never saw."
	@$(SMALL) probe_cls.py runs/demo toy/swatches --knn 20 --image-size 64 --device cpu --nprocs 1 --workers 1 \
		--out runs/demo_knn --resume > runs/demo_knn.txt
	@$(RUN) tools/demo.py pairs runs/demo runs/demo_knn

# The whole chain: the same pre-training, then the paper's detector in small, from these weights and from random ones.
ITERATIONS := 250
DETECTOR := --protocol voc-c4 --data toy --classes circle,cross,square,star,triangle --trials 3 \
	--device cpu --nprocs 1 --workers 0 --resume INPUT.MIN_SIZE_TRAIN "(128,)" INPUT.MIN_SIZE_TEST 128 \
	SOLVER.IMS_PER_BATCH 4 SOLVER.BASE_LR 0.02 SOLVER.MAX_ITER $(ITERATIONS) SOLVER.WARMUP_ITERS 20 \
	MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 MODEL.RPN.POST_NMS_TOPK_TRAIN 200 MODEL.RPN.POST_NMS_TOPK_TEST 50 \
	TEST.DETECTIONS_PER_IMAGE 10 TEST.PRECISE_BN.NUM_ITER 10
NARROW := MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.BACKBONE.NAME build_narrow_backbone
# Of what a training prints, its progress alone; all of it goes to a file.
PROGRESS = tee runs/$@.txt | sed -un 's/.*iter: *\([0-9]*\) *total_loss: *\([0-9.]*\).*/$@: iteration \1 of $(ITERATIONS), loss \2/p;s/^trial/$@: &/p'

demo-detect: demo-pretraining
	@echo "Two detectors are now trained at once, three times each: from the pre-trained network, and from random weights."
	@$(MAKE) --no-print-directory -j 2 detect-pretrained detect-random
	@$(RUN) tools/demo.py detector runs/detect-pretrained runs/detect-random

detect-pretrained:
	@$(SMALL) finetune_det.py runs/demo --out runs/$@ $(DETECTOR) | $(PROGRESS)

detect-random:
	@$(SMALL) finetune_det.py random --out runs/$@ $(DETECTOR) $(NARROW) | $(PROGRESS)

# What a change needs, in under five minutes on two quiet cores; then the rest: kills, processes, fine-tunings.
test: install
	$(RUN) -m pytest -q -m "not slow"

test-slow: install
	$(RUN) -m pytest -q -m slow

test-all: install
	$(RUN) -m pytest -q

# On a machine with one NVIDIA GPU: what only a GPU can tell, in nine minutes. Needs no network and no detectron2, and takes
# `python3` where `make install` was not run. IMAGES=/data/imagenet/train if such a folder is at hand.
GPU_PYTHON ?= $(if $(wildcard $(RUN)),$(RUN),PYTHONPATH="$(PYTHONPATH)" $(PYTHON))
GPU_JSON ?= gpu.jsonl

gpu:
	$(GPU_PYTHON) tools/bench.py gpu --json $(GPU_JSON) $(GPU_FLAGS) $(IMAGES)

lint: install
	@$(BIN)/ruff --version > /dev/null 2>&1 || $(BIN)/pip install -q ruff==0.14.0
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) toy runs/demo* runs/detect-*
