"""Bad input is refused at the door: which argument, what was wanted, what came; nothing written."""

import math
import re

import pytest
import torch

from lomo_kernels import ops

BF16 = torch.bfloat16


def ones(*shape, dtype=torch.float32, **kwargs):
    return torch.ones(*shape, dtype=dtype, **kwargs)


CASES = {
    "param is no tensor": (
        {"param": 3}, TypeError, "'int' object is not iterable",
    ),
    "param in the list is no tensor": (
        {"param": [3], "grad": [3]}, TypeError, "param must be a tensor, got int",
    ),
    "grad is missing": ({"grad": None}, TypeError, "grad must be a tensor, got NoneType"),
    "grad of another shape": (
        {"grad": ones(4)}, ValueError, "grad must have param's shape (3,), got (4,)",
    ),
    "grad of another device": (
        {"grad": ones(3, device="meta")},
        ValueError, "grad must be on param's device cpu, got meta",
    ),
    "param of another dtype": (
        {"param": ones(3, dtype=torch.complex64), "grad": ones(3, dtype=torch.complex64)},
        TypeError, "param must be float32, bfloat16 or float16, got torch.complex64",
    ),
    "float64 on a backend of kernels": (
        {
            "param": ones(3, dtype=torch.float64), "grad": ones(3, dtype=torch.float64),
            "backend": "native",
        },
        RuntimeError, "float64 runs on the backend 'reference' alone",
    ),
    "scalars in float64 on a backend of kernels": (
        {"clip_coef": ones(1, dtype=torch.float64), "backend": "native"},
        RuntimeError, "float64 runs on the backend 'reference' alone",
    ),
    "float64 gradient of another parameter": (
        {"grad": ones(3, dtype=torch.float64)},
        TypeError, "grad must be torch.float32 as param is, or float32, got torch.float64",
    ),
    "integer gradient": (
        {"grad": ones(3, dtype=torch.int32)},
        TypeError, "grad must be float32, bfloat16 or float16, got torch.int32",
    ),
    "two 16-bit dtypes": (
        {"param": ones(3, dtype=BF16), "grad": ones(3, dtype=torch.float16)},
        TypeError, "grad must be torch.bfloat16 as param is, or float32, got torch.float16",
    ),
    "sparse gradient": (
        {"grad": ones(3).to_sparse()}, TypeError, "grad must be dense, got layout torch.sparse_coo",
    ),
    "overlapping param": (
        {"param": ones(1).expand(3)}, ValueError, "param must fill its memory without gaps",
    ),
    "param with gaps": (
        {"param": ones(6)[::2]}, ValueError, "param must fill its memory without gaps",
    ),
    "negative lr": ({"lr": -0.1}, ValueError, "lr must be finite and at least 0, got -0.1"),
    "lr is nan": ({"lr": math.nan}, ValueError, "lr must be finite and at least 0, got nan"),
    "lr is a tensor": ({"lr": ones(1)}, TypeError, "lr must be a number, got Tensor"),
    "negative weight_decay": (
        {"weight_decay": -1}, ValueError, "weight_decay must be finite and at least 0, got -1",
    ),
    "clip_value of 0": (
        {"clip_value": 0.0}, ValueError, "clip_value must be a number greater than 0, got 0.0",
    ),
    "clip_value is nan": (
        {"clip_value": math.nan}, ValueError, "clip_value must be a number greater than 0, got nan",
    ),
    "unknown rounding": (
        {"rounding": "up"}, ValueError,
        "rounding must be one of ('nearest', 'stochastic', 'split'), got 'up'",
    ),
    "split in fp16": (
        {"param": ones(3, dtype=torch.float16), "grad": ones(3), "rounding": "split"},
        TypeError, "rounding 'split' needs a bfloat16 or float32 param, got torch.float16",
    ),
    "split without low": (
        {"param": ones(3, dtype=BF16), "rounding": "split"},
        TypeError, "low must be an int16 tensor for rounding 'split', got NoneType",
    ),
    "low of another dtype": (
        {"param": ones(3, dtype=BF16), "rounding": "split", "low": ones(3)},
        TypeError, "low must be an int16 tensor for rounding 'split', got torch.float32",
    ),
    "low of another shape": (
        {"param": ones(3, dtype=BF16), "rounding": "split", "low": ones(4, dtype=torch.int16)},
        ValueError, "low must have param's shape (3,) on cpu, got (4,) on cpu",
    ),
    "low in another layout": (
        {
            "param": ones(2, 3, dtype=BF16), "grad": ones(2, 3), "rounding": "split",
            "low": ones(3, 2, dtype=torch.int16).T,
        },
        ValueError, "low must have param's strides (3, 1), got (1, 2)",
    ),
    "inv_scale is a number": (
        {"inv_scale": 0.5}, TypeError,
        "inv_scale must be a one-element float32 tensor or None, got float",
    ),
    "clip_coef of another dtype": (
        {"clip_coef": ones(1, dtype=BF16)}, TypeError,
        "clip_coef must be a one-element float32 tensor, got (1,) torch.bfloat16",
    ),
    "found_inf of two elements": (
        {"found_inf": ones(2)}, TypeError,
        "found_inf must be a one-element float32 tensor, got (2,) torch.float32",
    ),
    "skip elsewhere": (
        {"skip": ones(1, device="meta")},
        ValueError, "skip must be on param's device cpu, got meta",
    ),
    "seed too large": ({"seed": 2**64}, ValueError, f"seed must be in [0, {2**64}), got {2**64}"),
    "negative step": ({"step": -1}, ValueError, "step must be in [0, 4294967296), got -1"),
    "param_id is a float": ({"param_id": 1.5}, TypeError, "param_id must be an integer, got float"),
    "negative offset": ({"offset": -8}, ValueError, "offset must be in"),
    "unknown backend": (
        {"backend": "cuda"}, ValueError,
        "backend must be 'auto' or one of ('native', 'triton', 'reference'), got 'cuda'",
    ),
    "lists of two lengths": (
        {"param": [ones(3), ones(3)], "grad": [ones(3)]},
        ValueError, "grad must have param's length 2, got 1",
    ),
    "a tensor where a list is due": (
        {"param": [ones(3)]}, TypeError, "grad must be a sequence where param is, got Tensor",
    ),
    "a list on two devices": (
        {"param": [ones(3), ones(3, device="meta")], "grad": [ones(3), ones(3, device="meta")]},
        ValueError, "param must all be on one device cpu, got meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_lomo_update_refuses(case):
    changes, error, message = CASES[case]
    arguments = {"param": ones(3), "grad": ones(3), "lr": 0.1} | changes
    tensors = arguments["param"]
    tensors = tensors if isinstance(tensors, list) else [tensors]
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in tensors]
    with pytest.raises(error, match=re.escape(message)):
        ops.lomo_update_(arguments.pop("param"), arguments.pop("grad"), **arguments)
    for tensor, old in zip(tensors, before):
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            assert torch.equal(tensor, old)


def test_the_whole_list_is_checked_before_the_first_is_written():
    params = [ones(3), ones(3)]
    with pytest.raises(ValueError, match="grad must have param's shape"):
        ops.lomo_update_(params, [ones(3), ones(4)], lr=0.1)
    assert torch.equal(params[0], ones(3))


def test_skip_and_found_inf_must_be_two_flags():
    flag = torch.zeros(1)
    with pytest.raises(ValueError, match="skip and found_inf must be two tensors"):
        ops.lomo_update_(ones(3), ones(3), lr=0.1, skip=flag, found_inf=flag)


def test_an_inference_tensor_is_refused():
    with torch.inference_mode():
        param = ones(3)
    with pytest.raises(ValueError, match="param must not be an inference tensor"):
        ops.lomo_update_(param, ones(3), lr=0.1)


def test_a_wrapper_tensor_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(TypeError, match="param must be a plain tensor, got TwoTensor"):
        ops.lomo_update_(TwoTensor(ones(3), ones(3)), ones(3), lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sumsq": 3.0}, TypeError, "sumsq must be a tensor, got float"),
        ({"sumsq": ones(1, dtype=BF16)}, TypeError, "sumsq must be contiguous float32"),
        ({"sumsq": ones(2)}, ValueError, "sumsq must have one element per gradient (1), got 2"),
        ({"grad": "x"}, TypeError, "grad must be a tensor, got str"),
        ({"grad": ones(3, dtype=torch.int64)}, TypeError, "grad must be float32, bfloat16"),
        (
            {"grad": ones(3, dtype=torch.float64), "backend": "native"},
            RuntimeError,
            "float64 runs on the backend 'reference' alone",
        ),
        ({"grad": ones(3, device="meta")}, ValueError, "grad must be on sumsq's device cpu"),
        ({"inv_scale": 2.0}, TypeError, "inv_scale must be a one-element float32 tensor"),
        ({"backend": "none"}, ValueError, "backend must be 'auto' or one of"),
    ],
    ids=lambda value: None,
)
def test_grad_sumsq_refuses(arguments, error, message):
    arguments = {"sumsq": ones(1), "grad": ones(3)} | arguments
    with pytest.raises(error, match=re.escape(message)):
        ops.grad_sumsq_(arguments.pop("sumsq"), arguments.pop("grad"), **arguments)


def test_a_named_backend_never_falls_back():
    assert ops.unavailable("native", torch.device("meta")) == "there are no C++ kernels for meta"
    with pytest.raises(RuntimeError, match="backend 'native' cannot run on meta"):
        ops.lomo_update_(ones(3, device="meta"), ones(3, device="meta"), lr=0.1, backend="native")
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        ops.pick_backend(torch.device("cpu"), "fast")
