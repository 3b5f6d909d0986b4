# Each target works as the first command on a fresh machine: Linux, Python 3.11 or 3.12 with venv, a package registry.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# detectron2's Python sources at upstream a59f0563, compared file by file (the README says what differs); nothing that R-CNN
# training and COCO/VOC evaluation use is compiled. The wheel is tagged cp310, hence --python-version; the hash pins its bytes.
DETECTRON2 := sal-detectron2==0.7.2 --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561

.PHONY: install demo test clean

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

# A toy pre-training, on the CPU on purpose: what it draws and logs is what a real one draws and logs.
demo: install
	test -d toy || $(BIN)/python tests/toy.py toy
	$(BIN)/python pretrain.py --arch c4 --resnet resnet18 --image-size 64 --batch-size 32 --bn-group 8 --queue-size 256 \
		--ema 0.99 --lr 0.02 --epochs 8 --device cpu --nprocs 1 --out runs/demo --resume toy/images
	@echo "Look at runs/demo/composites.png (what the network sees) and runs/demo/loss.png; the weights are in runs/demo/backbone.pth"

test: install
	$(BIN)/python -m pytest -q tests

clean:
	rm -rf $(VENV) toy runs
