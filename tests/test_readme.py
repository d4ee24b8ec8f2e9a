"""The README names what exists, and gives the commands that CI runs."""
import ast
import re

import pytest

from conftest import ROOT, TINY, log_rows, run

README = (ROOT / "README.md").read_text()


def lines(name):
    return (ROOT / name).read_text().splitlines()


def definitions(name):
    """The top-level functions and classes of a file, and C.m for the method m of a class C."""
    found = set()
    for node in ast.parse((ROOT / name).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return found


def all_definitions(pattern):
    return set.union(*(definitions(file.relative_to(ROOT)) for file in ROOT.glob(pattern)))


def anchors(name):
    """What GitHub makes of a file's headings."""
    found = set()
    for line in lines(name):
        if re.match(r"#+ ", line):
            heading = re.sub(r"^#+ ", "", line).lower()
            found.add(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-"))
    return found


def flags(name):
    """Those that a script defines."""
    return set(re.findall(r'\(\s*"--([a-z]\w*)"', (ROOT / name).read_text()))


def commands():
    """[(script, its flags)] of all commands in the README's blocks and in its text."""
    text = README.replace("\\\n", " ")
    found = []
    for command in re.findall(r"(?:python3?|torchrun[^`\n]*?) (\w[\w/]*\.py[^`\n]*)", text):
        command = command.split("#")[0]
        found.append((command.split()[0], set(re.findall(r" --([a-z]\w*)", command))))
    return found


def test_first_block_is_two_commands():
    first = re.search(r"```\w*\n(.*?)```", README, re.DOTALL)[1].splitlines()
    assert len(first) == 2
    assert first[0].endswith("pip install -r requirements.txt && python fastmix.py")
    assert first[1] == "python -m pytest -q"


def test_ci_runs_the_readmes_test_command():
    command = "python -m pytest -q"
    assert command in README.splitlines()
    assert command in lines(".ci/run")


def test_flags_exist():
    known = {"nproc_per_node", "index-url", "extra-index-url", "data-path"}  # other programs'
    for file in (*ROOT.glob("*.py"), *ROOT.glob("tests/bench_*.py"), ROOT / "tests/ngram.py"):
        known |= flags(file.relative_to(ROOT))
    named = set(re.findall(r"--([a-z]\w*(?:-[a-z]+)*)", README))
    assert len(named) > 15
    assert named <= known, named - known


def test_commands_name_scripts_and_their_flags():
    assert len(commands()) >= 8
    for script, named in commands():
        assert (ROOT / script).exists(), script
        assert named <= flags(script), (script, named - flags(script))


@pytest.mark.parametrize("name", ["README.md", "tests/RESULTS.md"])
def test_links_lead_somewhere(name):
    """Each link's file and heading; and the function, if the link's text is the `name` of one."""
    links = re.findall(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", (ROOT / name).read_text())
    assert links
    for label, file, anchor in links:
        if "://" in file:
            continue
        path = ROOT / name
        if file:
            path = ((ROOT / name).parent / file).resolve()
        assert path.exists(), (label, file)
        relative = path.relative_to(ROOT).as_posix()
        if anchor:
            assert anchor[1:] in anchors(relative), (label, file, anchor)
        if path.suffix == ".py" and re.fullmatch(r"`[\w.]+?(\(\))?`", label):
            function = label.strip("`()")
            assert function == path.name or function in definitions(relative), (label, file)


@pytest.mark.parametrize("name", ["README.md", "tests/RESULTS.md"])
def test_no_placeholder_is_left(name):
    """A word in capitals may stand for a number or a block that was never filled in."""
    words = set(re.findall(r"(?<![\w./:-])[A-Z]{5,}(?![\w./:-])", (ROOT / name).read_text()))
    words -= {"LARGEST", "DAMPING", "DECAY", "NVIDIA", "README", "TFLOP"}  # these are meant
    assert not words


def test_method_table_names_what_exists():
    """Every `name` of the second column."""
    names = []
    for line in README.splitlines():
        if re.match(r"\| *(\(\d\))? *\| *\[?`", line):
            names += re.findall(r"`([\w.]+?)(?:\(\))?`", line.split("|")[2])
    assert len(names) >= 6
    known = all_definitions("*.py")
    assert set(names) <= known, set(names) - known


def test_functions_named_in_the_text_exist():
    known = all_definitions("*.py") | all_definitions("tests/*.py")
    known = {name.split(".")[-1] for name in known}
    named = {name.split(".")[-1] for name in re.findall(r"`(\w[\w.]*)\(\)`", README)}
    assert named <= known, named - known


def test_table_of_the_logs_columns(synthetic):
    """It has each column of log.jsonl, and no other."""
    run("fastmix.py", *TINY, "--sources", "a,b", "--max_steps", 1, "--out_dir", "columns",
        cwd=synthetic)
    table = README.split("| column |")[1].split("\n\n")[0]
    named = []
    for line in table.splitlines()[2:]:
        named += re.findall(r"`(\w+)`", line.split("|")[1])
    assert sorted(named) == sorted(log_rows(synthetic / "columns")[0])
