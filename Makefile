# Each target works as the first command on a fresh machine: Linux, Python 3.11 or 3.12 with venv, a package registry.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# detectron2's Python sources at upstream a59f0563, compared file by file (docs/running.md says what differs); nothing that R-CNN
# training and COCO/VOC evaluation use is compiled. The wheel is tagged cp310, hence --python-version; the hash pins its bytes.
DETECTRON2 := sal-detectron2==0.7.2 --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561

.PHONY: install demo demo-detect test test-slow test-all gpu lint clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit(f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}: make $(MAKECMDGOALS) PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	echo '$(DETECTRON2)' > $(VENV)/detectron2.txt
	$(BIN)/pip install --disable-pip-version-check -q --require-hashes --no-deps --only-binary=:all: --python-version 3.10 --upgrade \
		--target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" -r $(VENV)/detectron2.txt
	$(BIN)/python -c 'import torchvision, detectron2, detectron2.engine, pycocotools'
	touch $@

# A toy pre-training that learns within minutes on two cores: what it draws and logs is what a real one draws and logs.
demo: install
	test -d toy || $(BIN)/python tools/toy.py toy
	$(BIN)/python pretrain.py --arch c4 --resnet narrow18 --image-size 64 --fg-size 56 64 --batch-size 64 --bn-group 32 \
		--queue-size 128 --fill-queue --ema 0.996 --lr 0.1 --epochs 54 --log-every 16 --device cpu --nprocs 1 --workers 1 \
		--out runs/demo --resume toy/swatches
	$(BIN)/python probe_cls.py runs/demo toy/swatches --knn 20 --image-size 64 --device cpu --nprocs 1 --out runs/demo_knn --resume
	@echo "Look at runs/demo/composites.png: the pairs that the network must match. Then at runs/demo/loss.png: the loss rises while"
	@echo "real keys fill the queue and then falls below chance, and acc_batch climbs to ten times its chance of 1/64. Above stands"
	@echo "the share of pictures whose 20 nearest neighbours name their hue, for a random and for the trained net."

# The whole chain on the toy world: pre-train an FPN, then Mask R-CNN from its weights and from random ones, on the CPU.
DETECT := --protocol coco-fpn-1x --data toy --device cpu --nprocs 1 --resume MODEL.RESNETS.DEPTH 18 \
	INPUT.MIN_SIZE_TRAIN "(128,)" INPUT.MIN_SIZE_TEST 128 SOLVER.IMS_PER_BATCH 2 SOLVER.BASE_LR 0.01 SOLVER.MAX_ITER 100 \
	SOLVER.WARMUP_ITERS 10 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.RPN.POST_NMS_TOPK_TEST 50 \
	TEST.DETECTIONS_PER_IMAGE 10 TEST.PRECISE_BN.NUM_ITER 10 TEST.EVAL_PERIOD 50

demo-detect: install
	test -d toy || $(BIN)/python tools/toy.py toy
	$(BIN)/python pretrain.py --arch fpn --resnet resnet18 --image-size 64 --batch-size 32 --bn-group 8 --queue-size 256 \
		--ema 0.99 --lr 0.005 --epochs 4 --device cpu --nprocs 1 --out runs/demo_fpn --resume toy/images
	$(BIN)/python finetune_det.py runs/demo_fpn --out runs/demo_detect $(DETECT)
	$(BIN)/python finetune_det.py random --out runs/demo_detect_random $(DETECT)
	@echo "Look at trial0/detections.png and results.json in runs/demo_detect (pre-trained) and runs/demo_detect_random"

# What a change needs, in under five minutes on two quiet cores; then the rest: kills, processes, fine-tunings.
test: install
	$(BIN)/python -m pytest -q -o tmp_path_retention_policy=none -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -q -o tmp_path_retention_policy=none -m slow

test-all: install
	$(BIN)/python -m pytest -q -o tmp_path_retention_policy=none

# On a machine with one NVIDIA GPU, without network: what only a GPU can tell, in about 20 minutes.
# IMAGES=/data/imagenet/train if such a folder is at hand.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_ROWS ?= 'step --arch c4' 'step --arch fpn' memory 'parts --arch c4' 'parts --arch fpn' kernels \
	'train --arch c4' 'precision --arch c4' 'compile --arch c4'
GPU_JSON ?= gpu.jsonl

gpu:
	-timeout 180 $(GPU_PYTHON) -m pytest -q tests/test_gpu.py
	@echo '| row | figure | measured |'; echo '|---|---|---|'
	@for row in $(GPU_ROWS); do \
		hide=; test "$$row" = kernels && hide=CUDA_VISIBLE_DEVICES=; \
		env $$hide timeout 180 $(GPU_PYTHON) tools/bench.py $$row $(GPU_FLAGS) --json $(GPU_JSON) $(IMAGES) \
			2> gpu.err || { echo "| $$row | FAILED | |"; tail -n 3 gpu.err; }; \
	done; rm -f gpu.err
	@if $(GPU_PYTHON) -c 'import detectron2' 2> /dev/null; then \
		test -d toy || $(GPU_PYTHON) tools/toy.py toy; \
		for protocol in coco-c4-1x coco-fpn-1x; do \
			timeout 180 $(GPU_PYTHON) finetune_det.py random --protocol $$protocol --data toy --nprocs 1 \
				--resume --out runs/gpu_$$protocol SOLVER.MAX_ITER 20 SOLVER.IMS_PER_BATCH 4 \
				SOLVER.AMP.ENABLED True TEST.PRECISE_BN.NUM_ITER 5 \
				|| echo "| finetune $$protocol | FAILED | |"; \
		done; \
	fi

lint: install
	@$(BIN)/ruff --version > /dev/null 2>&1 || $(BIN)/pip install --disable-pip-version-check -q ruff==0.14.0
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) toy runs
