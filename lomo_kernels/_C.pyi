# The extension module, of csrc/bindings.cpp. Addresses, counts and codes are integers; what begins
# with cuda_ is there where it was built with CUDA.

dtypes: dict[str, int]
roundings: dict[str, int]
adalomo_calls: dict[str, int]
structs: dict[str, list[str]]  # columns of a row of int64
arguments: dict[str, list[str]]  # of a function, by the name of its operation
tickets: int  # counters of a call of cuda_grad_sumsq
norm_chunk: int
compiler: str
cuda_compiler: str
cuda_architectures: str

def adalomo_scratch(arg0: int, arg1: int) -> int: ...
def adalomo_sizes(arg0: int, arg1: int, arg2: int, arg3: bool, arg4: int) -> tuple[int, int]: ...
def cpu_adalomo_parts(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: float,
    arg6: float,
    arg7: float,
    arg8: float,
    arg9: float,
    arg10: float,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    arg18: int,
    arg19: int,
    arg20: int,
    arg21: int,
) -> None: ...
def cpu_adalomo_sums(arg0: int, arg1: int, arg2: int) -> None: ...
def cpu_adalomo_update(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: float,
    arg6: float,
    arg7: float,
    arg8: float,
    arg9: float,
    arg10: float,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    arg18: int,
    arg19: int,
) -> None: ...
def cpu_decide(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: float,
    arg7: float,
    arg8: float,
    arg9: float,
    arg10: int,
    arg11: int,
) -> None: ...
def cpu_grad_sumsq(
    arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, arg5: int, arg6: int, arg7: int
) -> None: ...
def cpu_instruction_set() -> str: ...
def cpu_lomo_update(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: float,
    arg6: float,
    arg7: float,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
) -> None: ...
def cpu_use_instruction_set(arg0: str) -> bool: ...
def cuda_adalomo_parts(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: float,
    arg6: float,
    arg7: float,
    arg8: float,
    arg9: float,
    arg10: float,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    arg18: int,
    arg19: int,
    arg20: int,
    arg21: int,
    arg22: int,
) -> None: ...
def cuda_adalomo_sums(arg0: int, arg1: int, arg2: int, arg3: int) -> None: ...
def cuda_adalomo_update(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: float,
    arg6: float,
    arg7: float,
    arg8: float,
    arg9: float,
    arg10: float,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    arg18: int,
    arg19: int,
    arg20: int,
) -> None: ...
def cuda_decide(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: float,
    arg7: float,
    arg8: float,
    arg9: float,
    arg10: int,
    arg11: int,
    arg12: int,
) -> None: ...
def cuda_device_count() -> int: ...
def cuda_grad_sumsq(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: bool,
    arg9: int,
    arg10: int,
) -> None: ...
def cuda_lomo_update(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: float,
    arg6: float,
    arg7: float,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
) -> None: ...
def cuda_unavailable(arg0: int) -> str | None: ...
