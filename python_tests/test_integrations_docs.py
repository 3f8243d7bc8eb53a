"""docs/integrations.md keeps its promises: every Python block runs, as it stands."""

import re
import sys
import types
from pathlib import Path

import models
import pytest
import torch

from lomo_kernels import Lomo
from lomo_kernels.integrations import unwrap

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from llamas import data, tiny_llama  # noqa: E402

from lomo_kernels import integrations  # noqa: E402

# What the libraries themselves warn of is not ours to fail on.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
PAGE = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(section, **given):
    """Runs the section's blocks with `given`; what the names mean after that."""
    for block in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
        exec(compile(block, f"docs/integrations.md, {section}", "exec"), given)
    return given


def arguments(kind, folder, **options):
    return kind(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=4, max_steps=2,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, seed=7, **options,
    )  # fmt: skip


def equals_sgd(model, folder):
    """Whether the model is where torch's SGD ends in the same trainer."""
    theirs = tiny_llama()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.05)
    options = arguments(transformers.TrainingArguments, folder)
    transformers.Trainer(theirs, options, train_dataset=data(), optimizers=(sgd, None)).train()
    assert models.difference(theirs, tiny_llama()) > 1e-3
    return models.difference(model, theirs) < 1e-6


def test_trainer(tmp_path, capsys):
    model = tiny_llama()
    args = arguments(transformers.TrainingArguments, tmp_path)
    run("Trainer", Trainer=transformers.Trainer, model=model, args=args, dataset=data())
    assert equals_sgd(model, tmp_path)
    assert "strategy one_backward" in capsys.readouterr().out


def test_trl(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from finetuning import make_tiny

    folder = make_tiny(tmp_path / "tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = models.snapshot(model)
    given = run(
        "SFTTrainer and TRL's others", SFTTrainer=trl.SFTTrainer, model=model,
        args=arguments(trl.SFTConfig, tmp_path, bf16=False, max_length=16),
        dataset=datasets.Dataset.from_dict({"text": ["the sky is blue"] * 8}),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    assert not models.same(model, before)
    assert unwrap(given["trainer"].optimizer).clip_grad_norm == 1.0
    assert given["trainer"].args.gradient_checkpointing


def test_accelerate():
    model, theirs = tiny_llama(), tiny_llama()
    loader = torch.utils.data.DataLoader(data(8), batch_size=4)
    run("accelerate", accelerator=accelerate.Accelerator(cpu=True), model=model, loader=loader)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.05)
    for batch in loader:
        theirs(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        sgd.step()
        sgd.zero_grad()
    assert models.difference(model, theirs) < 1e-6


def test_lightning(tmp_path):
    lightning = pytest.importorskip(
        "pytorch_lightning", reason="pytorch-lightning is not installed"
    )
    module = run("Lightning", LightningModule=lightning.LightningModule)["Module"]()
    module.model = tiny_llama()
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data(8), batch_size=4))
    assert trainer.global_step == 2
    assert models.difference(module.model, tiny_llama()) > 1e-3


def test_a_recipe_that_sums_its_loss():
    model, theirs = models.build(), models.build()
    batches = [(ids, ids) for ids in (models.tokens(0), models.tokens(1))]
    run("Recipes with a config, such as torchtune's", model=model, batches=batches,
        F=torch.nn.functional)  # fmt: skip
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.05)
    for tokens, labels in batches:
        logits = theirs(tokens).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").backward()
        for param in theirs.parameters():
            param.grad /= labels.numel()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        sgd.step()
        sgd.zero_grad()
    assert models.difference(model, theirs) < 1e-6
    assert models.difference(model, models.build()) > 1e-3


# -- libraries that are not installed: their names and calls --------------------------------------


def pretend(monkeypatch, **modules):
    """Modules with the given contents, and the packages that they are in; `__` stands for a dot."""
    for name, contents in modules.items():
        parts = name.split("__")
        for i in range(1, len(parts) + 1):
            dotted = ".".join(parts[:i])
            if dotted not in sys.modules:
                monkeypatch.setitem(sys.modules, dotted, types.ModuleType(dotted))
        vars(sys.modules[".".join(parts)]).update(contents)


def test_llama_factory(tmp_path, monkeypatch):
    model = tiny_llama()

    class CustomSeq2SeqTrainer(transformers.Seq2SeqTrainer):
        def create_optimizer(self):
            raise AssertionError

    def run_exp(args=None, callbacks=None):
        trainer = CustomSeq2SeqTrainer(model, args, train_dataset=data(), callbacks=callbacks)
        trainer.train()

    pretend(
        monkeypatch,
        llamafactory__train__sft__trainer={"CustomSeq2SeqTrainer": CustomSeq2SeqTrainer},
        llamafactory__train__tuner={"run_exp": run_exp},
    )
    args = arguments(transformers.Seq2SeqTrainingArguments, tmp_path, learning_rate=0.05)
    run("LLaMA-Factory", args=args)
    assert equals_sgd(model, tmp_path)


def test_axolotl(tmp_path, monkeypatch):
    pretend(monkeypatch, axolotl__integrations__base={"BasePlugin": object})
    plugin, model = run("axolotl")["LomoPlugin"](), tiny_llama()

    class AxolotlTrainer(transformers.Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = plugin.create_optimizer({}, self)
            return self.optimizer

    args = arguments(transformers.TrainingArguments, tmp_path, learning_rate=0.05)
    trainer = AxolotlTrainer(model=model, args=args, train_dataset=data())
    for callback in plugin.add_callbacks_post_trainer({}, trainer):
        trainer.add_callback(callback)
    trainer.train()
    assert equals_sgd(model, tmp_path)


def test_ms_swift(tmp_path, monkeypatch):
    class OptimizerCallback:
        def __init__(self, args, trainer):
            self.args, self.trainer = args, trainer

    optimizers, callbacks, model = {}, {}, tiny_llama()
    contents = {"OptimizerCallback": OptimizerCallback, "optimizers_map": optimizers}
    pretend(monkeypatch, swift__optimizers=contents, swift__callbacks={"callbacks_map": callbacks})
    run("ms-swift")

    class SwiftTrainer(transformers.Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = optimizers["lomo_kernels"](self.args, self).create_optimizer()
            return self.optimizer

    args = arguments(transformers.TrainingArguments, tmp_path, learning_rate=0.05)
    trainer = SwiftTrainer(model=model, args=args, train_dataset=data())
    trainer.add_callback(callbacks["lomo_kernels"](args, trainer))
    trainer.train()
    assert equals_sgd(model, tmp_path)


def test_every_block_is_run():
    ran = set(re.findall(r'run\(\s*"(.*?)"', Path(__file__).read_text()))
    assert ran == {title for title, text in SECTIONS.items() if "```python" in text}
    assert not re.findall(r"```python", PAGE.partition("\n## ")[0])


def test_every_public_name_is_on_the_page():
    for name in integrations.__all__:
        assert hasattr(integrations, name)
        assert f"`{name}" in PAGE or f"{name}(" in PAGE, name
    assert isinstance(unwrap(Lomo(torch.nn.Linear(2, 2))), Lomo)
