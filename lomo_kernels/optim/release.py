"""Backward hooks that hand over each gradient the moment it exists: attach, fire, remove."""

import weakref

_TAKEN = set()  # ids of parameters that have a hook, whose optimizers keep them alive


def taken(param):
    """Whether an optimizer of this package releases this parameter's gradient already."""
    return id(param) in _TAKEN


class GradientRelease:
    """Calls `on_gradient(param)` when a parameter's gradient is complete in `param.grad`.

    One hook per parameter, whose cost does not depend on how many there are. `on_gradient` is a
    bound method and its object is held weakly: a model never keeps its optimizer alive.

    `register_post_accumulate_grad_hook` fires once per backward and parameter, after everything
    that flows into the parameter has been added up (also for tied weights), and under FSDP2 after
    the reduce-scatter. Not before an all-reduce of DDP, which is why DDP is refused elsewhere.
    """

    def __init__(self, on_gradient):
        method = weakref.WeakMethod(on_gradient)

        def fire(param):
            if (call := method()) is not None:
                call(param)

        self._fire = fire
        self._handles = {}

    def attach(self, params):
        """Hooks the parameters that need a gradient and have no hook yet."""
        for param in params:
            if param.requires_grad and id(param) not in self._handles:
                handle = param.register_post_accumulate_grad_hook(self._fire)
                self._handles[id(param)] = handle
                _TAKEN.add(id(param))

    def remove(self):
        """Takes every hook off; gradients stay in `param.grad` again."""
        for handle in self._handles.values():
            handle.remove()
        _TAKEN.difference_update(self._handles)
        self._handles.clear()
