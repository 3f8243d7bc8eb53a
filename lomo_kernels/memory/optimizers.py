"""The optimizers that a plan compares, and how each takes a step."""

import torch

from .. import optim
from ..integrations import peft

RELEASING = optim.OPTIMIZERS  # gradients are used in backward
OPTIMIZERS = (*RELEASING, "sgd", "sgd-master", "adamw", "adamw-master")


class MasterCopy(torch.optim.Optimizer):
    """Mixed precision as it is usual: `rule` updates an fp32 copy of each 16-bit parameter.

    One parameter at a time, so that fp32 gradients of all of them never exist. States: the copy and
    what `rule` keeps for it, in fp32.
    """

    def __init__(self, params, rule, **defaults):
        super().__init__(params, defaults)
        self._rule = rule
        self._rules = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["master"] = param.detach().clone().float()
                    self._rules[param] = self._rule([state["master"]], **self.defaults)
                master, rule = state["master"], self._rules[param]
                master.grad = param.grad.float()
                rule.step()
                master.grad = None
                state.update(rule.state[master])
                param.copy_(master)


def make(name, model, options):
    """-> (optimizers, step), where `step(loss)` is a step of training after the forward. LoRA that
    is trained beside the weights is AdamW's."""
    if (releasing := RELEASING.get(name)) is not None:
        own, beside = peft.divided(model)
        several = [releasing(own if beside else model, **options)]
        if beside:
            several.append(torch.optim.AdamW(beside, lr=1e-3, foreach=False))

        def releasing_step(loss):
            several[0].backward(loss)
            for each in several[1:]:
                each.step()
            for each in several:
                each.zero_grad()

        return several, releasing_step
    # A loop over the parameters, on every device: "foreach" needs room for all of them at a time.
    rule = torch.optim.SGD if name.startswith("sgd") else torch.optim.AdamW
    trained = [param for param in model.parameters() if param.requires_grad]
    if name.endswith("-master"):
        optimizer = MasterCopy(trained, rule, lr=1e-3, foreach=False)
    else:
        optimizer = rule(trained, lr=1e-3, foreach=False)

    def step(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return [optimizer], step
