"""A model that trains in a second, questions that it can learn, and the command on them."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from lomo_kernels import cli, finetune  # noqa: E402
from lomo_kernels.finetune import data  # noqa: E402
from lomo_kernels.integrations import weights  # noqa: E402

ANSWERS = (" red", " green", " very blue")


def make_tiny(folder, multiple=1):
    """A Llama of 40 thousand parameters and a byte-level tokenizer, as Hugging Face saves them. The
    vocabulary is filled up to a multiple, as models pad theirs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["the sky is red green blue very of a" * 3], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=-(-len(fast) // multiple) * multiple, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def make_questions(path):
    """Questions whose answer is the colour named in them."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(120):
        answer = ANSWERS[int(torch.randint(len(ANSWERS), (1,), generator=generator))]
        rows.append({"prompt": f"{'a ' * (i % 5)}sky of{answer}:", "completion": answer})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def run(*arguments):
    return cli.main(["finetune", *(str(a) for a in arguments)])


def result(folder):
    return json.loads((folder / "result.json").read_text())


def loaded(tiny, **settings):
    """-> (model, tokenizer, Data of the settings)."""
    model, tokenizer = weights.load(tiny)
    return model, tokenizer, data.load(finetune.Settings(model=tiny, **settings), tokenizer)


def alone(model, prompt, answer):
    """The mean log-likelihood of an answer, by transformers' own loss."""
    ids = torch.tensor([prompt + answer])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        return -model(input_ids=ids, labels=labels).loss.item()


def weights_of(folder):
    return (folder / "model" / "model.safetensors").read_bytes()
