"""Which modules become units of FSDP2; one rank of several, whose messages never arrive."""

import models
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore

from lomo_kernels.integrations.sharding import shard


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def units_of(model):
    return {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}


def llama(**options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64, **options,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


FINE = {f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")}


def test_a_unit_for_each_layer(mesh):
    model = shard(llama(), mesh)
    assert units_of(model) == {"", "model.layers.0", "model.layers.1"}


def test_fine_units_are_attention_mlp_embedding_and_head(mesh):
    model = shard(llama(), mesh, units="fine")
    assert units_of(model) == FINE | {"", "model.embed_tokens", "lm_head"}


def test_tied_embeddings_stay_with_the_root(mesh):
    model = shard(llama(tie_word_embeddings=True), mesh, units="fine")
    assert units_of(model) == FINE | {""}


class Odd(nn.Module):
    """Layers with a matrix of their own, a list of branches, and one without parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([*map(self.layer, range(2)), nn.Tanh()])

    @staticmethod
    def layer(_):
        layer = nn.Module()
        layer.register_parameter("mix", nn.Parameter(torch.zeros(3, 3)))
        layer.branches = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        return layer


def test_lists_in_layers_are_taken_apart(mesh):
    one = ["layers.0", "layers.0.branches.0", "layers.0.branches.1"]
    assert units_of(shard(Odd(), mesh, units="fine")) == {
        "", *one, *(name.replace("0", "1", 1) for name in one)
    }  # fmt: skip
    assert units_of(shard(Odd(), mesh)) == {"", "layers.0", "layers.1"}


# A Linear with a bias gives a view, of which FSDP2 warns; nothing here writes into it.
VIEWS = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view:UserWarning")


def test_parts_of_a_layer_that_share_a_parameter_stay_together(mesh):
    model = Odd()
    first, second = model.layers[0].branches
    second.weight = first.weight
    assert "layers.0.branches.0" not in units_of(shard(model, mesh, units="fine"))


@VIEWS
@pytest.mark.parametrize("units", ["layer", "fine"])
@pytest.mark.parametrize("offload", [False, True])
def test_every_parameter_gets_its_part_of_a_gradient(mesh, units, offload):
    model = shard(models.build(), mesh, units=units, offload=offload)
    models.loss_of(model).backward()
    for param in model.parameters():
        assert param.grad.placements == param.placements
        assert param.grad.shape == param.shape


@VIEWS
@pytest.mark.parametrize("units", ["layer", "fine"])
def test_mixed_precision(mesh, units):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model = shard(models.build(), mesh, units=units, mp_policy=policy)
    seen = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: seen.add(m.weight.dtype))
    assert model(models.tokens()).dtype is torch.float32
    assert seen == {torch.bfloat16}


def test_unknown_units(mesh):
    with pytest.raises(ValueError, match="units must be one of layer, fine, got 'coarse'"):
        shard(models.build(), mesh, units="coarse")
