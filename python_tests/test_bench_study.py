"""The study: what is run in which order, what its rows are, and what may be said of them."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from bench import paired, readme, record, study, study_runs, study_table  # noqa: E402
from lomo_kernels import finetune  # noqa: E402
from lomo_kernels.finetune import job  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ROOT = Path(__file__).parent.parent
VALIDATION, TEST = 24, 40


@pytest.fixture(scope="module")
def nouns(tmp_path_factory):
    """A folder with as many definitions as the study takes of WordNet, in its format."""
    folder = tmp_path_factory.mktemp("wordnet")
    each = (study_runs.TRAIN + VALIDATION + TEST) // len(study_runs.WORDNET["CATEGORIES"])
    lines = [
        f"{i:08d} {file} n 01 word 0 001 @ 00001930 n 0000 | a {category} of kind {i}  \n"
        for file, category in study_runs.WORDNET["CATEGORIES"].items()
        for i in range(each)
    ]
    (folder / "data.noun").write_text("".join(lines))
    return folder


@pytest.fixture
def arguments(nouns, tmp_path, tiny):
    return [
        "--task", "wordnet", "--wordnet", str(nouns), "--model", tiny, "--methods", "lomo,adamw",
        "--rates", "2", "--seeds", "2", "--steps", "2", "--batch-size", "4",
        "--validation-size", str(VALIDATION), "--test-size", str(TEST), "--device", "cpu",
        "--rows", str(tmp_path / "study.csv"),
    ]  # fmt: skip


class Processes:
    """In place of the processes of the runs: notes what they are told, finds what it is told."""

    def __init__(self, monkeypatch, right=lambda settings: 1, seconds=1.0):
        self.jobs, self.right, self.seconds = [], right, seconds
        monkeypatch.setattr(study, "started", self)

    def __call__(self, job, threads):
        self.jobs.append(job)
        settings = job["settings"]
        found = self.right(settings)
        if isinstance(found, BaseException):
            raise found
        if isinstance(found, str):
            return {"error": found}
        items = "1" * found + "0" * (settings["eval_size"] - found)
        return {"count": len(items), "right": found, "items": paired.packed(items),
                "step_cpu_seconds": 1.0, "seconds": self.seconds, "gradient_bytes": 2**30,
                "state_bytes": 0}  # fmt: skip

    @property
    def runs(self):
        """(optimizer or adapter, lr, seed, part) of each."""
        return [
            (s.get("optimizer") or s.get("adapter"), s.get("lr"), s.get("seed"),
             Path(s["held_out"]).stem.split("-")[1])
            for s in (each["settings"] for each in self.jobs)
        ]  # fmt: skip


def rows_of(arguments):
    return record.load(Path(arguments[-1]))


# -- statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 10))
def test_items_are_packed_as_hexadecimal_digits(count):
    items = "110010111"[:count]
    digits = paired.packed(items)
    assert len(digits) == math.ceil(count / 4)
    assert int(digits, 16) == int(items, 2) << -count % 4
    assert paired.bits(digits, count) == items
    assert paired.unpacked(digits, count).tolist() == [int(item) for item in items]


def test_an_interval_is_that_of_every_resample():
    """Of 3 seeds and 4 items there are 27 times 256, all equally likely."""
    values = torch.tensor([[1, 0, 0, 1], [1, 1, 0, -1], [0, 1, 0, 1]], dtype=torch.float64)
    means = sorted(
        values[list(seeds)][:, list(items)].mean().item()
        for seeds in itertools.product(range(3), repeat=3)
        for items in itertools.product(range(4), repeat=4)
    )
    for level in (0.5, 0.8, 0.95):
        for found, part in zip(paired.interval(values, level), ((1 - level) / 2, (1 + level) / 2)):
            below = sum(mean < found - 1e-9 for mean in means) / len(means)
            to = sum(mean <= found + 1e-9 for mean in means) / len(means)
            assert below - 0.01 <= part <= to + 0.01


def test_an_interval_of_one_seed_is_the_binomial_one():
    items = torch.cat([torch.ones(360), torch.zeros(40)])[None]
    low, high = paired.interval(items)
    half = 1.96 * math.sqrt(0.9 * 0.1 / 400)
    assert (low, high) == (
        pytest.approx(0.9 - half, abs=0.004),
        pytest.approx(0.9 + half, abs=0.004),
    )


def test_methods_that_fail_on_the_same_items_are_told_apart():
    """The difference has no variance of the items, however large that of each is."""
    hard = (torch.arange(200) % 2).double().expand(3, 200)
    better = hard.clone()
    better[:, :20] = 1
    values = {"lomo": better, "adamw": hard, "lora": hard}
    sure, open_ = study_table.told_apart(values)
    assert sure == [("lomo", "adamw"), ("lomo", "lora")]
    assert open_ == [("adamw", "lora")]
    assert paired.interval(better)[0] < paired.interval(hard)[1]  # each by itself they are not


def test_pairs_share_what_may_be_wrong():
    """An interval of 95 % that ends just above 0 says nothing where there are many pairs."""
    difference = torch.zeros(1, 400)
    difference[0, :6] = 1
    zero = torch.zeros(1, 400)
    assert paired.interval(difference - zero)[0] > 0
    names = list(study.METHODS)
    sure, _ = study_table.told_apart({"lomo": difference, "adamw": zero})
    assert sure == [("lomo", "adamw")]
    many = dict.fromkeys(names, zero) | {"lomo": difference}
    assert study_table.told_apart(many)[0] == []


# -- what is run -----------------------------------------------------------------------------------


def test_every_method_tries_as_many_rates():
    for name in study.METHODS:
        assert len(set(study.rates(name, 4))) == 4
    assert study.rates("lomo", 3) == [0.03, 0.1, 0.3]
    assert study.rates("adamw", 1) == [1e-4]
    assert study.rates("lora", 2) == [2e-3, 6e-3]


def test_the_rates_are_chosen_on_the_validation_part(arguments, monkeypatch):
    """The other rate is better on the test part, which must not matter; of equals, the smaller."""

    def right(settings):
        part = Path(settings["held_out"]).stem
        if settings.get("lr") is None or settings["optimizer"] == "adamw":
            return 7
        best = settings["lr"] == max(study.rates("lomo", 2))
        return 9 if best == part.endswith("validation") else 3

    told = Processes(monkeypatch, right)
    assert study.main(arguments) == 0
    lomo, adamw = (study.rates(name, 2) for name in ("lomo", "adamw"))
    assert told.runs == [
        (None, None, None, "validation"), (None, None, None, "test"),
        *(("lomo", lr, 0, "validation") for lr in lomo),
        *(("adamw", lr, 0, "validation") for lr in adamw),
        ("lomo", lomo[1], 1, "test"), ("adamw", adamw[0], 1, "test"),
        ("lomo", lomo[1], 2, "test"), ("adamw", adamw[0], 2, "test"),
    ]  # fmt: skip
    rows = rows_of(arguments)
    assert [(row["method"], row["part"]) for row in rows[:2]] == [
        ("majority", "validation"), ("majority", "test"),
    ]  # fmt: skip
    for job_ in told.jobs[2:]:
        assert job_["trains"]
        assert job_["before"] == "1" * 7 + "0" * (job_["settings"]["eval_size"] - 7)
        assert job_["settings"]["steps"] == 2
        assert job_["settings"]["batch_size"] == 4
    assert len({row["commit"] for row in rows} | {row["device"] for row in rows}) == 2


def test_parts_have_no_question_in_common(nouns, arguments):
    options = study.parser().parse_args(arguments)
    parts = study_runs.read("wordnet", options)
    assert [len(part) for part in parts] == [study_runs.TRAIN, VALIDATION, TEST]
    prompts = [{row["prompt"] for row in part} for part in parts]
    assert (
        len(set.union(*prompts)) == sum(map(len, prompts)) == study_runs.TRAIN + VALIDATION + TEST
    )


def test_superglue_is_divided(tmp_path):
    """A question that is there twice is on one side; the test part is what is called validation."""

    def write(name, numbers):
        rows = [
            {"premise": f"P{i}.", "choice1": f"a{i}", "choice2": "b", "question": "cause",
             "label": int(i % 3 == 0), "idx": i} for i in numbers
        ]  # fmt: skip
        (tmp_path / "COPA" / name).write_text("\n".join(map(json.dumps, rows)))

    (tmp_path / "COPA").mkdir()
    write("train.jsonl", [*range(40), *range(40)])
    write("val.jsonl", range(100, 112))
    options = study.parser().parse_args(["--data", str(tmp_path), "--validation-size", "10",
                                         "--test-size", "9"])  # fmt: skip
    data = study_runs.read("copa", options)
    train, validation, test = ({row["prompt"] for row in part} for part in data)
    assert not train & validation
    assert train | validation == {f"P{i}. because" for i in range(40)}
    assert (len(data.validation), len(data.test)) == (10, 9)
    assert test <= {f"P{i}. because" for i in range(100, 112)}
    found = study_runs.majority(data, "test")  # the first choice, whatever its text
    assert found["right"] == sum(row["completion"] != " b" for row in data.test)
    assert found["count"] == 9


def test_what_is_not_there_is_left_out(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    told = Processes(monkeypatch)
    assert study.main([*arguments, "--task", "all", "--methods", "lora,lomo"]) == 0
    assert {name for name, *_ in told.runs} == {None, "lomo"}
    said = capsys.readouterr().out
    assert "methods with adapters are left out: pip install 'lomo_kernels[adapters]'" in said
    assert "copa is left out: --data names no folder with it" in said
    study.main([*arguments, "--wordnet", str(tmp_path), "--dry-run"])
    assert "apt-get install wordnet-base" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--methods takes .*, got 'sgd'"):
        study.main([*arguments, "--methods", "sgd"])


# -- one after another -----------------------------------------------------------------------------


def test_a_study_that_was_stopped_goes_on(arguments, monkeypatch, capsys):
    def stopped(settings):
        return KeyboardInterrupt() if len(told.jobs) == 5 else 1

    told = Processes(monkeypatch, stopped)
    with pytest.raises(KeyboardInterrupt):
        study.main(arguments)
    before = rows_of(arguments)
    assert len(before) == 2 + 4
    told = Processes(monkeypatch)
    assert study.main([*arguments, "--dry-run"]) == 0
    assert told.jobs == []
    said = capsys.readouterr().out
    assert "wordnet, lomo, lr 0.1, seed 0, validation part: there is a row" in said
    assert "wordnet, lomo, lr 0.1, seed 1, test part: to do, about" in said
    assert study.main(arguments) == 0
    assert len(told.jobs) == 10 - 4
    assert rows_of(arguments)[: len(before)] == before
    told.jobs.clear()
    assert study.main(arguments) == 0  # nothing is left
    assert told.jobs == []
    assert study.main([*arguments, "--steps", "3"]) == 0  # another study
    assert len(told.jobs) == 8


def test_no_run_is_begun_that_does_not_fit(arguments, monkeypatch, capsys):
    told = Processes(monkeypatch, seconds=60.0)
    assert study.main([*arguments, "--hours", "0.001"]) == 1
    assert len(told.jobs) == 1  # how long it takes was not known before
    assert "do not fit into --hours; the same command goes on" in capsys.readouterr().out
    assert study.main([*arguments, "--hours", "10"]) == 0
    assert len(told.jobs) == 10


def test_a_run_that_fails_has_a_row_and_is_tried_again(arguments, monkeypatch, capsys):
    def right(settings):
        return "no memory" if settings.get("optimizer") == "adamw" else 1

    told = Processes(monkeypatch, right)
    assert study.main(arguments) == 1
    assert [row["error"] for row in rows_of(arguments) if row["method"] == "adamw"] == [
        "no memory", "no memory",
    ]  # fmt: skip
    assert "adamw, the best rate, seed 1, test part: left out" in capsys.readouterr().out
    assert len(told.jobs) == 8
    told = Processes(monkeypatch)
    assert study.main(arguments) == 0
    assert [name for name, *_ in told.runs] == ["adamw"] * 4


def test_a_process_that_fails_says_why():
    found = study.started({"settings": {"lr": -1}, "trains": True, "before": None}, threads=1)
    assert found == {"error": "ValueError: lr must be a number of at least 0, got -1"}


def test_the_study_on_a_tiny_model(arguments, tmp_path, tiny):
    """Killed after its first run; the second time it ends. What its rows say of a run is what the
    run itself gives."""
    given = ["--methods", "lomo", "--rates", "1", "--seeds", "1", "--threads", "1",
             "--checkpointing", "--autocast"]  # fmt: skip
    command = [sys.executable, "-m", "bench.study", *arguments, *given]
    path = Path(arguments[-1])
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            while process.poll() is None and len(record.load(path)) < 3:
                time.sleep(0.1)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    first = record.load(path)
    assert [row["method"] for row in first] == ["majority", "majority", "zero-shot"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = record.load(path)
    assert rows[:3] == first
    assert [(row["method"], row["part"], row["seed"]) for row in rows[3:]] == [
        ("zero-shot", "test", ""), ("lomo", "validation", "0"), ("lomo", "test", "1"),
    ]  # fmt: skip
    zero, last = rows[3], rows[5]
    assert ", 1 threads" in last["device"]
    assert float(last["cpu_seconds"]) > float(last["step_cpu_seconds"]) > 0
    assert int(last["peak_bytes"]) > int(last["gradient_bytes"]) > 0 == int(last["state_bytes"])

    options = study.parser().parse_args([*arguments, *given])
    data = study_runs.read("wordnet", options)
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, getattr(data, name))))
    settings = finetune.Settings(
        model=tiny, train=str(tmp_path / "train.jsonl"), held_out=str(tmp_path / "test.jsonl"),
        eval_size=TEST, length=study_runs.LENGTH, steps=2, batch_size=4, lr=0.1, seed=1,
        autocast=True, checkpointing=True,
    )  # fmt: skip
    report = finetune.run(settings)
    for row, score in ((zero, report.before), (last, report.after)):
        assert row["items"] == paired.packed(score.items)
        assert int(row["right"]) == score.items.count("1") == score.value * score.count
        assert len(score.items) == int(row["count"]) == TEST
    assert job.evaluate(settings) == report.before


def test_a_score_that_is_known_is_not_taken_again(tiny, questions, monkeypatch):
    settings = finetune.Settings(model=tiny, train=questions, steps=1)
    scored, real = [], job.score
    monkeypatch.setattr(job, "score", lambda *a, **k: scored.append(1) or real(*a, **k))
    whole = finetune.run(settings)
    assert len(scored) == 2
    known = finetune.run(settings, before=whole.before)
    assert len(scored) == 3
    assert (known.before, known.after, known.loss) == (whole.before, whole.after, whole.loss)


# -- the page --------------------------------------------------------------------------------------


def test_the_tables_say_what_the_rows_allow(arguments, tiny, monkeypatch):
    """Two seeds of one method and one of another: one of each is shown."""

    def right(settings):
        if settings.get("optimizer") == "lomo" and "test" in settings["held_out"]:
            return 30 + 2 * settings["seed"]
        return 5

    told = Processes(monkeypatch, right)
    study.main(arguments)
    rows = rows_of(arguments)
    assert len(told.jobs) == 10
    monkeypatch.setattr(record, "read", lambda name: rows)
    page = study_table.table()
    title = "float32, 2 steps of 4 questions; 40 questions in the test part, 2 seeds"
    assert f"**wordnet**: {Path(tiny).name}, {title}.\n" in page
    assert "| lomo | 0.1 of 0.1, 0.3 | 0.208 | 0.825 | 0.800 to 0.850 | " in page
    assert "- lomo is better than adamw here." in page
    assert "No difference" not in page
    assert "- Not run: adalomo, lora, lora+lomo, prefix." in page
    assert "Tasks without rows: boolq, cb, " in page
    monkeypatch.setattr(record, "read", lambda name: rows[:-1])
    assert "40 questions in the test part, 1 seeds" in study_table.table()
    others = [row | {"task": "copa"} for row in rows]
    monkeypatch.setattr(record, "read", lambda name: rows + others)
    assert "prefix.\n\n**copa**: " in study_table.table()  # no line of the list before it


def test_every_option_has_a_line_in_the_page_and_a_test():
    page, tests = (ROOT / "docs" / "study.md").read_text(), Path(__file__).read_text()
    for action in study.parser()._actions[1:]:
        assert f"`{action.option_strings[0]}" in page
        assert f'"{action.option_strings[0]}"' in tests
    assert "study" in readme.PAGES["docs/study.md"]
