"""A run and its folder: steps, checkpoints and their choice, logs, one writer, one identity."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from finetuning import loaded, result, run, weights_of  # noqa: E402

from lomo_kernels import finetune  # noqa: E402
from lomo_kernels.finetune import checkpoint, data, log  # noqa: E402
from lomo_kernels.finetune.examples import batch_of  # noqa: E402
from lomo_kernels.finetune.ranks import Ranks  # noqa: E402
from lomo_kernels.integrations import shapes, weights  # noqa: E402
from lomo_kernels.memory import report as memory_report  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


class Quiet(finetune.Display):
    """Shows nothing; asks the run to stop after a step, as Ctrl-C does."""

    def __init__(self, stop_after=None):
        super().__init__(file=io.StringIO())
        self.stop_after = stop_after

    @contextlib.contextmanager
    def steps(self, total, first):
        def show(step, *values):
            if step == self.stop_after:
                os.kill(os.getpid(), signal.SIGINT)

        yield show


def tuned(out, stop_after=None, output=None, **settings):
    """-> the Report of a run in a folder."""
    output = finetune.Output(out=str(out), **(output or {}))
    return finetune.run(finetune.Settings(**settings), output, Quiet(stop_after))


def trained(out):
    return transformers.AutoModelForCausalLM.from_pretrained(out / "model")


def difference(one, other):
    pairs = zip(one.parameters(), other.parameters())
    return max((a - b).abs().max().item() for a, b in pairs)


def rows_of(folder):
    return [json.loads(line) for line in (folder / log.NAME).read_text().splitlines()]


# -- steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"strategy": "two_backward"},
        {"strategy": "partial"},
        {"clip_grad_norm": None, "strategy": "immediate"},
        {"norm": "tensor"},
        {"optimizer": "sgd"},
        {"dtype": "float16", "loss_scale": 1024.0},
    ],
    ids=str,
)
def test_accumulated_batches_are_one_large_batch(tiny, questions, tmp_path, how):
    """Prompts and answers differ in length: every token of the step counts the same."""
    same = {"model": tiny, "train": questions, "steps": 3, "lr": 0.3, **how}
    whole = tuned(tmp_path / "whole", batch_size=8, **same)
    parts = tuned(tmp_path / "parts", batch_size=2, gradient_accumulation=4, **same)
    allowed = 1e-5 if "dtype" not in how else 4e-3  # of float16, rounded at 3 steps
    assert difference(trained(tmp_path / "whole"), trained(tmp_path / "parts")) < allowed
    assert difference(trained(tmp_path / "whole"), weights.load_model(tiny)) > 0.01
    assert parts.loss == pytest.approx(whole.loss, rel=1e-3)


def test_accumulation_is_torch_s(tiny, questions, tmp_path):
    """SGD with clip_grad_norm_ on the mean over the tokens of two batches."""
    settings = {"train": questions, "length": 64, "warmup": 0.0, "schedule": "constant"}
    tuned(tmp_path, model=tiny, steps=1, batch_size=3, gradient_accumulation=2, lr=0.3, **settings)
    model, tokenizer, examples = loaded(tiny, **settings)
    order = torch.randperm(len(examples.train), generator=torch.Generator().manual_seed(0))
    losses = []
    for i in order[:6]:
        batch = batch_of([examples.train[i]], tokenizer.pad_token_id, "cpu")
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(
            logits, batch["labels"][0, 1:], reduction="none")[batch["labels"][0, 1:] != -100]
        )  # fmt: skip
    torch.cat(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.3).step()
    assert difference(trained(tmp_path), model) < 1e-6


def test_accumulation_on_the_command_line(tiny, questions, tmp_path):
    assert run("--model", tiny, "--train", questions, "--gradient-accumulation", 9, "--epochs", 1,
               "--out", tmp_path) == 0  # fmt: skip
    assert result(tmp_path)["steps"] == 3  # of 108 examples, 36 a step


@pytest.mark.parametrize(
    ("schedule", "warmup", "parts"),
    [
        ("linear", 1 / 2, [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
        ("cosine", 1 / 3, [1 / 2, 1, 1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4]),
        ("constant", 1 / 3, [1 / 2, 1, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_of_every_step(tiny, questions, tmp_path, schedule, warmup, parts):
    tuned(tmp_path, model=tiny, train=questions, steps=6, lr=0.5, schedule=schedule, warmup=warmup,
          batch_size=1, eval_size=1)  # fmt: skip
    rates = [row["lr"] for row in rows_of(tmp_path) if "lr" in row]
    assert rates == pytest.approx([0.5 * part for part in parts])


def test_every_pass_takes_all_examples_in_another_order(tiny, questions, tmp_path):
    """Without learning each example has its own loss."""
    tuned(tmp_path, model=tiny, train=questions, train_size=6, steps=12, batch_size=1, lr=0.0,
          eval_size=1)  # fmt: skip
    losses = result(tmp_path)["losses"]
    assert sorted(losses[:6]) == pytest.approx(sorted(losses[6:]))
    assert losses[:6] != pytest.approx(losses[6:])


def test_autocast_computes_in_bfloat16_with_float32_weights(tiny, questions, tmp_path):
    arguments = ["--model", tiny, "--train", questions, "--steps", 2, "--seed", 3]
    assert run(*arguments, "--out", tmp_path / "plain") == 0
    assert run(*arguments, "--autocast", "--out", tmp_path / "cast") == 0
    plain, cast = (result(tmp_path / name)["losses"] for name in ("plain", "cast"))
    assert plain != cast
    assert cast == pytest.approx(plain, rel=1e-2)
    assert trained(tmp_path / "cast").dtype == torch.float32
    model, tokenizer, examples = loaded(tiny, train=questions, seed=3)
    order = torch.randperm(108, generator=torch.Generator().manual_seed(3 * 1_000_003))[:4]
    batch = batch_of([examples.train[i] for i in order], tokenizer.pad_token_id, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert cast[0] == model(**batch).loss.item()


# -- checkpoints -----------------------------------------------------------------------------------

UNSTEADY = {"lr": 2.0, "schedule": "constant", "warmup": 0.0, "batch_size": 8, "eval_size": 30}


def test_the_best_weights_of_the_validation_part_are_taken(tiny, questions, tmp_path):
    """They are those of a run that ends at that step; what is held out is scored at the ends."""
    same = {"model": tiny, "train": questions, "eval_every": 2, **UNSTEADY}
    report = tuned(tmp_path / "long", steps=12, **same)
    rows = rows_of(tmp_path / "long")
    scores = {
        row["step"]: row["validation/accuracy"] for row in rows if "validation/accuracy" in row
    }
    assert list(scores) == [2, 4, 6, 8, 10, 12]
    assert report.best_step == max(scores, key=scores.get) < 12
    assert [row["step"] for row in rows if "held_out/accuracy" in row] == [0, 12]
    short = tuned(tmp_path / "short", steps=report.best_step, **same)
    assert weights_of(tmp_path / "long") == weights_of(tmp_path / "short")
    assert report.after == short.after
    assert not (tmp_path / "long" / "best").exists()


def test_no_part_of_the_data_is_in_another(tiny, questions):
    parts = data.read(finetune.Settings(model=tiny, train=questions, eval_every=1))
    count = [len(part) for part in (parts.train, parts.validation, parts.held_out)]
    assert count == [98, 10, 12]
    whole = [*parts.train, *parts.validation, *parts.held_out]
    lines = Path(questions).read_text().splitlines()
    assert sorted(q.prompt for q in whole) == sorted(json.loads(line)["prompt"] for line in lines)
    parts = data.read(finetune.Settings(model=tiny, train=questions))
    assert [len(part) for part in (parts.train, parts.validation, parts.held_out)] == [108, 0, 12]
    texts = data.read(finetune.Settings(model=tiny, eval_every=1, eval_size=20))
    assert len(texts.validation) == (len(texts.train) + len(texts.validation)) // 10 > 1
    assert not {t.text for t in texts.validation} & {t.text for t in texts.train}


def test_a_choice_of_weights_survives_an_interruption(tiny, questions, tmp_path):
    same = {"model": tiny, "train": questions, "eval_every": 2, "steps": 12, **UNSTEADY}
    whole = tuned(tmp_path / "whole", **same)
    output = {"save_every": 5}
    for stop in (7, 8):
        with pytest.raises(finetune.StoppedError, match="the same command goes on"):
            tuned(tmp_path / "cut", stop_after=stop, output=output, **same)
    report = tuned(tmp_path / "cut", output=output, **same)
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    assert (report.best_step, report.after) == (whole.best_step, whole.after)
    numbers = ("step", "loss", "lr", "gradient_norm", "validation/accuracy", "held_out/accuracy")
    cut, once = (
        [{key: row[key] for key in numbers if key in row} for row in rows_of(tmp_path / name)]
        for name in ("cut", "whole")
    )
    assert cut == once


def test_a_resumed_run_draws_what_it_would_have_drawn(tiny, tmp_path):
    """A model with dropout. The score before training is not made again of trained weights."""
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    same = {"length": 32, "steps": 6, "lr": 0.3, "batch_size": 8, "eval_size": 8}
    whole = tuned(tmp_path / "whole", model=str(model), **same)
    with pytest.raises(finetune.StoppedError):
        tuned(tmp_path / "cut", stop_after=4, model=str(model), **same)
    cut = tuned(tmp_path / "cut", model=str(model), **same)
    assert cut.before == whole.before
    assert cut.before.value > cut.after.value
    assert result(tmp_path / "cut")["losses"] == result(tmp_path / "whole")["losses"]
    tuned(tmp_path / "plain", model=tiny, **same)
    assert result(tmp_path / "plain")["losses"] != result(tmp_path / "whole")["losses"]


@pytest.mark.parametrize("fails", ["checkpoint-4", "model", "result.json"])
def test_a_checkpoint_stays_until_what_replaces_it_is_there(
    tiny, questions, tmp_path, monkeypatch, capsys, fails
):
    rename = Path.rename

    def full(path, target):
        if Path(target).name == fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    given = ["--model", tiny, "--train", questions, "--steps", 4, "--save-every", 2]
    given += ["--eval-size", 2, "--out", tmp_path]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", full)
        assert run(*given) == 2
    assert "No space left on device" in capsys.readouterr().err
    step, path = checkpoint.latest(tmp_path)
    assert step == (2 if fails == "checkpoint-4" else 4)
    assert (path / "state.pt").is_file()
    assert run(*given) == 0
    assert f"going on after step {step} of 4" in capsys.readouterr().out
    assert len(result(tmp_path)["losses"]) == 4


def test_eval_every_needs_no_folder(tiny, questions, capsys):
    assert run("--model", tiny, "--train", questions, "--steps", 3, "--eval-every", 2) == 0
    assert "validation after step 3: accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 2])
def test_the_newest_checkpoints_are_kept(tiny, questions, tmp_path, keep):
    arguments = ["--model", tiny, "--train", questions, "--steps", 5, "--save-every", 1]
    assert run(*arguments, "--keep", keep, "--out", tmp_path) == 0
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-5"][2 - keep :]
    last = trained(tmp_path)
    for path in tmp_path.glob("checkpoint-*"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        checkpoint.load_weights(path, Ranks(), model)
        assert (difference(model, last) == 0) == (path.name == "checkpoint-5")


# -- logs ------------------------------------------------------------------------------------------


def test_every_step_is_in_the_log(tiny, questions, tmp_path):
    arguments = ["--model", tiny, "--train", questions, "--steps", 4, "--dtype", "float16"]
    assert run(*arguments, "--out", tmp_path / "out", "--log", tmp_path / "log") == 0
    assert not (tmp_path / "out" / log.NAME).exists()
    first, *steps, last = rows_of(tmp_path / "log")
    assert (first["step"], last["step"]) == (0, 4)
    record = result(tmp_path / "out")
    assert first["held_out/accuracy"] == record["before"]["value"]
    assert last["held_out/accuracy"] == record["after"]["value"]
    assert [row["loss"] for row in steps] == record["losses"]
    assert [row["lr"] for row in steps] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert all(row["gradient_norm"] > 0 and row["tokens_per_second"] > 0 for row in steps)
    assert {row["loss_scale"] for row in steps} <= {65536.0 / 2**i for i in range(5)}


def test_a_number_that_is_not_finite_is_null(tmp_path):
    with contextlib.closing(log.Log(tmp_path)) as lines:
        lines.add(1, loss=float("nan"), norm=None, scale=1)
    assert rows_of(tmp_path) == [{"step": 1, "loss": None, "scale": 1}]


def test_tensorboard_reads_its_events(tmp_path, tiny, questions):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tuned(tmp_path / "out", model=tiny, train=questions, steps=3,
          output={"log": str(tmp_path / "log")})  # fmt: skip
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    got = [(event.step, event.value) for event in events.Scalars("loss")]
    losses = result(tmp_path / "out")["losses"]
    assert got == [(i, pytest.approx(loss)) for i, loss in enumerate(losses, 1)]


# -- options in a file -----------------------------------------------------------------------------


def test_options_come_from_a_file(tiny, questions, tmp_path, capsys):
    given = ["--model", tiny, "--train", questions, "--lr", "3e-2", "--loss-scale", "none",
             "--checkpointing", "--steps", 3, "--keep", 1]  # fmt: skip
    assert run(*given, "--dump-config") == 0
    dumped = capsys.readouterr().out
    path = tmp_path / "run.yaml"
    path.write_text(dumped)
    assert run("--config", path, "--dump-config") == 0
    assert capsys.readouterr().out == dumped
    assert run("--config", path, "--no-checkpointing", "--steps", 2, "--out", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert record["lr"] == 0.03
    assert record["loss_scale"] is None
    assert record["checkpointing"] is False
    assert record["steps"] == result(tmp_path / "out")["steps"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1e-4\n", None),  # a text in YAML
        ("batch-size: 2\n", None),
        ("lerning-rate: 1\n", "there is no option lerning_rate"),
        ("lr: fast\n", "lr must be a number, got 'fast'"),
        ("steps: 1.5\n", "steps must be a whole number, got 1.5"),
        ("steps: true\n", "steps must be a whole number, got True"),
        ("checkpointing: 3\n", "checkpointing must be true or false, got 3"),
        ("batch_size: null\n", "batch_size must be a whole number, got None"),
        ("- lr\n", "wanted names with values, got list"),
        ("lr: [1\n", "cannot be read as YAML"),
        (None, "cannot be read as YAML"),
    ],
)
def test_a_file_of_options_is_checked(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    status = run("--config", path, "--dump-config")
    printed = capsys.readouterr()
    if message is None:
        assert status == 0
        assert "lr: 0.0001" in printed.out or "batch_size: 2" in printed.out
    else:
        assert status == 2
        assert message in printed.err
        assert printed.err.count("\n") == 1


@pytest.mark.parametrize("option", ["--steps", "--lr", "--epochs"])
def test_options_that_are_no_numbers(capsys, option):
    assert run(option, "many") == 2
    assert f"{option[2:]} must be a " in capsys.readouterr().err


# -- before the model is loaded --------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch):
    def load(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(weights, "load_model", load)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "sgd,adam"], "optimizer must be one of"),
        (["--compare", "sgd=fast"], "could not convert string to float"),
        (["--compare", "adalomo", "--strategy", "immediate", "--norm", "tensor"], "immediate"),
        (["--rounding", "up"], "rounding must be"),
        (["--strategy", "immediate"], "strategy 'immediate' updates before"),
        (["--loss-scale", "big"], "loss_scale must be"),
        (["--train", "none.jsonl"], "there is no file none.jsonl"),
        (["--gradient-accumulation", "0"], "gradient_accumulation must be a whole number above 0"),
        (["--eval-every", "0"], "eval_every must be a whole number above 0"),
        (["--train-size", "0"], "train_size must be a whole number above 0"),
        (["--save-every", "0"], "save_every must be a whole number above 0"),
        (["--keep", "-1"], "keep must be a whole number of at least 0"),
        (["--truncate", "left"], "truncate must be one of prompt-left, skip, error, got 'left'"),
        (["--score", "max"], "score must be one of mean, sum, got 'max'"),
        (
            ["--optimizer", "adamw", "--strategy", "partial"],
            "strategy must be auto with",
        ),
        (["--optimizer", "sgd", "--norm", "tensor"], "norm must be global with optimizer sgd, got"),
        (
            ["--optimizer", "sgd", "--rounding", "split"],
            "rounding must be auto or nearest with",
        ),
        (["--optimizer", "sgd", "--loss-scale", "2"], "loss_scale must be auto or None with optim"),
        (["--optimizer", "sgd", "--backend", "native"], "backend must be auto with optimizer sgd"),
        (["--autocast", "--dtype", "bfloat16"], "autocast must be with dtype float32, got True"),
    ],
    ids=lambda value: None,
)
def test_everything_is_checked_before(tiny, no_model, capsys, arguments, message):
    assert run("--model", tiny, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_stops(tiny, questions, tmp_path, no_model, capsys):
    arguments = ["--model", tiny, "--train", questions, "--epochs", 2, "--batch-size", 3]
    arguments += ["--gradient-accumulation", 2, "--out", tmp_path / "out", "--length", 64]
    assert run(*arguments, "--dry-run") == 0
    printed = capsys.readouterr().out
    settings = finetune.Settings(model=tiny, train=questions, length=64)
    examples = data.load(settings, weights.load_tokenizer(tiny))
    sizes = [len(e.prompt + e.completion) for e in examples.train]
    answers = sum(len(e.completion) for e in examples.train)
    assert (
        f"36 steps of 6 examples, 18 a pass; {sum(sizes):,} tokens a pass, {answers:,} of them "
        f"trained; the longest example has {max(sizes)}"
    ) in printed
    with torch.device("meta"):
        model = shapes.from_config(weights.load_config(tiny), torch.float32)
    size = memory_report.size(sum(4 * p.numel() for p in model.parameters()))
    assert f"parameters {size}, gradients" in printed
    assert "between the backwards of a step all gradients are held" in printed
    assert not (tmp_path / "out").exists()
    assert run(*arguments[:4], "--autocast", "--norm", "tensor", "--dry-run") == 0
    assert "autocast keeps activations in half of it" in capsys.readouterr().out


def test_a_dry_run_plans_what_each_process_has(tiny, questions, no_model, monkeypatch):
    def planned(**options):
        shown = io.StringIO()
        settings = finetune.Settings(model=tiny, train=questions, **options)
        return finetune.dry_run(settings, finetune.Display(shown)), shown.getvalue()

    alone, _ = planned()
    offloaded, shown = planned(offload=True)
    size = memory_report.size(offloaded.host_peak)
    assert f"host memory of each process: {size}" in shown
    assert offloaded.host_peak >= alone.maxima["parameters"]
    sharded, shown = planned(sharding="fsdp2", units="fine")
    assert "the plan is without sharding" in shown
    assert sharded.maxima == alone.maxima
    with pytest.raises(ValueError, match="units 'fine' is of FSDP2"):
        planned(units="fine")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sharding 'none' is for one process"):
        planned(sharding="none")
    half, _ = planned()
    assert (half.job.batch, half.job.shards) == (2, 2)
    assert half.maxima["gradients"] < alone.maxima["gradients"]
    assert planned(units="fine")[0].job.units == "fine"
    _, shown = planned(tensor_parallel=2)
    assert "the plan is without tensor_parallel" in shown


# -- the folder ------------------------------------------------------------------------------------


def test_changed_data_or_model_is_told(tiny, questions, tmp_path, capsys):
    """Under the same names: neither trained on nor taken for done."""
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    content = Path(questions).read_text()
    train.write_text(content)
    held_out.write_text(content)
    model = tmp_path / "model"
    weights.save(model, *weights.load(tiny))
    arguments = ["--model", model, "--train", train, "--held-out", held_out, "--steps", 1]
    arguments += ["--out", tmp_path / "out"]
    assert run(*arguments) == 0
    train.write_text(content.replace("\n", "\n\n"))  # the same rows
    assert run(*arguments) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    before = weights_of(tmp_path / "out")
    changed = content.replace("sky of red", "sea of red", 1)
    for path, what in ((train, "what is trained on of train"), (held_out, "what is held out of")):
        path.write_text(changed)
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert what in error
        assert "has changed since the run in" in error
        path.write_text(content)
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run(*arguments) == 2
    assert f"the model {model} has changed since the run in" in capsys.readouterr().err
    assert weights_of(tmp_path / "out") == before


def test_one_writer_at_a_time(tiny, questions, tmp_path, capsys):
    arguments = ["--model", tiny, "--train", questions, "--steps", 1, "--out", tmp_path / "out"]
    with checkpoint.claimed(tmp_path / "out", {}, {}):
        (tmp_path / "out" / "settings.json").unlink()
        assert run(*arguments) == 2
        assert "another run is writing to" in capsys.readouterr().err
    assert run(*arguments) == 0


def test_a_folder_that_cannot_be_made(tiny, questions, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--model", tiny, "--train", questions, "--out", tmp_path / "file" / "out") == 2
    error = capsys.readouterr().err
    assert "cannot write to" in error
    assert "Not a directory" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("size", [100_000, 200_000], ids=["in the weights", "in the rest"])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(
    tiny, questions, tmp_path, capsys, size
):
    """Of the system's limits one on the size of files is nearest."""
    arguments = ["--model", tiny, "--train", questions, "--steps", 4, "--save-every", 2]
    arguments += ["--optimizer", "adamw", "--out", tmp_path / "out"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        assert run(*arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert f"cannot write to {tmp_path / 'out'}: " in error
    assert "bytes are free there" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert run(*arguments) == 0


def test_ctrl_c_while_loading_is_one_sentence(tiny, questions, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)

    arguments = ["--model", tiny, "--train", questions, "--steps", 1, "--out", tmp_path]
    with monkeypatch.context() as patched:
        patched.setattr(weights, "load_model", interrupted)
        # processes of pytest-xdist ignore the signal
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert run(*arguments) == 130
        finally:
            signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "lomo-kernels: stopped; what is in --out is whole\n"
    assert run(*arguments) == 0


# -- the last word ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (["--lr", 30, "--schedule", "constant", "--steps", 6], 0, "which is worse: lower --lr"),
        (["--lr", "1e30", "--optimizer", "sgd"], 1, "the run diverged, lower --lr"),
        (["--lr", "0.1"], 0, None),
    ],
)
def test_a_run_that_learned_nothing_does_not_end_as_a_success(
    tiny, tmp_path, capsys, arguments, status, word
):
    given = ["--model", tiny, "--length", 32, "--steps", 3, "--eval-size", 8, *arguments]
    assert run(*given, "--out", tmp_path) == status
    last = capsys.readouterr().out.splitlines()
    if word is None:
        assert last[-1] == f"the fine-tuned model is in {tmp_path}/model"
    else:
        assert last[-1].startswith("no success: ")
        assert last[-1].endswith(word)
        assert last[-2] == f"the model is in {tmp_path}/model"


def test_the_command_has_every_field(capsys):
    """Settings and Output are the one definition."""
    with pytest.raises(SystemExit):
        run("--help")
    printed = capsys.readouterr().out
    for each in (*dataclasses.fields(finetune.Settings), *dataclasses.fields(finetune.Output)):
        assert f"--{each.name.replace('_', '-')}" in printed
