"""The last words of `make demo` and `make demo-detect`, from the files of their runs.

    python tools/demo.py pairs runs/demo runs/demo_knn
    python tools/demo.py detector runs/demo_detect runs/demo_detect_random
"""
import json
import sys
from statistics import mean


def read_json(path):
    with open(path) as f:
        return json.load(f)


def pairs(run, knn):
    """What a pre-training on swatches has learnt: `run` is pretrain.py's folder, `knn` is probe_cls.py's."""
    with open(f"{run}/log.jsonl") as f:
        records = [json.loads(line) for line in f]
    batch = records[0]["args"]["batch_size"]
    steps = [record for record in records if "acc_batch" in record]
    found = mean([record["acc_batch"] for record in steps[-len(steps) // 10:]])
    results = read_json(f"{knn}/results.json")
    trained = results["results"]["given"]["top1"]
    random = results["results"]["random"]["top1"]
    return f"""
The network has learnt from pictures without labels. Look at three things:
1. {run}/composites.png shows what it had to match: a piece of a picture, pasted at two places on other
   pictures. The red box is the pasted piece. The network gets the blue box, which is a little off.
2. {run}/loss.png shows how it learnt. acc_batch is how often a piece is told from {batch - 1} others: in the end
   {found:.0%} of the time, by guessing {1 / batch:.1%}.
3. The colours of new pictures, which it was never told. The 20 pictures that the network finds most alike
   tell the right one of {round(100 / results["chance"])} colours for {trained:.0f} % of them. With a random network it is {random:.0f} %, \
by guessing {results["chance"]:.0f} %."""


def verdict(given, random):
    """Which of two lists of figures, one of each seed, is higher, if the seeds' noise does not explain it.

    All of the one must lie above all of the other, and their means apart by more than twice the larger
    distance between two seeds. Returns "given", "random" or "".
    """
    spread = max(max(given) - min(given), max(random) - min(random))
    if min(given) > max(random) and mean(given) - mean(random) > 2 * spread:
        return "given"
    if min(random) > max(given) and mean(random) - mean(given) > 2 * spread:
        return "random"
    return ""


def detector(given, random):
    """A detector that starts from pre-trained weights beside one that starts from random ones."""
    figures = {}
    rows = [f"{'':24}{'AP50, a figure for each seed':<40}mean"]
    for name, folder in (("from pre-training", given), ("from random weights", random)):
        trials = read_json(f"{folder}/results.json")["trials"]
        figures[name] = [trial["bbox"]["AP50"] for trial in trials]
        each = "".join(f"{value:8.1f}" for value in figures[name])
        rows.append(f"{name:<24}{each:<40}{mean(figures[name]):.1f}")
    last = {
        "given": "Pre-training helped here, by more than the seeds differ. These are generated pictures and few "
                 "steps: how much it\nhelps on photographs is another question.",
        "random": "Here pre-training did harm, by more than the seeds differ. These are generated pictures and "
                  "few steps.",
        "": "The seeds differ as much as the two rows do, so this does not show that pre-training helps. It "
            "shows that the chain\nruns, from pictures to a detector and its AP.",
    }[verdict(*figures.values())]
    return "\n".join(["", f"Boxes found (AP50, percent) in {given} and {random};", "trial0/detections.png in "
                      "each shows some, the truth on the left.", *rows, last])


if __name__ == "__main__":
    print({"pairs": pairs, "detector": detector}[sys.argv[1]](*sys.argv[2:]))
