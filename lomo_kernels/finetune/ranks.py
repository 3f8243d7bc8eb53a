"""The processes of one run, which torchrun starts: what is each one's, and what they agree on."""

import atexit
import contextlib
import datetime
import os
import threading
import time

import torch

from .signals import StoppedError

# The first rank writes the model alone while the others wait; that a process has ended is noticed
# sooner, and otherwise.
_TIMEOUT = datetime.timedelta(hours=2)
_LET_GO = 0.2  # seconds in which gloo's threads free the last message


class Ranks:
    """All processes of a run; without a process group the only one.

    Args:
        tensor_parallel: how many of them share each matrix, and so have the same examples.
        device: where this one computes.
    """

    def __init__(self, tensor_parallel=1, device="cpu"):
        self._dist = torch.distributed
        begun = self._dist.is_available() and self._dist.is_initialized()
        self.size = self._dist.get_world_size() if begun else 1
        self.rank = self._dist.get_rank() if begun else 0
        self.device = device
        self.is_first = self.rank == 0
        self.tensor_parallel = tensor_parallel
        self.parts = self.size // tensor_parallel  # of a batch
        self.part = self.rank // tensor_parallel  # which of them is this rank's

    def of(self, items):
        """This rank's items of a list."""
        return items[self.part :: self.parts]

    def of_batch(self, examples):
        """-> (this rank's examples of a batch, how many of their tokens count, and of all).

        The engine takes the mean of the ranks' gradients. Where a rank's loss, the mean over its
        own tokens, is multiplied by `parts` and by its share of all tokens, that is the gradient of
        the mean over all of them, as in one process. Each rank takes part in every forward and
        backward: one without tokens takes some, of which none counts.
        """
        tokens = [example.counted for example in examples]
        mine = sum(self.of(tokens))
        if mine == 0 and self.parts > 1:
            return [examples[tokens.index(max(tokens))]], 0, sum(tokens)
        return self.of(examples), mine, sum(tokens)

    def sum(self, *values):
        """The sum of each of these numbers over the parts of a batch."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        self._dist.all_reduce(total)
        return (total / self.tensor_parallel).tolist()

    def any(self, flag):
        """Whether it is true on a rank."""
        return self.sum(bool(flag))[0] > 0

    def all(self, value):
        """The values of all ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        self._dist.all_gather_object(values, value)
        return values

    def first(self, function, *arguments):
        """What a function gives on the first rank, alone in calling it; its error is raised on all
        ranks."""
        if self.size == 1:
            return function(*arguments)
        outcome = [None, None]
        if self.is_first:
            try:
                outcome[0] = function(*arguments)
            except Exception as error:
                outcome[1] = error
        self._dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


@contextlib.contextmanager
def joined(settings):
    """The Ranks of a run; begins a process group where one is needed.

    Raises:
        ValueError: the settings do not go with this number of processes.
    """
    dist = torch.distributed
    begun = dist.is_available() and dist.is_initialized()
    size = dist.get_world_size() if begun else int(os.environ.get("WORLD_SIZE", 1))
    check(settings, size)
    device, alone = settings.device, False
    if size > 1 and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if not begun and (size > 1 or settings.is_sharded):
        # Offloaded parameters and agreements of the ranks are on the CPU.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        if size == 1:
            alone = True
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=_TIMEOUT)
            atexit.register(_leave)  # torchrun's store does not forget: no second group can begin
    try:
        yield Ranks(settings.tensor_parallel, device)
    finally:
        if alone:
            _leave()


def _leave():
    """Ends the process group.

    A thread of gloo may still hold the last message's tensors, and frees them with Python's lock;
    where the interpreter has ended before, that aborts the process (pytorch/pytorch#190489).
    """
    if torch.distributed.is_initialized():
        time.sleep(_LET_GO)
        torch.distributed.destroy_process_group()


def check(settings, size):
    """Raises ValueError: the settings do not go with so many processes."""
    parallel = settings.tensor_parallel
    if size % parallel:
        raise ValueError(f"tensor_parallel must divide the {size} processes, got {parallel}")
    if settings.sharding == "none" and size > parallel:
        raise ValueError(
            f"sharding 'none' is for one process, and there are {size}: each would train a model "
            "of its own; leave it out, or start one process"
        )
    if settings.offload and parallel > 1:
        raise ValueError("offload goes with FSDP2 alone: leave out tensor_parallel")
    if settings.units != "layer" and (parallel > 1 or (size == 1 and not settings.is_sharded)):
        raise ValueError(
            f"units {settings.units!r} is of FSDP2: it needs several processes, or sharding "
            "'fsdp2', or offload, and no tensor_parallel"
        )
    if size == 1:
        return
    if settings.adapter is not None:
        raise ValueError(
            f"adapter must be left out with {size} processes, got {settings.adapter!r}"
        )
    if settings.device not in ("cpu", "cuda"):
        raise ValueError(
            f"device must be cpu or cuda with {size} processes, each of which takes a card of its "
            f"own, got {settings.device!r}"
        )
    if parallel > 1 and settings.device == "cpu" and torch.accelerator.is_available():
        raise ValueError(
            "tensor_parallel on the device 'cpu' needs a machine without GPUs, as transformers "
            "places its parts on them: set CUDA_VISIBLE_DEVICES= to hide them"
        )


# -- when one of them fails ------------------------------------------------------------------------


class LostError(Exception):
    """Another process of the run has ended."""


class Watch:
    """While it is entered, this process ends within seconds of another one's failure, and the first
    that fails says why: errors of the others end them in silence.

    A rank that computes, or that waits for another one on a GPU, would go on for long. So each has
    a thread that looks at a key in torchrun's store, which the first to fail has set.
    """

    PERIOD = 1.0  # seconds between two looks

    def __init__(self):
        self._several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        self._key = f"lomo_kernels/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self._over = threading.Event()

    def __enter__(self):
        if self._several:
            self._store = _connect()
            self._thread = threading.Thread(target=self._look, args=(_connect(),), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, trace):
        if not self._several:
            return
        self._over.set()
        self._thread.join(5)  # it must not be in the store when the interpreter ends
        if error is None or isinstance(error, StoppedError):
            return
        atexit.unregister(_leave)  # the others do not come to the end of the group
        try:
            first = self._store.add(self._key, 1) == 1
        except RuntimeError:  # torchrun has ended
            first = False
        if not first:
            os._exit(1)
        if _is_of_a_lost_rank(error):
            raise LostError(
                "another process of this run has ended; the same command goes on from the newest "
                "checkpoint"
            ) from error

    def _look(self, store):
        while not self._over.wait(self.PERIOD):
            try:
                failed = store.check([self._key])
            except RuntimeError:  # the process that has the store has come to its end
                return
            if failed and not self._over.is_set():
                os._exit(1)


def _connect():
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False)


def _is_of_a_lost_rank(error):
    """Of gloo's and NCCL's errors only the text says that a peer has gone."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed by peer" in text)
    )
