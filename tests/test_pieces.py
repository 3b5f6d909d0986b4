"""Each function and class of insloc.py copies out alone: it needs the imports and what it says."""
import ast
import builtins
import dis
import re

import pytest

import insloc

with open(insloc.__file__) as f:
    TREE = ast.parse(f.read())
PIECES = {node.name: node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
IMPORTS = [node for node in TREE.body if isinstance(node, (ast.Import, ast.ImportFrom))]


def needs(name):
    """What stands after `needs:` in the docstring."""
    line = (ast.get_docstring(PIECES[name]) or "").partition("needs:")[2]
    return set(re.findall(r"\w+", line)) & PIECES.keys()


def global_names(code):
    """What a code object, and those in it, look up outside of themselves."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return names.union(*(global_names(inner) for inner in code.co_consts if hasattr(inner, "co_code")))


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_copied_out_finds_all_it_uses_and_needs_all_it_names(name):
    names, todo = set(), {name}
    while todo:                                                         # and what is needed by what it needs
        names |= todo
        todo = set().union(*map(needs, todo)) - names
    copied = IMPORTS + [node for piece, node in PIECES.items() if piece in names]
    code = compile(ast.Module(copied, type_ignores=[]), name, "exec")
    space = {"__name__": insloc.__name__}                               # dataclasses look their module up
    exec(code, space)
    assert not {used for used in global_names(code) if used not in space and not hasattr(builtins, used)}
    used = {node.id for node in ast.walk(PIECES[name]) if isinstance(node, ast.Name)} & PIECES.keys() - {name}
    assert used == needs(name)


def test_importing_defines_and_does_nothing_else():
    docstring, *others = (node for node in TREE.body if node not in PIECES.values() and node not in IMPORTS)
    assert isinstance(docstring, ast.Expr) and ast.get_docstring(TREE)
    assert all(isinstance(node, ast.Assign) and ast.literal_eval(node.value) for node in others)
