"""Trainer on a model that transformers has loaded in parts, and its checkpoints of parts."""

import contextlib
import re
import warnings
from pathlib import Path

import models
import pytest
import ranks
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers.distributed", reason="this transformers shards no model")
TRAINED = pytest.mark.skipif(
    not hasattr(transformers.PreTrainedModel, "is_distributed_loading_by_transformers"),
    reason="this transformers' Trainer does not know models that were loaded in parts",
)

from llamas import tiny_llama  # noqa: E402
from shards import check_close, check_moved, check_same, whole  # noqa: E402
from transformers.distributed import (  # noqa: E402
    DistributedConfig,
    load_optimizer_distributed,
    save_optimizer_distributed,
)

from lomo_kernels import Lomo  # noqa: E402
from lomo_kernels.integrations import LomoCallback, unwrap  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.accelerator.is_available(), reason="transformers would place the parts on the GPU"
    ),
]
LR, CLIP = 0.1, 0.5
CLOSE = 1e-6  # as on one device, beside torch's SGD


@pytest.fixture
def saved(tmp_path):
    tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path


@contextlib.contextmanager
def trainer_of(folder, make, out, **options):
    """A Trainer after its training, of a model in parts and the optimizer that `make` gives it."""
    for state in (accelerate.state.AcceleratorState, accelerate.state.PartialState):
        state._reset_state()
    accelerate.state.GradientState._reset_state()
    world = torch.distributed.get_world_size()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # what they warn of themselves
        patch.setenv("LOCAL_WORLD_SIZE", str(world))  # or accelerate asks for more of torchrun
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32,
            distributed_config=DistributedConfig(fsdp_size=world),
        ).train()  # fmt: skip
        optimizer, callbacks = make(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder / out), use_cpu=True, per_device_train_batch_size=2, max_steps=6,
            report_to=[], disable_tqdm=True, seed=7, lr_scheduler_type="linear", logging_steps=1,
            **{"save_strategy": "no", "max_grad_norm": CLIP, **options},
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=examples(), optimizers=(optimizer, None),
            callbacks=callbacks,
        )  # fmt: skip
        before = whole(model)
        trainer.train()
        yield trainer, before


def examples():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, models.VOCABULARY, (24, 10), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def ours(model):
    return Lomo(model, lr=LR), [LomoCallback()]


def theirs(model):
    return torch.optim.SGD(model.parameters(), lr=LR), []


def _as_sgd(world, folder, options):
    with trainer_of(folder, ours, "ours", **options) as (trainer, before):
        got, optimizer = whole(trainer.model), unwrap(trainer.optimizer)
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    with trainer_of(folder, theirs, "theirs", **options) as (trainer, _):
        want = whole(trainer.model)
        expected = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
    check_moved(before, got)
    check_close(got, want, CLOSE)
    assert optimizer.ranks is not None
    if options["max_grad_norm"]:
        assert norms == pytest.approx(expected, rel=1e-5)


@TRAINED
@pytest.mark.parametrize("options", [{"max_grad_norm": CLIP}, {"max_grad_norm": 0.0}], ids=str)
def test_trainer_equals_sgd_in_the_same_trainer(saved, options):
    ranks.run(2, _as_sgd, folder=saved, options=options)


def _goes_on(world, folder):
    """Rounding "split": half of each weight is in the optimizer."""

    def loaded(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.LlamaForCausalLM.from_pretrained(
                path, dtype=torch.bfloat16, distributed_config=DistributedConfig(fsdp_size=world)
            ).train()
        return model, Lomo(model, lr=LR, clip_grad_norm=CLIP, rounding="split", loss_scale=1024.0)

    def step(model, optimizer, number):
        rows = examples()[2 * number + torch.distributed.get_rank() :: world][:1]
        ids = rows[0]["input_ids"][None]
        optimizer.backward(model(input_ids=ids, labels=ids).loss)

    model, optimizer = loaded(folder / "model")
    before = whole(model)
    for number in range(4):
        if number == 2:
            model.save_pretrained(folder / "cut", distributed_checkpoint=True)
            save_optimizer_distributed(model, optimizer, str(folder / "cut" / "optimizer"))
        step(model, optimizer, number)
    again, other = loaded(folder / "cut")
    load_optimizer_distributed(again, other, str(folder / "cut" / "optimizer"))
    for number in (2, 3):
        step(again, other, number)
    norms = [name for name in before if "norm" in name]  # of 1, which only their low halves leave
    check_moved(before, whole(model), but=norms)
    check_same(whole(again), whole(model))
    assert other.param_groups[0]["step"] == 4


def test_checkpoints_of_parts_as_transformers_writes_them(saved):
    """Trainer itself says that it cannot resume a model that was loaded in parts."""
    ranks.run(2, _goes_on, folder=saved)


def _refuses(world, folder):
    options = {"save_strategy": "steps", "save_steps": 2}
    with (
        pytest.raises(ValueError, match="Resuming is not supported for models sharded at load"),
        trainer_of(folder, ours, "out", **options),
    ):
        pass


@TRAINED
def test_trainer_saves_no_optimizer_of_a_model_in_parts(saved):
    """As docs/sharding.md says: to be changed when transformers can."""
    ranks.run(2, _refuses, folder=saved)


# -- docs/sharding.md ------------------------------------------------------------------------------


def _page(world, folder):
    """Saving, a step more, and loading: what was saved is there again."""
    page = (Path(__file__).parent.parent / "docs" / "sharding.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    imports, save, load = blocks[1].split("\n\n")
    ids = torch.stack([row["input_ids"] for row in examples()]).view(world, -1, 2, 10)
    ids = ids[torch.distributed.get_rank()]
    names = {
        "device": "cpu", "world": world, "folder": str(folder / "saved"), "batches": ids,
        "model": tiny_llama(torch.float32),
    }  # fmt: skip
    before = whole(names["model"])
    for block in (blocks[0], imports, save):
        exec(compile(block, "docs/sharding.md", "exec"), names)
    want = whole(names["model"])
    check_moved(before, want)
    names["optimizer"].backward(names["model"](input_ids=ids[0], labels=ids[0]).loss)
    check_moved(want, whole(names["model"]))
    exec(compile(load, "docs/sharding.md", "exec"), names)
    check_same(whole(names["model"]), want)
    assert names["optimizer"].param_groups[0]["step"] == len(ids)


def test_the_page_s_script_runs(tmp_path):
    ranks.run(2, _page, folder=tmp_path)
