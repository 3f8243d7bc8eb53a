"""README and docs keep their promises: commands, options, names, numbers and code."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lomo_kernels
from lomo_kernels import cli, finetune, memory, ops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
WORDS = "\n".join(PAGES.values())
CI = (ROOT / ".ci" / "run").read_text()


def test_tables_are_drawn_from_the_committed_rows():
    result = subprocess.run(
        [sys.executable, "-m", "bench.readme", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_pictures_say_what_the_committed_rows_say(tmp_path):
    """Every figure and name in a picture; where lines end up is matplotlib's."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from bench import pictures

    def words(path):
        return sorted(re.findall(r"<text [^>]*>([^<]+)</text>", path.read_text()))

    for drawn in pictures.draw(tmp_path):
        committed = pictures.FOLDER / drawn.name
        assert len(words(committed)) > 5
        assert words(drawn) == words(committed), drawn.name
        assert f"pictures/{drawn.name}" in WORDS


def test_the_picture_of_readme_is_told_in_words_too():
    (told,) = re.findall(r"!\[(.*?)\]\(docs/pictures/memory_by_kind.svg\)", README)
    figures = re.findall(r"[\d.]+\d", told)
    drawn = (ROOT / "docs" / "pictures" / "memory_by_kind.svg").read_text()
    assert len(figures) == 4
    for figure in figures:
        assert f">{figure} GiB<" in drawn
    assert told in PAGES["docs/index.md"]


def test_readme_is_two_screens():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("page", list(PAGES))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {_anchor(title) for title in titles}, link


def _anchor(title):
    return re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("module", [lomo_kernels, ops, finetune, memory], ids=lambda m: m.__name__)
def test_every_public_name_is_listed(module):
    for name in module.__all__:
        assert re.search(rf"`(\w+\.)*{name}\b", PAGES["docs/api.md"]), f"{module.__name__}.{name}"


# -- commands --------------------------------------------------------------------------------------

COMMANDS = {  # command -> the page that lists its options
    "finetune": "docs/finetune.md",
    "plan": "docs/memory.md",
    "bench.__main__": "docs/benchmarks.md",
    "bench.gpu_suite": "docs/benchmarks.md",
}


def parser(command):
    if command.startswith("bench"):
        pytest.importorskip("transformers", reason="transformers is not installed")
        return importlib.import_module(command).parser()
    commands = cli.parser()._actions
    return next(a for a in commands if isinstance(a, argparse._SubParsersAction)).choices[command]


def options(command):
    for action in parser(command)._actions:
        shown = not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
        if shown and action.option_strings:
            yield action.option_strings[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_line_and_a_test(command):
    name = command.removeprefix("bench.").replace("__main__", "bench")
    paths = (ROOT / "python_tests").glob(f"test_{name}*.py")
    tests = "\n".join(path.read_text() for path in paths)
    for option in options(command):
        assert f"`{option}`" in PAGES[COMMANDS[command]], option
        assert f'"{option}"' in tests, option


@pytest.mark.parametrize("page", sorted(set(COMMANDS.values())))
def test_every_option_that_is_listed_is_there(page):
    known = {o for command, its in COMMANDS.items() if its == page for o in options(command)}
    lines = [line for line in PAGES[page].splitlines() if line.startswith("| `--")]
    listed = {o for line in lines for o in re.findall(r"`(--[a-z-]+)`", line.split(" | ")[0])}
    assert listed <= known


def test_ci_runs_the_command_that_readme_gives():
    (command,) = (line for line in README.splitlines() if "-r requirements-test.txt" in line)
    parts, lines = command.split(" && "), CI.splitlines()
    first = lines.index(parts[0])
    assert lines[first : first + len(parts)] == parts


def test_pre_commit_formats_what_ci_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checks = {hook["entry"].removesuffix(" -i"): hook for hook in hooks}
    lint = CI[CI.index("ruff check") :]
    assert all(re.search(rf"^{check} ", lint, re.MULTILINE) for check in checks)
    (line,) = re.findall("^clang-format .*", lint, re.MULTILINE)
    checked = {path for pattern in line.split()[3:] for path in ROOT.glob(pattern)}
    files = re.compile(checks["clang-format"]["files"])
    every = {path for room in ("csrc", "python_tests") for path in (ROOT / room).rglob("*")}
    every = {path for path in every if files.search(str(path.relative_to(ROOT)))}
    assert every == checked


def test_the_other_pair_of_versions_has_one_command():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (command,) = (line for line in page.splitlines() if "requirements-test-2.11.txt" in line)
    assert command.startswith("python3.12 -m venv .venv")
    files = [(ROOT / f"requirements-test{pair}.txt").read_text() for pair in ("", "-2.11")]
    names = [set(re.findall(r"^([\w-]+)==", text, re.MULTILINE)) for text in files]
    assert names[1] < names[0]  # what the tests need; not the lint, nor what they can do without
    assert {"torch", "triton", "pytest"} <= names[1]
    dev = re.search(r"^dev = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    tools = set(re.findall(r'"([\w-]+)"', dev))
    assert {"pytest", "ruff", "pre-commit"} <= tools <= names[0] | {"pre-commit"}


# -- code ------------------------------------------------------------------------------------------

FENCED = re.compile(
    r"(?:<!-- not run: (.+?) -->\n)?^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE
)
BLOCKS = [
    (page, language, code, reason)
    for page, text in PAGES.items()
    for reason, _, language, code in FENCED.findall(text)
]
# Pages whose Python a test of its own runs, which has what the blocks need.
ELSEWHERE = {
    "docs/integrations.md": "test_integrations_docs.py",
    "docs/sharding.md": "test_integrations_sharded.py",
}
NOT_HERE = {  # what a line of a shell begins with -> why no test runs it
    "python3 -m venv": ".ci/run does",
    "python3.12 -m venv": "another Python",
    "apt-get": "changes the machine",
    "pip": "needs a network",
}


def test_every_block_says_what_it_is():
    assert {language for _, language, _, _ in BLOCKS} <= {"python", "sh", "yaml", ""}


def given():
    """What a reader of the page has by then."""
    from test_huggingface import tiny_llama

    model = tiny_llama()
    batches = torch.randint(
        model.config.vocab_size, (2, 1, 8), generator=torch.Generator().manual_seed(0)
    )
    return {
        "model": model,
        "batches": [{"input_ids": ids, "labels": ids} for ids in batches],
        "batch": {"input_ids": batches[0], "labels": batches[0]},
        "lr": 1e-3,
        "torch": torch,
    }


PYTHON = {page: [] for page, language, _, _ in BLOCKS if language == "python"}
for page, language, code, reason in BLOCKS:
    if language == "python" and not reason:
        PYTHON[page].append(code)


@pytest.mark.filterwarnings(  # of torch.compile itself
    "ignore:`torch.jit.script:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not",
)
@pytest.mark.parametrize("page", list(PYTHON))
def test_python_runs(page):
    if page in ELSEWHERE:
        text = (ROOT / "python_tests" / ELSEWHERE[page]).read_text()
        assert Path(page).name in text
        return
    pytest.importorskip("transformers", reason="transformers is not installed")
    names = given()
    for code in PYTHON[page]:
        exec(compile(code, page, "exec"), names)
    if "optimizer" in names:
        assert names["optimizer"].is_clean
        assert names["optimizer"].param_groups[0]["step"] >= 1


def shell_lines():
    for page, language, code, reason in BLOCKS:
        if language == "sh" and not reason:
            for line in code.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield pytest.param(line, id=f"{page}: {line[:60]}")


@pytest.mark.parametrize("line", list(shell_lines()))
def test_commands_are_understood(line):
    """By the parser of what they call; the second half of a chain of commands is CI's."""
    if any(line.startswith(start) for start in NOT_HERE):
        return
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[:2] == ["python", "-m"] and words[2].startswith("bench"):
        module = importlib.import_module(
            "bench.__main__" if words[2] == "bench" else words[2]
        )  # fmt: skip
        if hasattr(module, "parser"):
            module.parser().parse_args(words[3:])
        else:
            assert hasattr(module, "main")
        return
    if words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists()
        return
    if words[:3] == ["python", "-m", "lomo_kernels"]:
        words = ["lomo-kernels", *words[3:]]
    assert words[0] == "lomo-kernels", line
    cli.parser().parse_args(words[1:])


def test_the_main_job_in_plain_torch_runs(tmp_path, monkeypatch):
    """On a model of a few thousand parameters instead of the real one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from finetuning import make_tiny

    folder = make_tiny(tmp_path / "tiny")
    script = (ROOT / "examples" / "plain_torch.py").read_text()
    assert len([line for line in script.splitlines() if line.strip()]) <= 36
    (name,) = re.findall(r'"(HuggingFaceTB/[^"]+)"', script)
    script = script.replace(name, folder).replace("32, 4, 128", "4, 4, 32")
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "plain_torch.py", "exec"), {})
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned")
