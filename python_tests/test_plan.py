"""Plans against real steps of small models, public parameter counts, and whole traces."""

import dataclasses
import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from lomo_kernels import cli
from lomo_kernels.integrations import shapes
from lomo_kernels.integrations.common import ModelError
from lomo_kernels.memory import CATEGORIES, OPTIMIZERS, plan, report
from lomo_kernels.memory.plan import byte_count
from lomo_kernels.memory.predict import Job, largest, model_of, predict, record
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
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 256,
}  # fmt: skip
LATENT = {
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
    "moe_intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
SIGHT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
# Of other kinds than the decoders above: recurrent, layers that differ, experts, an encoder, a
# decoder beside one, a model that also reads images.
KINDS = {
    "mamba": lambda: transformers.MambaConfig(**SHAPE, state_size=8),
    "mamba2": lambda: transformers.Mamba2Config(
        hidden_size=64, num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=16,
        num_hidden_layers=5, vocab_size=256,
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={**SHAPE, "head_dim": 16}, vision_config=SIGHT, mm_tokens_per_image=4
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SHAPE, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(**SHAPE, **LATENT),
    "t5": lambda: transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=3, num_heads=4, vocab_size=256
    ),
    "bert": lambda: transformers.BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
        vocab_size=256,
    ),
}  # fmt: skip
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


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, "non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", JOBS)
def test_llama_needs_what_is_planned(name, checkpointing):
    if checkpointing == "reentrant" and name in ("lomo two_backward", "lomo partial"):
        checkpointing = None  # refused, a norm pass needs the other kind
    job = as_job(name, checkpointing=checkpointing)
    agree(predict(LLAMA, job), measured(LLAMA, job))


@pytest.mark.slow
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


@pytest.mark.filterwarnings("ignore:.*check_inputs.*:UserWarning")
@pytest.mark.parametrize("model", KINDS)
def test_models_of_other_kinds_need_what_is_planned(model):
    from transformers.integrations import moe

    if model in ("gpt-oss", "deepseek-v3") and not hasattr(
        moe, "_grouped_mm_fallback_backward_fake"
    ):
        pytest.skip("backward of this transformers' experts reads values: no plan without them")
    job, config = as_job("lomo auto"), KINDS[model]()
    agree(predict(config, job), measured(config, job))


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
    with pytest.raises(ModelError, match="looks at the values of a tensor"):
        predict(LLAMA, as_job("sgd"))


# With which each optimizer steps all 30 layers; four of them with the others, which take long.
WHOLE = dict(zip(OPTIMIZERS, [None, "non_reentrant", "reentrant"] * 2))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, "non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_smollm2_needs_what_is_planned(name, checkpointing):
    job = as_job(name, batch=1, sequence=32, checkpointing=checkpointing)
    config = shapes.config_of("smollm2-135m")
    if checkpointing != WHOLE[name]:
        config.num_hidden_layers = 4
    agree(predict(config, job), measured(config, job))


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (transformers.BertConfig(), "AutoModelForMaskedLM"),
        (transformers.BertConfig(is_decoder=True), "AutoModelForCausalLM"),
        (transformers.BartConfig(), "AutoModelForSeq2SeqLM"),  # its decoder alone is causal
        (transformers.LlavaConfig(), "AutoModelForImageTextToText"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_which_model_of_a_configuration_is_trained(config, trained):
    assert shapes.kind_of(config) == trained


def test_a_model_that_needs_more_than_tokens_is_refused_in_one_sentence(monkeypatch):
    def images_only(self, *args, **kwargs):
        raise TypeError("pixel_values\nare missing")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", images_only)
    said = "this llama model does not run on tokens alone: TypeError: pixel_values are missing"
    with pytest.raises(ModelError, match=said):
        predict(LLAMA, as_job("sgd"))


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def run(*arguments):
    return cli.main(["plan", *map(str, arguments)])


@pytest.mark.parametrize(
    ("options", "planned"),
    [
        (
            ["--optimizer", "adalomo", "--clip-grad-norm", 0.5, "--strategy", "one_backward"],
            {"optimizer": "adalomo", "clip_grad_norm": 0.5, "strategy": "one_backward"},
        ),
        (
            ["--rounding", "split", "--dtype", "bfloat16", "--clip-grad-norm", 0],
            {"rounding": "split", "dtype": "bfloat16", "clip_grad_norm": None},
        ),
        (
            ["--batch", 2, "--sequence", 16, "--checkpointing"],
            {"batch": 2, "sequence": 16, "checkpointing": "non_reentrant"},
        ),
        (
            ["--attention", "eager", "--device", "cpu", "--checkpointing", "reentrant"],
            {"attention": "eager", "device": "cpu", "checkpointing": "reentrant"},
        ),
        (
            ["--devices", 2, "--sharding", "fsdp2", "--strategy", "two_backward"],
            {"shards": 2, "strategy": "two_backward"},
        ),
        (
            ["--devices", 2, "--units", "fine", "--offload", "cpu", "--rounding", "split"],
            {"shards": 2, "units": "fine", "offload": "cpu", "rounding": "split"},
        ),
        (["--offload", "cpu"], {"shards": 1, "units": "layer", "offload": "cpu"}),
        (
            ["--devices", 4, "--sharding", "zero3", "--optimizer", "adamw-master"],
            {"shards": 4, "optimizer": "adamw-master"},
        ),
        (
            ["--device-memory", 2**25, "--search", "sequence"],
            {"device_memory_bytes": 2**25, "largest_batch": None},
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_every_option_is_in_the_plan(config, options, planned, capsys):
    assert run("--model", config, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in planned} == planned
    assert found["parameters"] == sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_config(LLAMA).parameters()
    )
    assert found["peak_bytes"] > 0
    assert not found["text_alone"]
    if "--search" in options:
        assert found["largest_sequence"] > 512  # the default, which fits


@pytest.mark.parametrize(("memory", "most"), [(9, 0), (10, 1), (49, 4), (50, 5), (59, 5)])
def test_the_largest_is_what_just_fits(memory, most):
    needs = lambda job: 10 * job.batch  # noqa: E731
    assert largest("batch", as_job("lomo"), needs, memory) == most
    assert largest("batch", as_job("lomo"), needs, 10**9, highest=64) == 64


def test_a_byte_too_many_does_not_fit():
    found = plan(LLAMA, sequence=16)
    exact = dataclasses.replace(found, device_memory=found.peak)
    short = dataclasses.replace(found, device_memory=found.peak - 1)
    assert (found.fits, exact.fits, short.fits) == (None, True, False)
    assert (exact.margin, short.margin) == (0, -1)
    assert exact.verdict().startswith("fits, 0 B of ")
    assert short.verdict().startswith("does not fit: 1 B of ")


def test_units_of_bytes():
    texts = {"24GiB": 24 * 2**30, "24g": 24 * 2**30, "24GB": 24 * 10**9, "1.5 MiB": 3 * 2**19,
             "2kb": 2000, "1t": 2**40, 7: 7}  # fmt: skip
    assert {text: byte_count(text) for text in texts} == texts
    shown = {0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 3 * 2**19: "1.50 MiB",
             2**30: "1.00 GiB", -(2**31): "-2.00 GiB"}  # fmt: skip
    assert {count: report.size(count) for count in shown} == shown


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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lora-rank", 4], "lora_rank must be left out without adapter lora or lora+lomo, got 4"),
        (["--adapter", "prefix", "--lora-dropout", 0.1], "lora_dropout must be left out"),
        (["--adapter", "lora", "--prefix-tokens", 5], "without adapter prefix, got 5"),
    ],
)
def test_options_that_no_adapter_looks_at_are_refused(config, options, said, capsys):
    assert run("--model", config, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning")
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


def test_a_search_shows_what_it_tries(config, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes what it writes to for a terminal
    assert run("--model", config, "--device-memory", "64MiB", "--search", "batch") == 0
    written = capsys.readouterr()
    assert re.search(r"try \d+, batch \d+: ", written.err)
    assert "try " not in written.out


def test_it_says_that_images_are_left_out(tmp_path, capsys):
    KINDS["gemma3"]().save_pretrained(tmp_path)
    assert run("--model", tmp_path, "--sequence", 16) == 0
    assert "; on text alone, without images or sound" in capsys.readouterr().out


class Hub(http.server.BaseHTTPRequestHandler):
    """Has the configuration of one model, and no weights."""

    def do_GET(self):
        known = self.path == "/some/llama/resolve/main/config.json"
        body = LLAMA.to_json_string().encode() if known else b""
        self.send_response(200 if known else 404)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Error-Code", "" if known else "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


def test_a_model_id_is_looked_up_on_the_hub(tmp_path):
    code = (
        "from lomo_kernels.cli import main\n"
        "for name in ('some/llama', 'some/other'):\n"
        "    print(main(['plan', '--model', name, '--sequence', '8']))"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, **there, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        server.shutdown()
    count = shapes.from_config(LLAMA, torch.float32).num_parameters()
    assert f"some/llama, {count:,} parameters" in result.stdout, result.stderr
    assert re.findall(r"^\d$", result.stdout, re.MULTILINE) == ["0", "2"]
    assert result.stderr.startswith("lomo-kernels: cannot use the configuration 'some/other': ")
    assert result.stderr.count("\n") == 1


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
        (
            ["--optimizer", "adamw", "--strategy", "two_backward"],
            "strategy of adamw must be one of auto, got 'two_backward'",
        ),
        (["--optimizer", "sgd", "--rounding", "split"], "rounding of sgd must be one of"),
        (["--adapter", "lora", "--rounding", "split"], "rounding of adamw must be"),
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
        ('{"model_type": "vit"}', "transformers trains no vit model on tokens alone"),
        ('{"model_type": "whisper"}', "transformers trains no whisper model on tokens alone"),
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
