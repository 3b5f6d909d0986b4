"""The rows of the tables in this folder's README.md and in the project's, computed from the raw files here.

    python docs/results/check.py            # prints the rows; status 1 if a page lacks one of them
"""
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
NAMES = {"random": "random", "random_bn": "random, BN estimated", "moco": "MoCo v2", "ra": "RA", "cp": "CP",
         "insloc": "InsLoc", "moco_bn": "MoCo v2, BN estimated", "cp_bn": "CP, BN estimated",
         "insloc_bn": "InsLoc, BN estimated"}
SECOND = {"narrow18": (0, 1), "resnet18": (0,)}                                     # trunk: seeds
STEPS = {"narrow18": 3060, "resnet18": 1500}                        # at which the nets were probed
SECOND_ROWS = {"narrow18": ("random", "random_bn", "moco", "cp", "insloc"),
               "resnet18": ("random", "random_bn", "moco", "insloc")}
FIRST = {"random": ["random"], "moco": ["moco_s0", "moco_s1"], "ra": ["ra_s0", "ra_s1"], "cp": ["cp_s0"],
         "insloc": ["insloc_s0", "insloc_s1"]}


def read(*names):
    """A JSON file beside this one; of a log.jsonl the logged steps."""
    with open(os.path.join(HERE, *names)) as file:
        if names[-1] == "log.jsonl":
            return [line for line in map(json.loads, file) if "loss" in line]
        return json.load(file)


def number(value, digits):
    value = round(value, digits) or 0.0                             # never -0
    return f"{value:.{digits}f}".replace("0.", ".", 1 if abs(value) < 1 else 0)


def cell(values, digits):
    """'.91, .88': one value for each seed."""
    return ", ".join(number(value, digits) for value in values) or "not run"


def row(*cells):
    return f"| {' | '.join(cells)} |"


def mean_accuracy(lines):
    """acc_batch on average over log lines."""
    return sum(line["acc_batch"] for line in lines) / len(lines)


# ---- The second study ------------------------------------------------------------------------------------

def probed(trunk, method, file, value):
    """value(result) of each seed of a rung, as far as it was run. A random net's stands in InsLoc's files."""
    run = "insloc" if method == "random" else method
    net = "random" if method == "random" else "given"
    paths = [("second", trunk, f"{run}_s{seed}", file) for seed in SECOND[trunk]]
    return [value(result_of(read(*path), net)) for path in paths if os.path.exists(os.path.join(HERE, *path))]


def result_of(results, net):
    """Of a probe's results.json: {protocol: line}, or the accuracies; of log.jsonl all lines."""
    if isinstance(results, list):
        return results
    if "lines" in results:
        return {line["protocol"]: line for line in results["lines"] if line["net"] == net}
    return results["results"].get(net)


def swap(trunk, method, key):
    return probed(trunk, method, "swap.json", lambda result: result["swap"][key])


def margins(trunk, method):
    return [same - leak for same, leak in zip(swap(trunk, method, "same_instance"),
                                              swap(trunk, method, "same_background"))]


def inside(trunk, method):
    return [100 * value for value in swap(trunk, method, "gradient_inside")]


def place(trunk, method, protocol):
    return probed(trunk, method, "loc.json", lambda result: result[protocol]["top1"])


def accuracy(trunk, method, readout):
    """Of the readout knn, lin or lin01 (rate 30, .1); linear layers on random nets were not trained."""
    if method == "random" and readout != "knn":
        return []
    return probed(trunk, method, f"{readout}.json", lambda result: result["top1"])


def learnt(trunk, method):
    """acc_batch over the last 100 steps before the probes: five log lines."""
    def last(lines):
        return mean_accuracy([line for line in lines if line["step"] <= STEPS[trunk]][-5:])

    return probed(trunk, method, "log.jsonl", last)


def background_table():
    for trunk, methods in SECOND_ROWS.items():
        for method in methods:
            yield row(f"{trunk}, {NAMES[method]}",
                      *[cell(swap(trunk, method, key), 2) for key in ("same_instance", "same_background",
                                                                     "same_place")],
                      cell(margins(trunk, method), 2), cell(swap(trunk, method, "top1"), 1),
                      cell(inside(trunk, method), 1))


def class_and_place_table():
    for trunk, methods in SECOND_ROWS.items():
        for method in (name for name in methods if name != "random_bn"):
            yield row(f"{trunk}, {NAMES[method]}",
                      "" if method == "random" else cell(learnt(trunk, method), 2),
                      *[cell(accuracy(trunk, method, readout), 1) for readout in ("knn", "lin", "lin01")],
                      *[cell(place(trunk, method, protocol), 1) for protocol in ("full", "reflect", "alone")])


# ---- The third study -------------------------------------------------------------------------------------

def asked(method, protocol, *keys, first=False):
    """For each seed that was run, a figure of probe_box.py, or the first less the others.

    The random nets stand in InsLoc's files. Loose boxes were measured twice; loose.json is the second time.
    """
    net = method if method.startswith("random") else "given"
    run = "insloc" if method.startswith("random") else method
    names = keys
    if first:
        names = [key.replace("class_own", "class_pasted") for key in keys]
    found = []
    for results in third(run, "box.json" if protocol == "swap" or first else "loose.json"):
        for line in results["lines"]:
            if line["protocol"] == protocol and line["net"] == net:
                values = [line[name] for name in names]
                found.append(values[0] - sum(values[1:]))
    return found


def third(run, file):
    """A file of each seed, as far as there is one."""
    paths = [("third", f"{run}_s{seed}", file) for seed in (0, 1)]
    return [read(*path) for path in paths if os.path.exists(os.path.join(HERE, *path))]


def detected(method, layers, metric):
    """A metric of boxes of the detector whose `layers` (all trained, or the trunk frozen) were fine-tuned."""
    return [results["mean"][metric] for results in third(method, f"{layers}.json")]


def third_swap_table():
    for method in ("random", "moco", "cp", "insloc"):
        accuracies = [mean_accuracy(lines[-5:]) for lines in third(method, "log.jsonl")]
        cosines = []
        for key in ("same_instance", "same_background", "same_place"):
            cosines.append(cell(asked(method, "swap", key), 2))
        cosines.append(cell(asked(method, "swap", "same_instance", "same_background"), 2))      # the margin
        inside = [100 * value for value in asked(method, "swap", "gradient_inside")]
        yield row(NAMES[method], "" if method == "random" else cell(accuracies, 2), *cosines,
                  cell(asked(method, "swap", "top1"), 1), cell(inside, 1))


def loose_table():
    for protocol, pictures in (("loose", "composites"), ("boxes", "VOC")):
        for method in ("random_bn", "moco", "cp", "insloc", "moco_bn", "cp_bn", "insloc_bn"):
            yield row(f"{pictures}, {NAMES[method]}", cell(asked(method, protocol, "cosine"), 2),
                      cell(asked(method, protocol, "class_own"), 1),
                      cell(asked(method, protocol, "class_loose"), 1),
                      cell(asked(method, protocol, "class_own", "class_loose"), 1),
                      cell(asked(method, protocol, "class_loose_trained"), 1),
                      cell(asked(method, protocol, "offsets"), 3),
                      cell(asked(method, protocol, "offsets_beyond_corners"), 3))


def detector_table():
    for method in ("random", "moco", "cp", "insloc"):
        cells = []
        for layers in ("trained", "frozen"):
            for metric in ("AP", "AP50", "AP75"):
                cells.append(cell(detected(method, layers, metric), 1))
        yield row("random, BN estimated" if method == "random" else NAMES[method], *cells)


def expectations_table():
    """What the plan expects of each pair of rungs with two seeds each, what came out, whether it counts."""
    return [line for line in verdicts() if line]


def verdicts():
    for key, above, below in (("same_background", "moco", "cp"), ("same_background", "cp", "insloc"),
                              ("gradient_inside", "cp", "moco"), ("gradient_inside", "insloc", "cp")):
        yield verdict(f"swap, {key.replace('_', ' ')}", above, below, 3, lambda net: asked(net, "swap", key))
    for above in ("cp", "insloc"):
        yield verdict("swap, margin", above, "moco", 3,
                      lambda net: asked(net, "swap", "same_instance", "same_background"))
    for protocol, pictures in (("loose", "composites"), ("boxes", "VOC")):
        def twice(*keys):
            return [lambda net: asked(net, protocol, *keys, first=True),
                    lambda net: asked(net, protocol, *keys)]

        for method in ("moco", "cp"):
            yield verdict(f"class lost, {pictures}", method, "insloc", 1, *twice("class_own", "class_loose"))
        for method in ("moco", "cp"):
            yield verdict(f"class from loose boxes, layer trained on them, {pictures}", "insloc", method, 1,
                          lambda net: asked(net, protocol, "class_loose_trained"))
        for key in ("offsets", "offsets_beyond_corners"):
            yield verdict(f"{key.replace('_', ' ')}, {pictures}", "insloc", "cp", 3, *twice(key))
    for layers, what in (("trained", "AP, all trained"), ("frozen", "AP, stem to res4 frozen")):
        for above, below in (("insloc", "cp"), ("cp", "moco"), ("moco", "random"), ("insloc", "moco"),
                             ("cp", "random"), ("insloc", "random")):
            yield verdict(what, above, below, 1, lambda net: detected(net, layers, "AP"))


def verdict(what, above, below, digits, *measurements):
    """A row: by how much `above` is above `below`, last measured, and whether that counts by the plan.

    A measurement is a function of a method. What was measured more than once counts if it does each time.
    """
    outcomes = []
    for values in measurements:
        a, b = values(above), values(below)
        if min(len(a), len(b)) < 2:
            return ""
        difference = sum(a) / len(a) - sum(b) / len(b)
        spread = max(max(a) - min(a), max(b) - min(b))
        apart = min(a) > max(b) or min(b) > max(a)
        if not apart or abs(difference) <= 2 * spread:
            outcomes.append("no")
        else:
            outcomes.append("yes" if difference > 0 else "the other way")
    counts = outcomes[0] if len(set(outcomes)) == 1 else f"no ({', then '.join(outcomes)})"
    sign = "+" if difference > 0 else "-"
    return row(what, f"{NAMES[above]} above {NAMES[below]}", sign + number(abs(difference), digits), counts)


# ---- The first study -------------------------------------------------------------------------------------

def first_place(run, protocol):
    results = read("first", "insloc_s0" if run == "random" else run, "loc.json")
    return result_of(results, "random" if run == "random" else "given")[protocol]["top1"]


def first_detection(method):
    """AP50 of boxes from 400 photographs of VOC, one for each seed that was run."""
    names = sorted(os.listdir(os.path.join(HERE, "first", "det")))
    return [read("first", "det", name)["mean"]["AP50bb"] for name in names if name.startswith(f"{method}_")]


def first_table():
    for method, runs in FIRST.items():
        trained = method != "random"
        accuracies = [mean_accuracy(read("first", run, "log.jsonl")[-10:]) for run in runs if trained]
        knn = [read("first", run, "knn.json")["top1"] for run in runs]
        linear = [read("first", run, "lin.json")["top1"] for run in runs]
        places = []
        for protocol in ("full", "reflect", "alone"):
            places.append(cell([first_place(run, protocol) for run in runs], 1))
        yield row(NAMES[method], cell(accuracies, 2) if trained else "", cell(knn, 1),
                  cell(linear, 1) if trained else "diverged", *places, cell(first_detection(method), 1))


# ---- The project's README --------------------------------------------------------------------------------

NETS = ("random_bn", "moco", "cp", "insloc")


def means(values, digits):
    """'.40 / .72 / .95 / .89': of each net the mean of values(net), a figure for each seed."""
    found = []
    for net in NETS:
        some = values(net)
        found.append(number(sum(some) / len(some), digits) if some else "not run")
    return " / ".join(found)


def pasted(net, key):
    """A figure of `swap`. The random nets with BatchNorm estimated were measured in the second study."""
    return swap("narrow18", net, key) if net == "random_bn" else asked(net, "swap", key)


def readme_tables():
    yield row("cosine of an image's features on two backgrounds", "pasting raises it (Sec. 4.1)",
              means(lambda net: pasted(net, "same_instance"), 2))
    yield row("cosine of two images on one background, at one place", "pasting lowers it",
              means(lambda net: pasted(net, "same_background"), 2))
    yield row("class from the pasted box, by a linear layer, % (chance 10.5)", "",
              means(lambda net: asked(net, "loose", "class_own"), 1))
    yield row("class from a loose box, %", "jitter does not lower it (ours)",
              means(lambda net: asked(net, "loose", "class_loose_trained"), 1))
    yield row("share of a loose box's offsets that a linear layer explains (its corners alone: .53)",
              "jitter does not lower it (ours)", means(lambda net: asked(net, "loose", "offsets"), 2))
    yield row("AP of the paper's C4 detector in small, on VOC, all layers trained", "Table 3b's order",
              means(lambda net: detected("random" if net == "random_bn" else net, "trained", "AP"), 1))
    yield row("the same with stem to res4 frozen", "the same order",
              means(lambda net: detected("random" if net == "random_bn" else net, "frozen", "AP"), 1))
    yield row("linear classification, top-1 (Table 3a; here at rate .1, added afterwards)", "67.7, 61.7",
              means(lambda net: [] if net == "random_bn" else accuracy("narrow18", net, "lin01"), 1))
    yield row("localization, `full` (Table 3a; its protocol is not known)", "71.9, 74.2",
              means(lambda net: place("narrow18", "random" if net == "random_bn" else net, "full"), 1))


def missing():
    """[(page, row)] that are in no line of the page."""
    pages = {"README.md": [*background_table(), *class_and_place_table(), *first_table(), *third_swap_table(),
                           *loose_table(), *detector_table(), *expectations_table()],
             "../../README.md": list(readme_tables())}
    faults = []
    for page, rows in pages.items():
        with open(os.path.join(HERE, page)) as file:
            text = file.read()
        faults += [(page, line) for line in rows if line not in text]
        print(f"{page}:", *rows, sep="\n")
    return faults


if __name__ == "__main__":
    faults = missing()
    for page, line in faults:
        print(f"{page} lacks {line}", file=sys.stderr)
    sys.exit(bool(faults))
