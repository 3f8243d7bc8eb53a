"""README keeps its promises: commands, options, names, numbers and code."""

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lomo_kernels
from lomo_kernels import cli, finetune, memory, ops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_drawn_from_the_committed_rows():
    result = subprocess.run(
        [sys.executable, "-m", "bench.readme", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", [lomo_kernels, ops, finetune, memory], ids=lambda m: m.__name__)
def test_every_public_name_is_listed(module):
    for name in module.__all__:
        assert re.search(rf"`(\w+\.)*{name}\b", README), f"{module.__name__}.{name}"


def options(command):
    if command.startswith("bench"):
        pytest.importorskip("transformers", reason="transformers is not installed")
        parser = importlib.import_module(command).parser()
    else:
        parser = cli.parser()
        commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = commands.choices[command]
    for action in parser._actions:
        shown = not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
        if shown and action.option_strings:
            yield action.option_strings[0]


COMMANDS = ["finetune", "plan", "bench.__main__", "bench.gpu_suite"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_line_and_a_test(command):
    name = command.removeprefix("bench.").replace("__main__", "bench")
    paths = (ROOT / "python_tests").glob(f"test_{name}*.py")
    tests = "\n".join(path.read_text() for path in paths)
    for option in options(command):
        assert f"`{option}`" in README, option
        assert f'"{option}"' in tests, option


def test_every_option_that_is_mentioned_is_there():
    known = {option for command in COMMANDS for option in options(command)}
    assert set(re.findall(r"`(--[a-z-]+)`", README)) <= known


def test_ci_runs_the_command_that_readme_gives():
    command = next(line for line in README.splitlines() if "requirements-test.txt" in line)
    assert command.startswith("python3 -m venv .venv")
    assert "requirements-test.txt" in (ROOT / ".ci" / "run").read_text()


def test_the_other_pair_of_versions_has_one_command():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (command,) = (line for line in page.splitlines() if "requirements-test-2.11.txt" in line)
    assert command.startswith("python3.12 -m venv .venv")
    files = [(ROOT / f"requirements-test{pair}.txt").read_text() for pair in ("", "-2.11")]
    names = [set(re.findall(r"^([\w-]+)==", text, re.MULTILINE)) for text in files]
    assert names[1] < names[0]  # what the tests need; not the lint, nor what they can do without
    assert {"torch", "triton", "pytest"} <= names[1]


def test_the_script_runs(tmp_path, monkeypatch):
    """On a model of a few thousand parameters instead of the real one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from finetuning import make_tiny

    folder = make_tiny(tmp_path / "tiny")
    script = re.search(r"script: begin -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in script.splitlines() if line.strip()]) <= 32
    (name,) = re.findall(r'"(HuggingFaceTB/[^"]+)"', script)
    script = script.replace(name, folder).replace("32, 4, 128", "4, 4, 32")
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "README.md", "exec"), {})
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned")


def test_the_example_of_gradients_runs():
    page = (ROOT / "docs" / "gradients.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(block, "docs/gradients.md", "exec"), names)
    assert names["optimizer"].is_clean
    assert names["optimizer"].param_groups[0]["step"] == 1
