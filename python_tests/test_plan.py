"""Plans against real steps of small models, public parameter counts, and whole traces."""

import dataclasses
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
CONFIGS = {"llama": LLAMA, "tied": TIED, "gpt2": GPT2, "mixtral": MIXTRAL}
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
@pytest.mark.parametrize("checkpointing", [None, "non_reentrant"])
@pytest.mark.parametrize("name", ["lomo auto", "adalomo", "sgd", "adamw"])
@pytest.mark.parametrize("model", ["tied", "gpt2", "mixtral"])
def test_other_models_need_what_is_planned(model, name, checkpointing):
    from transformers.integrations import moe

    if model == "mixtral" and not hasattr(moe, "_grouped_mm_fallback_backward_fake"):
        pytest.skip("backward of this transformers' experts reads values: no plan without them")
    job = as_job(name, checkpointing=checkpointing)
    agree(predict(CONFIGS[model], job), measured(CONFIGS[model], job))


LORA = (("lora_rank", 4), ("lora_dropout", 0.1), ("lora_targets", None))
ADAPTED = {
    "lora": as_job("adamw", adapter="lora", adapter_options=LORA),
    "lora, 16 bits": as_job("adamw", "bfloat16", adapter="lora", adapter_options=LORA),
    "prefix": as_job("adamw", adapter="prefix", adapter_options=(("prefix_tokens", 5),)),
    "lora+lomo": as_job("lomo two_backward", adapter="lora+lomo", adapter_options=LORA),
    "lora+lomo auto": as_job("lomo auto", adapter="lora+lomo", adapter_options=LORA),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("checkpointing", [None, "non_reentrant"])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_need_what_is_planned(name, checkpointing):
    pytest.importorskip("peft", reason="peft is not installed")
    if name == "prefix" and checkpointing is not None:
        pytest.skip("peft has no prefix for a checkpointed model")
    job = dataclasses.replace(ADAPTED[name], checkpointing=checkpointing)
    planned = predict(LLAMA, job)
    agree(planned, measured(LLAMA, job))
    assert planned.peak.total < predict(LLAMA, as_job("adamw", job.dtype)).peak.total


def test_a_model_that_looks_at_values_is_refused_in_one_sentence(monkeypatch):
    from lomo_kernels.memory import optimizers

    def looks(name, model, options):
        return [torch.optim.SGD(model.parameters())], lambda loss: loss.item()

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


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (["--adapter", "lora"], 8 * 8 * (64 + 64 + 64 + 32)),
        (["--adapter", "lora", "--lora-rank", 2, "--lora-targets", "o_proj"], 8 * 2 * (64 + 64)),
        (["--adapter", "prefix", "--prefix-tokens", 3], 8 * 2 * 3 * 32),
    ],
    ids=lambda options: " ".join(map(str, options)) if isinstance(options, list) else None,
)
def test_an_adapter_has_states_in_float32(config, options, trained, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    assert run("--model", config, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["optimizer"] == "adamw"
    assert found["maxima_bytes"]["gradients"] == 4 * trained
    assert found["maxima_bytes"]["states"] == pytest.approx(8 * trained, rel=0.02)  # and counters
    model = transformers.AutoModelForCausalLM.from_config(LLAMA)
    parameters = 2 * sum(p.numel() for p in model.parameters()) + 4 * trained
    assert found["maxima_bytes"]["parameters"] == parameters


def test_dropout_of_an_adapter_is_planned(config, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    activations = []
    for part in (0.0, 0.5):
        assert run("--model", config, "--adapter", "lora", "--lora-dropout", part, "--json") == 0
        activations.append(json.loads(capsys.readouterr().out)["maxima_bytes"]["activations"])
    assert activations[0] < activations[1]


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
        (["--adapter", "dora"], "adapter must be one of None, lora, prefix, lora+lomo"),
        (
            ["--adapter", "lora", "--optimizer", "lomo"],
            "optimizer must be one of adamw, got",
        ),
        (
            ["--adapter", "lora+lomo", "--optimizer", "sgd"],
            "optimizer must be one of lomo, ada",
        ),
        (["--adapter", "lora", "--devices", 2], "adapter must be None with sharding 'fsdp2', got"),
        (["--adapter", "prefix", "--checkpointing"], "checkpointing must be None with a prefix"),
        (["--adapter", "lora", "--lora-dropout", 1], "lora_dropout must be at least 0 and below 1"),
        (["--adapter", "lora", "--lora-rank", 0], "lora_rank must be a whole number of at least 1"),
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
