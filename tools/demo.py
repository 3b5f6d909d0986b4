"""The last words of `make demo` and `make demo-detect`, from the files of their runs.

    python tools/demo.py pairs runs/demo runs/demo_knn
    python tools/demo.py detector runs/detect-pretrained runs/detect-random
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
    chance = results["chance"]
    colours = round(100 / chance)
    return f"""
The network has learnt from pictures without labels. Look at three things:
1. {run}/composites.png shows what it had to match: two crops of a picture, each pasted on another
   picture. A red box is the pasted crop. In the left one of a pair, the network was given the thick
   blue box instead.
2. {run}/loss.png shows how it learnt. acc_batch is how often it told the other crop of a picture
   from those of {batch - 1} other pictures: {found:.0%} of the time in the end, where guessing gives
   {1 / batch:.1%}.
3. It was never told the colour of a picture. The 20 training pictures that it finds most alike name
   the right one of {colours} colours for {trained:.0f} % of new pictures. A random network reaches
   {random:.0f} %, and guessing {chance:.0f} %."""


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
        "given": "Pre-training helped here, by more than the detector's seeds differ. How much it helps on\n"
                 "photographs is another question: these are generated pictures, and one short pre-training.",
        "random": "Here pre-training did harm, by more than the detector's seeds differ. These are\n"
                  "generated pictures, and one short pre-training.",
        "": "This does not show that pre-training helps, since the seeds differ about as much as the rows.\n"
            "It shows that the chain runs, from pictures without labels to a detector and its AP.",
    }[verdict(*figures.values())]
    look = f"""
trial0/detections.png in {given} and {random} show
boxes that were found, beside the true ones."""
    return "\n".join([look, *rows, last])


if __name__ == "__main__":
    print({"pairs": pairs, "detector": detector}[sys.argv[1]](*sys.argv[2:]))
