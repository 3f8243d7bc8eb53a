# The extension module, of csrc/bindings.cpp. Addresses, counts and codes are integers; what begins
# with cuda_ is there where it was built with CUDA.

dtypes: dict[str, int]
roundings: dict[str, int]
adalomo_calls: dict[str, int]
structs: dict[str, list[str]]  # columns of a row of int64
norm_chunk: int
compiler: str
cuda_compiler: str
cuda_architectures: str

def adalomo_kept(arg0: int, arg1: int, arg2: int, arg3: bool, arg4: int) -> int: ...
def adalomo_scratch(arg0: int, arg1: int, arg2: int, arg3: bool) -> int: ...
def cpu_adalomo_parts(
    rows: int,
    count: int,
    param: int,
    grad: int,
    rounding: int,
    lr: float,
    weight_decay: float,
    eps_square: float,
    eps_rms: float,
    clip_threshold: float,
    clip_value: float,
    seed: int,
    inv_scale: int,
    clip_coef: int,
    found_inf: int,
    skip: int,
    weights: int,
    weights_count: int,
    call: int,
    statistics: int,
    squares: int,
    threads: int,
) -> None: ...
def cpu_adalomo_sums(row: int, param: int, threads: int) -> None: ...
def cpu_adalomo_update(
    rows: int,
    count: int,
    param: int,
    grad: int,
    rounding: int,
    lr: float,
    weight_decay: float,
    eps_square: float,
    eps_rms: float,
    clip_threshold: float,
    clip_value: float,
    seed: int,
    inv_scale: int,
    clip_coef: int,
    found_inf: int,
    skip: int,
    weights: int,
    weights_count: int,
    threads: int,
) -> None: ...
def cpu_decide(
    decisions: int,
    out: int,
    sumsq: int,
    count: int,
    found_inf: int,
    flags: int,
    max_norm: float,
    min_scale: float,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
) -> None: ...
def cpu_grad_sumsq(
    rows: int,
    count: int,
    grad: int,
    inv_scale: int,
    found_inf: int,
    sumsq: int,
    partials: int,
    threads: int,
) -> None: ...
def cpu_instruction_set() -> str: ...
def cpu_lomo_update(
    rows: int,
    count: int,
    param: int,
    grad: int,
    rounding: int,
    lr: float,
    decay: float,
    clip_value: float,
    step: int,
    seed: int,
    inv_scale: int,
    clip_coef: int,
    found_inf: int,
    skip: int,
    threads: int,
) -> None: ...
def cpu_use_instruction_set(arg0: str) -> bool: ...
def cuda_adalomo_parts(
    rows: int,
    count: int,
    param: int,
    grad: int,
    rounding: int,
    lr: float,
    weight_decay: float,
    eps_square: float,
    eps_rms: float,
    clip_threshold: float,
    clip_value: float,
    seed: int,
    inv_scale: int,
    clip_coef: int,
    found_inf: int,
    skip: int,
    weights: int,
    weights_count: int,
    call: int,
    statistics: int,
    squares: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_adalomo_sums(row: int, param: int, device: int, stream: int) -> None: ...
def cuda_adalomo_update(
    rows: int,
    count: int,
    param: int,
    grad: int,
    rounding: int,
    lr: float,
    weight_decay: float,
    eps_square: float,
    eps_rms: float,
    clip_threshold: float,
    clip_value: float,
    seed: int,
    inv_scale: int,
    clip_coef: int,
    found_inf: int,
    skip: int,
    weights: int,
    weights_count: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_decide(
    decisions: int,
    out: int,
    sumsq: int,
    count: int,
    found_inf: int,
    flags: int,
    max_norm: float,
    min_scale: float,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_grad_sumsq(
    rows: int,
    count: int,
    grad: int,
    inv_scale: int,
    found_inf: int,
    sumsq: int,
    partials: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_lomo_update(
    rows: int,
    count: int,
    param: int,
    grad: int,
    rounding: int,
    lr: float,
    decay: float,
    clip_value: float,
    step: int,
    seed: int,
    inv_scale: int,
    clip_coef: int,
    found_inf: int,
    skip: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_device_count() -> int: ...
def cuda_unavailable(arg0: int) -> str | None: ...
