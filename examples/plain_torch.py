"""The main job in plain PyTorch: every parameter of SmolLM2-135M, on Python's language reference.

Needs transformers, and a network or a hub's cache for the model.
"""

from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lomo_kernels import Lomo

NAME, STEPS, BATCH, LENGTH, LR = "HuggingFaceTB/SmolLM2-135M-Instruct", 32, 4, 128, 0.1

model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(NAME)
text = "\n".join(topics[name] for name in sorted(topics))
tokens = torch.tensor(tokenizer(text).input_ids)
pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
held_out, pieces = pieces[::10], pieces[torch.arange(len(pieces)) % 10 != 0]


def perplexity():
    with torch.no_grad():
        losses = [model(input_ids=p, labels=p).loss for p in held_out[:64].split(8)]
    return torch.stack(losses).mean().exp().item()


optimizer = Lomo(model, lr=LR, clip_grad_norm=1.0)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
print(f"before: {perplexity():.2f}")
for step in range(STEPS):
    batch = pieces[torch.randint(len(pieces), (BATCH,))]
    loss = model(input_ids=batch, labels=batch).loss
    optimizer.backward(loss)
    schedule.step()
    print(f"step {step}: loss {loss.item():.3f}, gradient norm {optimizer.last_grad_norm:.2f}")
print(f"after: {perplexity():.2f}")
model.save_pretrained("finetuned")
