"""Ways to drive a step: (optimizer, loss)."""


def by_backward(optimizer, loss):
    optimizer.backward(loss)


def by_fused_backward(optimizer, loss):
    """lomo_optim's calls."""
    if optimizer.clip_grad_norm is not None and optimizer.norm == "global":
        optimizer.grad_norm(loss)
    optimizer.fused_backward(loss, optimizer.param_groups[0]["lr"])


def by_loop(optimizer, loss):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def by_scaled_loop(optimizer, loss):
    by_loop(optimizer, optimizer.scale(loss))


def by_held_gradients(optimizer, loss):
    with optimizer.accumulate():
        optimizer.scale(loss).backward()
    optimizer.step()
