"""Adapters in the main job: peft's own, trained, kept and scored as plain loops of torch do it."""

import signal
import sys

import pytest
import torch
from torch.distributed import checkpoint as dcp

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from finetuning import alone, loaded, make_tiny, result, run  # noqa: E402
from test_finetune import start_and  # noqa: E402
from test_finetune_job import tuned  # noqa: E402

from lomo_kernels import finetune, memory  # noqa: E402
from lomo_kernels.finetune import adapters, checkpoint, scoring  # noqa: E402
from lomo_kernels.finetune.examples import batch_of  # noqa: E402
from lomo_kernels.integrations import weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SMALL = {"steps": 3, "batch_size": 4, "warmup": 0.0, "schedule": "constant"}


def adapter_of(out):
    """The tensors of an adapter's folder, by peft's names."""
    from safetensors.torch import load_file

    return load_file(out / "adapter_model.safetensors")


def batches_of(tiny, questions, steps=3, size=4):
    """The batches of the first steps of a run with seed 0."""
    _, tokenizer, examples = loaded(tiny, train=questions)
    order = torch.randperm(108, generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(0, steps * size, size):
        some = [examples.train[j] for j in order[i : i + size]]
        yield batch_of(some, tokenizer.pad_token_id, "cpu")


def adamw(params, lr):
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def train(model, batches, *optimizers, clipped):
    """A plain loop of torch, in which the norm of some parameters' gradients is at most 1."""
    for batch in batches:
        model(**batch).loss.backward()
        if clipped:
            torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def largest_difference(got, want):
    assert got.keys() == want.keys()
    return max((got[name] - want[name]).abs().max().item() for name in want)


@pytest.fixture
def trained_model(monkeypatch):
    """-> a list with the model of a run, as it is when the run saves it."""
    found, save = [], adapters.save

    def noted(settings, folder, model, *more):
        found.append(model)
        save(settings, folder, model, *more)

    monkeypatch.setattr(adapters, "save", noted)
    return found


# -- LoRA ------------------------------------------------------------------------------------------


def test_lora_is_peft_s_by_adamw(tiny, questions, tmp_path, trained_model):
    lora = {"lora_rank": 4, "lora_alpha": 8.0, "lora_targets": "q_proj,up_proj"}
    tuned(tmp_path, model=tiny, train=questions, adapter="lora", lr=0.03, seed=0, **SMALL, **lora)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(weights.load_model(tiny), config)
    params = [p for p in model.parameters() if p.requires_grad]
    train(model, batches_of(tiny, questions), adamw(params, 0.03), clipped=params)
    want = peft.get_peft_model_state_dict(model)
    assert largest_difference(adapter_of(tmp_path / "model"), want) < 1e-6
    assert all(tensor.abs().max() > 0 for tensor in want.values())
    base = trained_model[0].get_base_model().state_dict()
    for name, tensor in weights.load_model(tiny).named_parameters():
        name = name.replace("q_proj", "q_proj.base_layer").replace("up_proj", "up_proj.base_layer")
        assert torch.equal(base[name], tensor)


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_an_adapter_s_folder_is_loaded_by_peft(tiny, questions, tmp_path, trained_model, adapter):
    assert run("--model", tiny, "--train", questions, "--adapter", adapter, "--steps", 3,
               "--lr", 0.1, "--out", tmp_path) == 0  # fmt: skip
    again = peft.PeftModel.from_pretrained(weights.load_model(tiny), tmp_path / "model")
    (batch,) = batches_of(tiny, questions, steps=1)
    with torch.no_grad():
        got, want, base = (
            model.eval()(input_ids=batch["input_ids"]).logits
            for model in (again, trained_model[0], weights.load_model(tiny))
        )
    assert torch.equal(got, want)
    assert not torch.allclose(got, base, atol=1e-3)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<end>"
    assert result(tmp_path)["optimizer"] == f"{adapter}, lr 0.1"


@pytest.mark.parametrize(
    "options",
    [
        ["lora", "--lora-dropout", "0.5"],
        ["prefix", "--prefix-tokens", "3"],
        ["lora+lomo", "--lora-dropout", "0.5"],
    ],
    ids=str,
)
def test_an_interrupted_adapter_goes_on_to_the_same_weights(tiny, questions, tmp_path, options):
    """Its beginning is drawn again, and the dropout of each step is that step's."""
    arguments = [
        "--model", tiny, "--train", questions, "--steps", "120", "--save-every", "2",
        "--eval-size", "4", "--adapter", *options,
    ]  # fmt: skip
    assert run(*arguments, "--out", tmp_path / "whole") == 0
    start_and(signal.SIGKILL, arguments, tmp_path / "cut", after_step=6)
    step, path = checkpoint.latest(tmp_path / "cut")
    assert 6 <= step < 120
    names = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    kept = [name for name in names if name.startswith("model.")]
    adapter = ["lora_" in name or "prompt_encoder" in name for name in kept]
    assert any(adapter)
    assert all(adapter) == (options[0] != "lora+lomo")
    assert run(*arguments, "--out", tmp_path / "cut") == 0
    paths = list((tmp_path / "cut").rglob("*.safetensors"))
    assert len(paths) == (2 if options[0] == "lora+lomo" else 1)
    for path in paths:
        whole = tmp_path / "whole" / path.relative_to(tmp_path / "cut")
        assert path.read_bytes() == whole.read_bytes()
    assert result(tmp_path / "cut")["losses"] == result(tmp_path / "whole")["losses"]


def test_dropout_and_the_seed_of_an_adapter_matter(tiny, questions, tmp_path):
    found = []
    for i, more in enumerate([{}, {"lora_dropout": 0.5}, {"seed": 1}]):
        tuned(tmp_path / str(i), model=tiny, train=questions, adapter="lora", **SMALL, **more)
        found.append(adapter_of(tmp_path / str(i) / "model"))
    plain, dropped, seeded = found
    assert largest_difference(plain, dropped) > 0
    assert min((plain[n] - seeded[n]).abs().max().item() for n in plain if "lora_A" in n) > 0.01


def test_adapters_of_a_16_bit_model_are_in_float32(tiny, questions, tmp_path):
    tuned(tmp_path, model=tiny, train=questions, adapter="lora", dtype="bfloat16", **SMALL)
    assert {t.dtype for t in adapter_of(tmp_path / "model").values()} == {torch.float32}


# -- prefixes --------------------------------------------------------------------------------------


def prefixed(tiny, questions, tokens=7):
    """-> (the beginning of a run with a prefix, the tokens of the prefix, the Data)."""
    settings = {"train": questions, "adapter": "prefix", "prefix_tokens": tokens}
    model, _, examples = loaded(tiny, **settings)
    model = adapters.added(finetune.Settings(model=tiny, **settings), model, examples)
    some = [e.prompt + e.completion for e in examples.train[:tokens]]
    return model.train(), sum(some, ())[:tokens], examples


def test_a_prefix_begins_as_the_tokens_before_each_example(tiny, questions):
    model, ids, _ = prefixed(tiny, questions)
    base = weights.load_model(tiny)
    (batch,) = batches_of(tiny, questions, steps=1)
    got = model(**batch).loss
    before = torch.tensor([ids] * 4)
    whole = {
        "input_ids": torch.cat([before, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(before), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(before, -100), batch["labels"]], 1),
    }
    want = base(**whole).loss
    assert got.item() == pytest.approx(want.item(), abs=1e-6)
    assert abs(base(**batch).loss.item() - want.item()) > 1e-3


def test_a_prefix_is_peft_s_by_adamw(tiny, questions, tmp_path, trained_model):
    more = {"prefix_tokens": 7, "adapter": "prefix", "lr": 0.03}
    tuned(tmp_path, model=tiny, train=questions, **more, **SMALL)
    model, _, _ = prefixed(tiny, questions)
    params = [p for p in model.parameters() if p.requires_grad]
    begun = peft.get_peft_model_state_dict(model)
    begun = {name: tensor.clone() for name, tensor in begun.items()}
    train(model, batches_of(tiny, questions), adamw(params, 0.03), clipped=params)
    want = peft.get_peft_model_state_dict(model)
    assert largest_difference(adapter_of(tmp_path / "model"), want) < 1e-6
    assert largest_difference(begun, want) > 0.01
    base = trained_model[0].get_base_model().state_dict()
    untouched = weights.load_model(tiny).named_parameters()
    assert all(torch.equal(base[name], tensor) for name, tensor in untouched)


@pytest.mark.parametrize("begins", [True, False], ids=["real tokens", "any prefix"])
def test_answers_of_several_tokens_are_scored_after_a_prefix(tiny, questions, begins):
    """Left padding, and answers that go on with the keys and values of their prompt."""
    model, ids, data = prefixed(tiny, questions)
    if not begins:
        torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    some = data.held_out
    assert len({len(c) for e in some for c in e.choices}) > 1
    with torch.no_grad():
        got = scoring.log_likelihoods(model.eval(), some, 0, "cpu")
    for row, example in zip(got, some):
        for value, choice in zip(row, example.choices):
            if begins:
                want = alone(model.get_base_model(), ids + example.prompt, choice)
            else:
                want = alone(model, example.prompt, choice)
            assert value.item() == pytest.approx(len(choice) * want, abs=1e-4)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"autocast": True}], ids=str)
def test_a_prefix_in_16_bits(tiny, questions, tmp_path, options):
    same = {"model": tiny, "train": questions, "adapter": "prefix", **SMALL}
    whole = tuned(tmp_path / "whole", **same)
    half = tuned(tmp_path / "half", **same, **options)
    assert half.loss == pytest.approx(whole.loss, rel=1e-2)
    assert {t.dtype for t in adapter_of(tmp_path / "half" / "model").values()} == {torch.float32}


# -- both ------------------------------------------------------------------------------------------


def tuned_together(model):
    """-> (its own parameters, those of its adapters), all of them trained."""
    model.requires_grad_()
    own, beside = {}, {}
    for name, param in model.named_parameters():
        (beside if "lora_" in name else own)[name] = param
    return list(own.values()), list(beside.values())


WAYS = [
    {},
    {"strategy": "one_backward"},
    {"strategy": "two_backward"},
    {"strategy": "partial"},
    {"strategy": "two_backward", "checkpointing": True},
    {"strategy": "partial", "checkpointing": True},
    {"strategy": "immediate", "clip_grad_norm": 0},
    {"batch_size": 2, "gradient_accumulation": 2},
]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_both_are_sgd_and_adamw(tiny, questions, tmp_path, trained_model, how):
    """The norm is that of the weights' gradients, and clips no others."""
    more = {"adapter": "lora+lomo", "lr": 0.3, "adapter_lr": 0.02, **SMALL, **how}
    tuned(tmp_path, model=tiny, train=questions, **more)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")
    model = peft.get_peft_model(weights.load_model(tiny), config)
    own, beside = tuned_together(model)
    before = [p.detach().clone() for p in (*own, *beside)]
    clipped = [] if how.get("clip_grad_norm") == 0 else own
    sgd = torch.optim.SGD(own, lr=0.3)
    train(model, batches_of(tiny, questions), sgd, adamw(beside, 0.02), clipped=clipped)
    (got,) = trained_model
    assert largest_difference(dict(got.named_parameters()), dict(model.named_parameters())) < 1e-6
    moved = [(a - b).abs().max().item() for a, b in zip(before, (*own, *beside))]
    assert min(moved) > 1e-5


def test_lora_beside_adalomo_learns(tiny, questions, tmp_path):
    report = tuned(tmp_path, model=tiny, train=questions, steps=20, batch_size=8,
                   adapter="lora+lomo", optimizer="adalomo", lr=0.1)  # fmt: skip
    losses = result(tmp_path)["losses"]
    assert losses[-1] < 0.9 * losses[0]
    assert report.optimizer == "lora+adalomo, lr 0.1, 0.002"


def test_both_are_saved_one_in_the_other(tiny, questions, tmp_path, trained_model, capsys):
    arguments = ["--train", questions, "--adapter", "lora+lomo", "--adapter-lr", 0.1, "--steps", 3]
    assert run("--model", tiny, *arguments, "--out", tmp_path) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    (batch,) = batches_of(tiny, questions, steps=1)
    with torch.no_grad():
        alone = base.eval()(input_ids=batch["input_ids"]).logits
        again = peft.PeftModel.from_pretrained(base, tmp_path / "model" / "adapter").eval()
        got = again(input_ids=batch["input_ids"]).logits
        want = trained_model[0].eval()(input_ids=batch["input_ids"]).logits
    assert torch.equal(got, want)
    assert not torch.allclose(alone, want, atol=1e-3)
    capsys.readouterr()
    assert run("--model", tmp_path / "model", *arguments) == 2
    assert "without the adapter in its folder 'adapter'" in capsys.readouterr().err


def test_a_step_without_finite_gradients_leaves_both_alone(tiny, questions, tmp_path):
    report = tuned(tmp_path, model=tiny, train=questions, adapter="lora+lomo", lr=1e38, **SMALL)
    assert report.skipped == 2  # the first one makes the weights infinite
    tensors = adapter_of(tmp_path / "model" / "adapter").values()
    assert all(tensor.isfinite().all() for tensor in tensors)


# -- beside full tuning ----------------------------------------------------------------------------


def test_adapters_are_compared_with_full_tuning(tiny, questions, tmp_path, capsys):
    assert run("--model", tiny, "--train", questions, "--steps", 3, "--prefix-tokens", 5,
               "--strategy", "two_backward", "--lora-rank", 4, "--out", tmp_path, "--compare",
               "lora,lora=4e-3,prefix,lora+lomo=0.05,adamw") == 0  # fmt: skip
    printed = capsys.readouterr().out
    for name in (
        "lomo (two_backward), lr 0.1", "lora, lr 0.002", "lora, lr 0.004", "prefix, lr 0.01",
        "lora+lomo (two_backward), lr 0.05, 0.002", "adamw, lr 0.0001",
    ):  # fmt: skip
        assert f"│ {name} " in printed
    record = result(tmp_path)
    low, high = record["after"]["interval"]
    assert 0 <= low < record["after"]["value"] < high <= 1


@pytest.mark.parametrize("adapter", ["lora", "prefix", "lora+lomo"])
def test_what_an_adapter_holds_is_measured(tiny, questions, tmp_path, adapter):
    """Activations are those of the second step of a plain loop."""
    options = {"adapter": adapter, "lora_rank": 4, "prefix_tokens": 5}
    if adapter == "lora+lomo":
        options["strategy"] = "two_backward"
    report = tuned(tmp_path, model=tiny, train=questions, **options, **SMALL)
    base = sum(p.numel() for p in weights.load_model(tiny).parameters())
    added = 2 * 4 * (32 + 32 + 32 + 16) if "lora" in adapter else 2 * 2 * 5 * 16
    both = adapter == "lora+lomo"
    assert report.trainable == added + both * base
    assert report.parameter_bytes == 4 * (added + base)
    assert report.state_bytes == 8 * added + 4 * (8 if "lora" in adapter else 1)  # and counters
    head = 4 * 283 * 32  # the largest gradient of two backwards
    assert report.gradient_bytes == 4 * added + both * head
    if not both:
        settings = finetune.Settings(model=tiny, train=questions, **options)
        model, _, examples = loaded(tiny, train=questions)
        model = adapters.added(settings, model, examples).train()
        optimizer = adamw([p for p in model.parameters() if p.requires_grad], 0.01)
        first, second = batches_of(tiny, questions, steps=2)
        train(model, [first], optimizer, clipped=())
        with memory.measure(model, optimizer) as measured:
            train(model, [second], optimizer, clipped=())
        assert report.activation_bytes == measured.maxima["activations"]


def test_a_dry_run_plans_the_adapter(tiny, questions, capsys):
    arguments = ["--model", tiny, "--train", questions, "--dry-run"]
    assert run(*arguments, "--adapter", "lora", "--lora-rank", 4) == 0
    size = memory.report.size(4 * 2 * 4 * (32 + 32 + 32 + 16))
    assert f"gradients {size}, " in capsys.readouterr().out


# -- refused, in one sentence ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "dora"], "adapter must be one of lora, prefix, lora+lomo"),
        (["--adapter", "lora", "--optimizer", "lomo"], "optimizer must be adamw with adapter lora"),
        (["--adapter", "lora", "--lora-rank", "0"], "lora_rank must be a whole number above 0"),
        (["--adapter", "lora", "--lora-alpha", "0"], "lora_alpha must be a number greater than 0"),
        (["--adapter", "lora", "--lora-dropout", "1"], "lora_dropout must be at least 0 and below"),
        (["--adapter", "lora", "--lora-targets", "q_proj,up"], "of the model, got 'up'"),
        (["--adapter", "prefix", "--prefix-tokens", "0"], "prefix_tokens must be a whole number"),
        (["--adapter", "prefix", "--prefix-tokens", "9999"], "prefix_tokens must be at most the "),
        (["--adapter", "prefix", "--checkpointing"], "checkpointing must be left out with adapter"),
        (["--adapter", "lora+lomo", "--optimizer", "sgd"], "must be lomo or adalomo with adapter"),
        (["--adapter", "lora+lomo", "--dtype", "float16"], "dtype must be float32 or bfloat16"),
        (["--adapter", "lora+lomo", "--loss-scale", "2"], "loss_scale must be none with adapter"),
        (["--adapter", "lora+lomo", "--adapter-lr", "-1"], "adapter_lr must be a number of at"),
        (["--lora-rank", "4"], "lora_rank must be left out without adapter lora or lora+lomo"),
        (["--compare", "lora", "--prefix-tokens", "4"], "prefix_tokens must be left out without"),
        (["--adapter", "lora", "--adapter-lr", "1"], "adapter_lr must be left out without adapter"),
        (["--compare", "prefix", "--checkpointing"], "checkpointing must be left out with adapter"),
        (["--adapter", "lora", "--offload"], "offload must be left out with an adapter"),
        (["--adapter", "lora", "--units", "fine"], "units must be left out with an adapter"),
        (["--adapter", "lora", "--sharding", "fsdp2"], "sharding must be left out with an adapter"),
    ],
    ids=lambda value: None,
)  # fmt: skip
def test_what_an_adapter_cannot_do(tiny, questions, capsys, arguments, message):
    assert run("--model", tiny, "--train", questions, "--steps", 1, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_adapter_is_one_process_s(tiny, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = finetune.Settings(model=tiny, adapter="lora")
    with pytest.raises(ValueError, match="adapter must be left out with 2 processes, got 'lora'"):
        finetune.run(settings)


def test_without_peft(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    for arguments in (["--adapter", "lora"], ["--compare", "lora"]):
        assert run("--model", tiny, *arguments) == 2
        assert capsys.readouterr().err == (
            "lomo-kernels: an adapter needs peft: pip install 'lomo_kernels[adapters]'\n"
        )


def test_an_adapter_s_folder_is_no_model(tiny, questions, tmp_path, capsys):
    tuned(tmp_path, model=tiny, train=questions, adapter="lora", **SMALL)
    capsys.readouterr()
    assert run("--model", tmp_path / "model", "--train", questions, "--steps", 1) == 2
    assert "it is the folder of an adapter" in capsys.readouterr().err


def test_a_model_for_which_peft_knows_no_places(questions, tmp_path, capsys):
    folder = make_tiny(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"olmo"').replace('"LlamaF', '"OlmoF'))
    assert run("--model", folder, "--train", questions, "--adapter", "lora", "--steps", 1) == 2
    assert "name modules with lora_targets" in capsys.readouterr().err
