"""docs/walkthrough.ipynb: its cells run without Jupyter, and its text names the numbers that they print."""
import contextlib
import io
import json
import os
import re

import matplotlib
import pytest
import torch

import insloc

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOTEBOOK = os.path.join(HERE, "docs", "walkthrough.ipynb")
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"


def sections():
    """[(text, [cell])]: each text of the notebook and the code cells up to the next text."""
    with open(NOTEBOOK) as file:
        cells = json.load(file)["cells"]
    found = []
    for cell in cells:
        if cell["cell_type"] == "markdown":
            found.append(("".join(cell["source"]), []))
        else:
            found[-1][1].append(cell)
    return found


SECTIONS = sections()
CODE = [cell for _, cells in SECTIONS for cell in cells]


def source(cell):
    return "".join(cell["source"])


def printed(cell):
    """What the cell printed when the notebook was written."""
    streams = [output["text"] for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join(line for stream in streams for line in stream)


def numbers(text):
    """[(number, how far another machine's may be from it)]: counts exactly, measured ones to a tenth."""
    found = []
    for word, percent in re.findall(rf"({NUMBER})( %)?", text):
        value = float(word.replace(",", ""))
        digits = len(word.partition(".")[2])
        measured = percent or "." in word
        found.append((value, 0.1 * value + 10 ** -digits if measured else 0))
    return found


def differences(before, now):
    """Pairs of numbers of two texts that differ by more than they may, or the texts if their words differ."""
    if re.sub(NUMBER, "#", before) != re.sub(NUMBER, "#", now):
        return [(before, now)]
    return [(a, b) for (a, tolerance), (b, _) in zip(numbers(before), numbers(now)) if abs(a - b) > tolerance]


def unsupported(text, outputs):
    """The bold numbers of a text that no output has."""
    known = {value for value, _ in numbers(outputs)}
    bold = " ".join(re.findall(rf"\*\*({NUMBER})\*\*", text))
    return [value for value, _ in numbers(bold) if value not in known]


def test_it_is_short():
    assert len(CODE) <= 15 and os.path.getsize(NOTEBOOK) < 1e6
    for cell in CODE:
        lines = source(cell).splitlines()
        assert len(lines) <= 12 and max(map(len, lines)) <= 110


def test_it_was_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not any(output["output_type"] == "error" for cell in CODE for output in cell["outputs"])


def test_the_method_is_that_of_insloc_and_nothing_is_defined_twice():
    program = "\n".join(map(source, CODE))
    names = re.findall(r"^(?:def|class) (\w+)", program, re.M)
    assert len(set(names)) == len(names) and not [name for name in names if hasattr(insloc, name)]
    used = set(re.findall(r"insloc\.(\w+)", program))
    assert used >= {"crop_box", "paste", "grid_anchors", "jitter_boxes", "photometric", "Views", "MakeGroup",
                    "batches", "C4Encoder", "FPNEncoder", "roi_pool", "KeyQueue", "info_nce",
                    "momentum_update"}


def test_the_text_names_the_numbers_that_are_printed():
    bold = re.findall(rf"\*\*{NUMBER}\*\*", "".join(text for text, _ in SECTIONS))
    assert len(bold) >= 20
    for text, cells in SECTIONS:
        assert unsupported(text, "".join(map(printed, cells))) == [], text


def test_wrong_numbers_are_found():
    assert unsupported("**5,120** anchors, **42** %", "5,120 anchors\n41 %") == [42]
    assert differences("5,120 anchors, 42 %", "5,121 anchors, 43 %") == [(5120, 5121)]
    assert differences("difference 0.0000", "difference 0.0003") == [(0, 0.0003)]
    assert differences("queries", "keys") == [("queries", "keys")]


@pytest.mark.slow
def test_the_cells_print_what_stands_below_them(monkeypatch):
    monkeypatch.chdir(os.path.join(HERE, "docs"))
    monkeypatch.syspath_prepend(HERE)
    matplotlib.use("Agg")
    threads = torch.get_num_threads()
    space = {}
    try:
        for cell in CODE:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(source(cell), space)
            assert differences(printed(cell), output.getvalue()) == [], source(cell)
    finally:
        torch.set_num_threads(threads)
        matplotlib.pyplot.close("all")
