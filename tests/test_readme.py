"""The README's line ranges hold what it says they hold, and every flag it names exists."""
import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_line_ranges():
    links = re.findall(r"\[`(\w+)`\]\(fastmix\.py#L(\d+)-L(\d+)\)", README)
    lines = (ROOT / "fastmix.py").read_text().splitlines()
    assert len(links) == 9
    for name, first, last in links:
        body = lines[int(first) - 1: int(last)]
        assert body[0].startswith(f"def {name}("), (name, body[0])
        assert all(not line or line[0] in " )" for line in body[1:]), name
        assert lines[int(last) - 1].strip() and not lines[int(last)].strip(), name


def test_flags_exist():
    scripts = [ROOT / "fastmix.py", ROOT / "prepare_data.py", *ROOT.glob("tests/bench_*.py")]
    code = "".join(script.read_text() for script in scripts)
    for flag in set(re.findall(r"--([a-z]+(?:_[a-z]+)*)", README)) - {"path", "nproc_per_node"}:
        assert f'"{flag}"' in code or f'"--{flag}"' in code or flag in ("data",), flag


def test_ci_runs_the_readmes_test_command():
    command = "python -m pytest -q"
    assert command in README.splitlines() and command in (ROOT / ".ci" / "run").read_text().splitlines()
