#!/usr/bin/env bash
# The third study (PLAN.md): pre-trains every method and seed, then asks each net and a random one of the same seed.
#
#   docs/results/third/run.sh PHOTOS VOC OUT                            # as planned: narrow18 on a CPU
#   docs/results/third/run.sh PHOTOS VOC OUT device=cuda resnet=resnet50 size=128 epochs=9 seeds=0 methods="moco cp insloc"
#   docs/results/third/run.sh PHOTOS VOC OUT_FPN arch=fpn queue=128 methods="insloc cp ra insloc_all"   # without a detector
#
# PHOTOS holds train/ and val/ with class folders, VOC a VOC2007 tree. What is done is not done again: the same command goes on.
# insloc_all is insloc with the jittered box on all levels. OUT/METHOD_sSEED is a run; below it box/ holds probe_box.py's results,
# trained/ and frozen/ the detector's.
set -euo pipefail
photos=$(realpath "$1"); voc=$(realpath "$2"); mkdir -p "$3"; out=$(realpath "$3")
device=cpu; arch=c4; resnet=narrow18; size=96; queue=256; epochs=45; methods="insloc moco cp"; seeds="0 1"; lr=.1; batch=64
workers=1; images=1000; detector_size=128; iterations=3000; classes=cat,cow,dog,horse,sheep; python=${PYTHON:-python}
for setting in "${@:4}"; do declare "$setting"; done
cd "$(dirname "$0")/../../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
machine="--device $device --nprocs 1 --workers $workers --resume"

pretrain() {    # METHOD SEED
    local levels=""
    if [[ $1 = *_all ]]; then levels="--jitter-levels all"; fi
    "$python" pretrain.py "$photos/train" --arch "$arch" --method "${1%_all}" $levels --resnet "$resnet" --image-size "$size" \
        --batch-size "$batch" --bn-group 32 --queue-size "$queue" --fill-queue --ema .99 --lr "$lr" --epochs "$epochs" \
        --precision fp32 --save-steps 500 --log-every 20 --seed "$2" $machine --out "$out/$1_s$2"
}

ask() {         # WEIGHTS RUN SEED: swap, loose composites, and real boxes
    "$python" probe_box.py "$1" "$photos" --arch "$arch" --image-size "$size" --images "$images" --seed "$3" --resnet "$resnet" \
        --boxes "$out/voc_trainval.json" "$voc/VOC2007/JPEGImages" "$out/voc_test.json" "$voc/VOC2007/JPEGImages" \
        $machine --out "$2/box"
}

detect() {      # WEIGHTS FOLDER SEED RATE KEY VALUE ...: the C4 detector on VOC's photographs
    if [ -e "$2/results.json" ]; then return; fi
    "$python" finetune_det.py "$1" --protocol voc-c4 --data "$voc" --classes "$classes" --seed "$3" --out "$2" $machine \
        INPUT.MIN_SIZE_TRAIN "($detector_size,)" INPUT.MIN_SIZE_TEST "$detector_size" SOLVER.IMS_PER_BATCH 4 \
        SOLVER.BASE_LR "$4" SOLVER.MAX_ITER "$iterations" SOLVER.WARMUP_ITERS 50 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 \
        MODEL.RPN.POST_NMS_TOPK_TRAIN 200 MODEL.RPN.POST_NMS_TOPK_TEST 50 TEST.PRECISE_BN.NUM_ITER 50 "${@:5}"
}

for split in trainval test; do
    "$python" docs/results/first/voc2coco.py "$voc/VOC2007" "$split" "$out/voc_$split.json" > /dev/null
done
for seed in $seeds; do
    for method in $methods; do
        pretrain "$method" "$seed"
    done
done
for seed in $seeds; do
    for method in $methods; do
        ask "$out/${method}_s$seed" "$out/${method}_s$seed" "$seed"
    done
done
if [ "$arch" = fpn ]; then exit; fi
for seed in $seeds; do
    random=$out/random_s$seed
    mkdir -p "$random"
    if [ ! -e "$random/backbone.pth" ]; then            # BatchNorm's statistics of a random net, estimated on composites
        "$python" docs/results/second/reestimate.py "$resnet" "$photos" "$random/backbone.pth" "$seed" "$size"
    fi
    for net in random $methods; do
        detect "$out/${net}_s$seed/backbone.pth" "$out/${net}_s$seed/trained" "$seed" .02
    done
done
for seed in $seeds; do
    for net in random $methods; do
        detect "$out/${net}_s$seed/backbone.pth" "$out/${net}_s$seed/frozen" "$seed" .01 MODEL.BACKBONE.FREEZE_AT 5
    done
done
