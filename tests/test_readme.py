"""The README names what exists, gives the command that CI runs, and, like fastmix.py, stays short enough to read."""
import ast
import re

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def lines(name):
    return (ROOT / name).read_text().splitlines()


def definitions(name):
    """The top-level functions and classes of a file, and C.m for the method m of a class C."""
    tree = ast.parse((ROOT / name).read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
            found |= {f"{node.name}.{m.name}": m for m in getattr(node, "body", ()) if isinstance(m, ast.FunctionDef)}
    return found


def anchors(name):
    """What GitHub makes of a file's headings."""
    headings = [re.sub(r"^#+ ", "", line) for line in lines(name) if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def flags(name):
    """Those that a script defines."""
    return set(re.findall(r'\(\s*"--([a-z]\w*)"', (ROOT / name).read_text()))


def test_lengths():
    assert len(lines("README.md")) <= 200
    assert len(lines("fastmix.py")) <= 450
    main = definitions("fastmix.py")["main"]
    assert main.end_lineno - main.lineno + 1 <= 180
    assert max(map(len, lines("fastmix.py"))) <= 120


def test_number_of_flags():
    assert 20 < len(flags("fastmix.py")) <= 32


def test_first_block_is_two_commands():
    first = re.search(r"```\w*\n(.*?)```", README, re.DOTALL)[1].splitlines()
    assert len(first) == 2 and first[1] == "python -m pytest -q"


def test_ci_runs_the_readmes_test_command():
    command = "python -m pytest -q"
    assert command in README.splitlines() and command in lines(".ci/run")


def test_flags_exist():
    known = set.union(*(flags(f.relative_to(ROOT)) for f in [*ROOT.glob("*.py"), *ROOT.glob("tests/bench_*.py")]))
    known |= {"nproc_per_node", "index-url", "extra-index-url", "data-path"}  # torchrun's, pip's and Megatron's
    named = set(re.findall(r"--([a-z]\w*(?:-[a-z]+)*)", README))
    assert len(named) > 15 and named <= known, named - known


@pytest.mark.parametrize("name", ["README.md", "tests/RESULTS.md"])
def test_links_lead_somewhere(name):
    """Every file that a link names, and in it the heading, or the function if its text is the `name` of one."""
    text, folder = (ROOT / name).read_text(), (ROOT / name).parent
    links = re.findall(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", text)
    assert links
    for label, file, anchor in links:
        if "://" in file:
            continue
        path = (folder / file).resolve() if file else ROOT / name
        assert path.exists() and not re.match(r"#L\d", anchor), (label, file, anchor)
        relative = path.relative_to(ROOT).as_posix()
        if anchor:
            assert anchor[1:] in anchors(relative), (file, anchor)
        if path.suffix == ".py" and re.fullmatch(r"`[\w.]+?(\(\))?`", label):
            function = label.strip("`()")
            assert function in definitions(relative) or function == path.name, (label, file)


def test_method_table_names_what_exists():
    """Every `name` of the second column."""
    rows = [line.split("|") for line in README.splitlines() if re.match(r"\| *(\(\d\))? *\| *\[?`", line)]
    names = [name for row in rows for name in re.findall(r"`([\w.]+?)(?:\(\))?`", row[2])]
    known = set.union(*(set(definitions(f.name)) for f in ROOT.glob("*.py")))
    assert len(names) >= 6 and set(names) <= known, set(names) - known


def test_functions_named_in_the_text_exist():
    known = set.union(*(set(definitions(f.relative_to(ROOT))) for f in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]))
    named = set(re.findall(r"`(\w[\w.]*)\(\)`", README))
    assert {n.split(".")[-1] for n in named} <= {n.split(".")[-1] for n in known}, named - known


def test_scripts_named_in_commands_exist():
    for path in set(re.findall(r"(?:python3?|torchrun[^`\n]*?) ((?:\w+/)?\w+\.py)", README)):
        assert (ROOT / path).exists(), path
