"""TRL's SFTTrainer, whose loss forms no logits: no watched operation sees the head's product."""

import models
import pytest
import torch

from lomo_kernels import Lomo
from lomo_kernels.integrations import unwrap

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from finetuning import make_tiny  # noqa: E402

from lomo_kernels.integrations import LomoCallback  # noqa: E402

# What trl, transformers and accelerate themselves warn of is not ours to fail on.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
LR = 0.1
TEXTS = [f"sky of {'a ' * (i % 5)}: {('red', 'green', 'blue')[i % 3]}" for i in range(32)]


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def load(tiny, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)


def fit(tiny, model, optimizer, folder, callbacks=(), **options):
    arguments = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, per_device_train_batch_size=4,
        max_steps=3, warmup_steps=1, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, max_length=32, seed=7, **options,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny),
        optimizers=(optimizer, None), callbacks=list(callbacks),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("dtype", "accumulation"),
    [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 1)],
    ids=str,
)
def test_equals_sgd_in_the_same_trainer(tmp_path, tiny, dtype, accumulation):
    ours, theirs = load(tiny, dtype), load(tiny, dtype)
    options = {"max_grad_norm": 0.5, "gradient_accumulation_steps": accumulation}
    optimizer = Lomo(ours, lr=LR, rounding="nearest")
    trainer = fit(tiny, ours, optimizer, tmp_path, [LomoCallback()], **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=LR)
    other = fit(tiny, theirs, sgd, tmp_path, **options)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}[dtype]
    assert models.difference(ours, theirs) < tolerance
    assert models.difference(ours, load(tiny, dtype)) > 5e-3
    norms, other_norms = (
        [entry["grad_norm"] for entry in t.state.log_history if "grad_norm" in entry]
        for t in (trainer, other)
    )
    assert norms == pytest.approx(other_norms, rel=2e-2)
    assert len(norms) == 3
    assert unwrap(trainer.optimizer) is optimizer


@pytest.mark.parametrize("strategy", ["two_backward", "partial"])
def test_every_strategy(tmp_path, tiny, strategy):
    """The head is tied to the embedding, whose other use is a watched operation."""
    ours, theirs = load(tiny), load(tiny)
    optimizer = Lomo(ours, lr=LR, clip_grad_norm=0.5, strategy=strategy, factor_budget=4000)
    fit(tiny, ours, optimizer, tmp_path, [LomoCallback()])
    sgd = torch.optim.SGD(theirs.parameters(), lr=LR)
    fit(tiny, theirs, sgd, tmp_path, max_grad_norm=0.5)
    assert models.difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("own", [0.5, None])
def test_without_the_callback(tmp_path, tiny, own):
    ours, theirs = load(tiny), load(tiny)
    options = {"gradient_accumulation_steps": 2 if own else 1}
    fit(tiny, ours, Lomo(ours, lr=LR, clip_grad_norm=own), tmp_path, max_grad_norm=0, **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=LR)
    fit(tiny, theirs, sgd, tmp_path, max_grad_norm=own or 0.0, **options)
    assert models.difference(ours, theirs) < 1e-6
