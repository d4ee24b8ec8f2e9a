"""README.md: the programs take its commands, its links lead somewhere, its example adds up."""
import argparse
import re
import runpy
import shlex

import pytest
import torch

from conftest import ROOT
from fastmix import mixture_step

README = (ROOT / "README.md").read_text()


def commands():
    """[argv] of all `python SCRIPT.py ...` and `torchrun ... SCRIPT.py ...` in README's code."""
    code = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL) + re.findall(r"`([^`\n]+)`", README)
    text = "\n".join(code).replace("\\\n", " ")  # a line that ends in \ goes on in the next
    found = []
    for command in re.findall(r"\b(?:python3?|torchrun) [^\n&]*\.py\b[^\n&]*", text):
        words = shlex.split(command, comments=True)
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        found.append(words[scripts[0]:])
    return found


class Parsed(Exception):
    """The command line has been parsed."""


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_a_command_is_one_that_its_program_takes(argv, monkeypatch):
    """The program runs up to the end of its parser, which exits with 2 for what it does not know."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kw):
        parse_args(*args, **kw)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def test_commands_are_found():
    """So that the test above means something."""
    assert {"fastmix.py", "prepare_data.py", "plot_mixture.py"} <= {argv[0] for argv in commands()}


def anchors(path):
    """What GitHub makes of a file's headings."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    """Those to files and headings of the repository."""
    links = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", README)
    inner = [(file, anchor) for file, anchor in links if "://" not in file]
    assert inner
    for file, anchor in inner:
        path = ROOT / (file or "README.md")
        assert path.exists(), file
        if anchor:
            assert anchor in anchors(path), (file, anchor)


def test_the_worked_example_adds_up():
    """
    The first step of a search at alpha = (0.5, 0.3, 0.2), with the alignments (2, 1, -1) and the
    rate 0.2: by how much z moves, and the new alpha.
    """
    z = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    A = torch.tensor([2, 1, -1], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    before = z.clone()
    mixture_step(z, torch.zeros_like(z[0]), A, ones > 0, ones, rate=0.2, n_before=0)
    for vector in (z - before, torch.softmax(z, 0)):
        digits = ", ".join(f"{value:.3f}" for value in vector.tolist())
        assert f"({digits})" in README.replace("−", "-")
