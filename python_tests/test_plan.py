"""Plans against real steps of small models, public parameter counts, and whole traces."""

import itertools
import json

import pytest
import torch

from lomo_kernels import cli
from lomo_kernels.integrations import huggingface
from lomo_kernels.memory import CATEGORIES, OPTIMIZERS, report
from lomo_kernels.memory.predict import Job, model_of, predict, record
from lomo_kernels.memory.timeline import summarise, whole

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


TOLERANCE = 0.03  # of each category; what is found is far smaller
SMALL = 0.002  # of the peak: categories below it are only compared with that

LLAMA = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=256,
)  # fmt: skip
TIED = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=512, tie_word_embeddings=True,
)  # fmt: skip
GPT2 = transformers.GPT2Config(n_embd=64, n_layer=6, n_head=4, vocab_size=256, n_positions=256)
MIXTRAL = transformers.MixtralConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=256, num_local_experts=4, sliding_window=None,
)  # fmt: skip
QWEN3 = transformers.Qwen3MoeConfig(
    hidden_size=64, moe_intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=256, num_experts=16, num_experts_per_tok=2,
)  # fmt: skip
GPT_OSS = transformers.GptOssConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, vocab_size=256, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip
CONFIGS = {"llama": LLAMA, "tied": TIED, "gpt2": GPT2, "mixtral": MIXTRAL}
CONFIGS |= {"qwen3": QWEN3, "gpt-oss": GPT_OSS}
CLIPPED = (("clip_grad_norm", 1.0),)
JOBS = {name: Job(name) for name in OPTIMIZERS if "lomo" not in name}
JOBS |= {
    "lomo": Job("lomo"),
    "lomo auto": Job("lomo", options=CLIPPED),
    "lomo one_backward": Job("lomo", options=(*CLIPPED, ("strategy", "one_backward"))),
    "lomo two_backward": Job("lomo", options=(*CLIPPED, ("strategy", "two_backward"))),
    "lomo partial": Job("lomo", options=(*CLIPPED, ("strategy", "partial"))),
    "lomo immediate": Job("lomo", options=(("strategy", "immediate"),)),
    "lomo split": Job("lomo", options=(("rounding", "split"),)),
    "adalomo": Job("adalomo", options=CLIPPED),
}


def as_job(name, dtype="float32", **more):
    job = JOBS[name]
    if "master" in name or "split" in name:
        dtype = "bfloat16"
    fields = {**vars(job), "dtype": dtype, "batch": 2, "sequence": 24, "device": "cpu"}
    return Job(**{**fields, **more})


def agree(planned, measured):
    """Each category at the peak, and at its own highest."""
    peak = measured.peak.total
    assert planned.peak.total == pytest.approx(peak, rel=TOLERANCE)
    for ours, real in (
        (planned.peak.parts, measured.peak.parts),
        (planned.maxima, measured.maxima),
    ):
        for category in CATEGORIES:
            within = pytest.approx(real[category], rel=TOLERANCE, abs=SMALL * peak)
            assert ours[category] == within, category


def measured(config, job):
    with torch.random.fork_rng():
        return whole(summarise(record(model_of(config, job), job)).values())


@pytest.mark.parametrize("checkpointing", [None, "non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", JOBS)
def test_llama_needs_what_is_planned(name, checkpointing):
    if checkpointing == "reentrant" and name in ("lomo two_backward", "lomo partial"):
        checkpointing = None  # refused, a norm pass needs the other kind
    job = as_job(name, checkpointing=checkpointing)
    agree(predict(LLAMA, job), measured(LLAMA, job))


@pytest.mark.filterwarnings("ignore:.*check_inputs.*:UserWarning")
@pytest.mark.parametrize(
    ("model", "name", "checkpointing"),
    [
        *itertools.product(
            ["tied", "gpt2", "mixtral"],
            ["lomo auto", "adalomo", "sgd", "adamw"],
            [None, "non_reentrant"],
        ),
        ("mixtral", "lomo one_backward", None),
        ("qwen3", "lomo one_backward", "non_reentrant"),
        ("qwen3", "lomo two_backward", None),
        ("gpt-oss", "lomo one_backward", None),
        ("gpt-oss", "lomo immediate", "non_reentrant"),
    ],
)
def test_other_models_need_what_is_planned(model, name, checkpointing):
    from transformers.integrations import moe

    experts = model in ("mixtral", "qwen3", "gpt-oss")
    if experts and not hasattr(moe, "_grouped_mm_fallback_backward_fake"):
        pytest.skip("backward of this transformers' experts reads values: no plan without them")
    job = as_job(name, checkpointing=checkpointing)
    agree(predict(CONFIGS[model], job), measured(CONFIGS[model], job))


def test_a_model_that_looks_at_values_is_refused_in_one_sentence(monkeypatch):
    from lomo_kernels.memory import optimizers

    def looks(name, model, options):
        return torch.optim.SGD(model.parameters()), lambda loss: loss.item()

    monkeypatch.setattr(optimizers, "make", looks)
    with pytest.raises(huggingface.ModelError, match="looks at the values of a tensor"):
        predict(LLAMA, as_job("sgd"))


# With which each optimizer steps all 30 layers; four of them with the others, which take long.
WHOLE = dict(zip(OPTIMIZERS, [None, "non_reentrant", "reentrant"] * 2))


@pytest.mark.parametrize("checkpointing", [None, "non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_smollm2_needs_what_is_planned(name, checkpointing):
    job = as_job(name, batch=1, sequence=32, checkpointing=checkpointing)
    config = huggingface.config_of("smollm2-135m")
    if checkpointing != WHOLE[name]:
        config.num_hidden_layers = 4
    agree(predict(config, job), measured(config, job))


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def run(*arguments):
    return cli.main(["plan", *map(str, arguments)])


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "adalomo", "--clip-grad-norm", 0.5, "--strategy", "one_backward"],
        ["--rounding", "split", "--dtype", "bfloat16", "--clip-grad-norm", 0],
        ["--batch", 2, "--sequence", 16, "--checkpointing"],
        ["--attention", "eager", "--device", "cpu", "--checkpointing", "reentrant"],
        ["--devices", 2, "--sharding", "fsdp2", "--strategy", "two_backward"],
        ["--devices", 2, "--units", "fine", "--offload", "cpu", "--rounding", "split"],
        ["--offload", "cpu"],
        ["--devices", 4, "--sharding", "zero3", "--optimizer", "adamw-master"],
        ["--device-memory", "1GiB", "--search", "sequence"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_every_option_runs(config, options, capsys):
    assert run("--model", config, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_config(LLAMA).parameters()
    )
    assert found["peak_bytes"] > 0


def test_it_says_whether_it_fits_and_draws(config, tmp_path, capsys):
    assert run("--model", config, "--device-memory", "1GiB", "--plot", tmp_path / "a.png") == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "fits, " in capsys.readouterr().out
    assert run("--model", config, "--device-memory", "1MiB") == 1
    assert "does not fit: " in capsys.readouterr().out


def test_it_shows_host_memory(config, capsys):
    assert run("--model", config, "--offload", "cpu", "--strategy", "two_backward") == 0
    printed = capsys.readouterr().out
    count = sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_config(LLAMA).parameters()
    )
    assert "in host memory" in printed
    assert report.size(2 * count) in printed
    assert "of host memory" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "llama-8t"], "llama-8t"),
        (["--model", "no/such/config.json"], "no/such/config.json"),
        (["--optimizer", "lion"], "optimizer must be one of lomo"),
        (["--batch", 0], "batch must be a whole number of at least 1, got 0"),
        (["--devices", 0], "devices must be a whole number of at least 1, got 0"),
        (["--sharding", "fsdp2"], "sharding 'fsdp2' needs devices of at least 2, got 1"),
        (["--units", "fine"], "units 'fine' needs sharding 'fsdp2', got 'none'"),
        (["--devices", 2, "--units", "coarse"], "units must be one of layer, fine, got 'coarse'"),
        (["--offload", "nvme"], "offload must be one of None, cpu, got 'nvme'"),
        (["--offload", "cpu", "--sharding", "none"], "offload 'cpu' needs sharding 'fsdp2'"),
        (["--devices", 2, "--sharding", "zero3"], "lomo trains no parameters of DeepSpeed"),
        (["--device-memory", "much"], "device_memory must be bytes or a text such as 24GiB"),
        (["--search", "batch"], "the search for what fits needs device_memory, got none"),
    ],
)
def test_wrong_arguments(config, options, message, capsys):
    arguments = options if "--model" in options else ["--model", config, *options]
    assert run(*arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("{}", "model_type"),
        ('{"model_type": "no such"}', "no such"),
        ('{"model_type": "t5"}', "cannot build this t5 model"),
        (
            '{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7}',
            "is not a multiple of",
        ),
    ],
)
def test_wrong_configurations(tmp_path, text, message, capsys):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert run("--model", path) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
