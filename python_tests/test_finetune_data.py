"""What is read from files: nothing is cut, dropped or misread without a word."""

import json
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from finetuning import loaded, result, run  # noqa: E402

from lomo_kernels import finetune  # noqa: E402
from lomo_kernels.finetune import data, formats, sources, tokens  # noqa: E402
from lomo_kernels.finetune.examples import batch_of, batches  # noqa: E402
from lomo_kernels.integrations import weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ROWS = [{"prompt": f"the sky {i} is", "completion": f" blue {i}\u2028of a"} for i in range(12)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def texts(path):
    """Prompts and completions that are read from a file."""
    items, _ = formats.converted(sources.read(str(path)))
    return [{"prompt": item.prompt, "completion": item.completion} for item in items]


def as_csv(rows, separator=","):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    return pandas.DataFrame(rows).to_csv(index=False, sep=separator)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", lambda: "\n".join(LINES).encode()),
        ("x.ndjson", lambda: "\n".join(LINES).encode()),
        ("x.jsonl", lambda: "\r\n".join([*LINES, ""]).encode()),
        ("x.jsonl", lambda: b"\xef\xbb\xbf" + "\n\n".join(LINES).encode()),
        ("x.json", lambda: "\n".join(LINES).encode()),
        ("x.json", lambda: json.dumps(ROWS, indent=1).encode()),
        ("x.csv", lambda: as_csv(ROWS).encode()),
        ("x.CSV", lambda: b"\xef\xbb\xbf" + as_csv(ROWS).replace("\n", "\r\n").encode()),
        ("x.tsv", lambda: as_csv(ROWS, "\t").encode()),
    ],
    ids=[
        "jsonl",
        "ndjson",
        "CRLF",
        "byte-order mark",
        "json lines",
        "array",
        "csv",
        "csv 2",
        "tsv",
    ],
)
def test_every_kind_of_file_has_the_same_rows(tmp_path, name, content):
    """Separators inside a text (U+2028), a mark at the beginning, ends of lines, empty lines."""
    path = tmp_path / name
    path.write_bytes(content())
    assert texts(path) == ROWS


def test_parquet_and_saved_data_sets_have_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    whole = datasets.Dataset.from_list(ROWS)
    whole.to_parquet(tmp_path / "x.parquet")
    assert texts(tmp_path / "x.parquet") == ROWS
    whole.save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one") == ROWS
    parts = datasets.DatasetDict({"train": whole.select(range(9)), "test": whole.select([9, 10])})
    parts.save_to_disk(tmp_path / "parts")
    assert texts(tmp_path / "parts") == ROWS[:9]
    held_out = sources.read(str(tmp_path / "parts"), "validation")
    assert [row["prompt"] for _, row in held_out.rows] == ["the sky 9 is", "the sky 10 is"]
    datasets.DatasetDict({"test": whole}).save_to_disk(tmp_path / "no_train")
    with pytest.raises(finetune.DataError, match="has the parts test; wanted train"):
        sources.read(str(tmp_path / "no_train"))


def test_a_name_of_the_hub_is_left_to_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        if arguments[0] == "some/where":
            return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(sources.read("some/where", config="part").rows) == 12
    assert asked == [("some/where", "part")]
    with pytest.raises(finetune.DataError, match="no data set can be loaded: no network"):
        sources.read("no/where")


def test_what_needs_a_library_says_so(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for module in ("pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(finetune.DataError, match=r"needs pyarrow .* 'lomo_kernels\[data\]'"):
        sources.read(str(tmp_path / "x.parquet"))
    with pytest.raises(finetune.DataError, match=r"needs datasets .* 'lomo_kernels\[data\]'"):
        sources.read(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"prompt": "é"}'.encode("latin-1"), r"x.jsonl is no UTF-8 text \(byte 12\)"),
        ("x.txt", "text".encode("utf-16"), r"x.txt is no UTF-8 text \(byte 0\)"),
        ("x.bin", b"a\0b", "x.bin is no text, it has null bytes"),
        ("x.parquet", b"PAR1 no more", "x.parquet cannot be read as parquet"),
        ("x.json", b"[1, 2]", "x.json, item 1: wanted an object, got '1'"),
        ("x.json", b'[{"text": "a"},\n{]', "x.json, line 2: not JSON"),
        ("x.json", b"[]", "x.json is empty"),
        ("x.csv", b"text\n", "x.csv is empty"),
        ("x.csv", b"text,more\na\n", "x.csv, row 1: wanted as many fields as the 2 columns"),
        ("x.csv", b"text\na,b\n", "x.csv, row 1: wanted as many fields as the 1 columns"),
        ("x.csv", b'text\n"a', "x.csv, row 1: not CSV"),
        ("x.csv", b"question,answer\na,b\n", "row 1: looked for the columns mess.*; found q"),
        ("x.jsonl", b'{"text": "\\ud800"}', "line 1: text has half of a surrogate pair"),
        ("x.jsonl", b'{"text": 1}', "line 1: text must be a text, got '1'"),
        ("x.jsonl", b'{"prompt": "a", "completion": ""}', "completion must be a text that"),
        ("x.jsonl", b'{"prompt": "a", "completion": "b", "choices": "bc"}', "choices must be a l"),
        ("x.jsonl", b'{"prompt": "a", "completion": "b", "choices": ["c", "d"]}', "'b' is none of"),
        ("x.jsonl", b'{"messages": "hello"}', "messages must be a list of objects with role"),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "must have a turn of"),
        ("x.jsonl", b'{"conversations": [{"from": "dog", "value": "a"}]}', "from must be one of"),
    ],
    ids=lambda value: None,
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(finetune.DataError, match=message):
        formats.converted(sources.read(str(path)))


def test_columns_that_are_not_used_are_named(tiny, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"id": i, **row}) for i, row in enumerate(ROWS)))
    assert run("--model", tiny, "--train", path, "--steps", 1) == 0
    assert "x.jsonl: the columns id are not used" in capsys.readouterr().out


# -- formats ---------------------------------------------------------------------------------------


def test_alpaca_s_rows():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (with_input, without), unused = formats.converted(
        sources.Source("x", [(1, {**row, "text": "all"}), (2, {**row, "input": ""})])
    )
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert without.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert with_input.completion == without.completion == "3"
    assert unused == ["text"]


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
UNCLOSED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
FORGETS = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"  # noqa: E501
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "sky?"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "very blue"},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture
def chatty(tiny):
    """The tiny tokenizer with marks of turns, one token each."""
    tokenizer = weights.load_tokenizer(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def conversation(tokenizer, turns=TURNS, length=256, rule="prompt-left"):
    fitting = tokens.Fitting(length, rule, tokenizer.bos_token_id)
    found = tokens.conversations([formats.Conversation(tuple(turns))], tokenizer, fitting)
    return (found[0] if found else None), fitting


def trained_text(tokenizer, example):
    marks = example.trained or (True,) * len(example.completion)
    ids = [token if mark else None for token, mark in zip(example.completion, marks)]
    runs = [[]]
    for token in ids:
        runs[-1].append(token) if token is not None else runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "marked"])
def test_the_loss_of_a_conversation_is_that_of_the_assistant(chatty, template):
    """The tokens are those of transformers' own template; every answer is closed by its mark."""
    chatty.chat_template = template
    example, _ = conversation(chatty)
    whole = chatty.apply_chat_template(TURNS[:-1], return_dict=True)["input_ids"]
    got = example.prompt + example.completion
    assert got == tuple(whole[: len(got)])
    assert chatty.decode(whole[len(got) :]).strip() == ""
    assert trained_text(chatty, example) == ["blue<|im_end|>", "very blue<|im_end|>"]
    labels = batch_of([example], 0, "cpu")["labels"][0]
    assert chatty.decode(labels[labels != -100]) == "blue<|im_end|>very blue<|im_end|>"


def test_a_template_without_a_mark_is_closed_by_the_end_token(chatty):
    chatty.chat_template = UNCLOSED
    example, _ = conversation(chatty)
    assert example.completion[-1] == chatty.eos_token_id
    assert trained_text(chatty, example)[-1].endswith("very blue<end>")


def test_templates_that_cannot_be_divided_are_refused(chatty, tiny):
    chatty.chat_template = FORGETS
    with pytest.raises(finetune.DataError, match="conversation 1: the chat template writes a turn"):
        conversation(chatty)
    chatty.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(finetune.DataError, match="refuses a conversation: no system turns"):
        conversation(chatty)
    with pytest.raises(finetune.DataError, match="which the model's tokenizer does not have"):
        conversation(weights.load_tokenizer(tiny))


def test_sharegpt_s_rows_are_messages():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    rows = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]
    for turns in (rows, TURNS):
        (got,), _ = formats.converted(sources.Source("x", [(1, {"conversations": turns})]))
        assert got.messages == tuple(TURNS)
    (got,), _ = formats.converted(sources.Source("x", [(1, {"messages": TURNS})]))
    assert got.messages == tuple(TURNS)


def test_conversations_are_learned(chatty, tiny, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model.resize_token_embeddings(len(chatty))
    weights.save(tmp_path / "model", model, chatty)
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"messages": TURNS}) for _ in range(20)))
    assert run("--model", tmp_path / "model", "--train", path, "--steps", 12, "--lr", 0.3,
               "--length", 200, "--out", tmp_path / "out") == 0  # fmt: skip
    record = result(tmp_path / "out")
    assert record["after"]["value"] < 0.5 * record["before"]["value"]
    assert record["after"]["count"] == 2 * len(trained_ids(chatty))


def trained_ids(tokenizer):
    example, _ = conversation(tokenizer)
    return [t for t, mark in zip(example.completion, example.trained) if mark]


# -- lengths ---------------------------------------------------------------------------------------


def question_file(folder, *rows):
    path = folder / "x.jsonl"
    short = [{"prompt": "the sky is", "completion": f" {i}"} for i in range(12)]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, *short]))
    return path


LONG = {"prompt": "a" * 50 + "xyz", "completion": " red"}
FULL = {"prompt": "of", "completion": " very" * 40}


def lines_of(tiny, path, **settings):
    _, tokenizer, examples = loaded(
        tiny, train=str(path), held_out=str(path), length=20, **settings
    )
    return tokenizer, examples, examples.lines


def test_what_is_too_long_is_counted_and_keeps_its_end(tiny, tmp_path):
    """A prompt loses its beginning, a completion nothing; the end token stays."""
    path = question_file(tmp_path, LONG, FULL)
    tokenizer, examples, lines = lines_of(tiny, path)
    cut = examples.train[0]
    assert len(cut.prompt) + len(cut.completion) == 20
    assert tokenizer.decode(cut.prompt).endswith("xyz")
    assert tokenizer.decode(cut.completion) == " red<end>"
    assert len(examples.train) == len(examples.held_out) == 13
    sizes = [
        len(tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in (LONG, FULL)
    ]
    for part in ("to train on", "held out"):
        assert (
            f"2 of 14 examples {part} are longer than --length 20 (the longest has {max(sizes)} "
            f"tokens: --length {max(sizes)} would do): in 1 the beginning of the prompt is cut, 1 "
            "are left out, whose answers leave no room for a prompt"
        ) in lines
    examples = loaded(tiny, train=str(path), length=max(sizes))[2]
    assert len(examples.lines) == 1


def test_what_is_too_long_can_be_skipped_or_refused(tiny, tmp_path, capsys):
    path = question_file(tmp_path, LONG, FULL)
    _, examples, lines = lines_of(tiny, path, truncate="skip")
    assert len(examples.train) == 12
    assert lines[1].endswith(" would do): 2 are left out")
    arguments = ["--model", tiny, "--train", path, "--length", 20, "--truncate", "error"]
    assert run(*arguments) == 2
    assert "would do); --truncate prompt-left or skip would go on" in capsys.readouterr().err
    path = question_file(tmp_path)
    assert run(*arguments, "--steps", 1) == 0


def test_a_mark_of_the_beginning_survives_the_cut():
    fitting = tokens.Fitting(6, "prompt-left", bos=1)
    assert fitting.prompt((1, 2, 3, 4, 5, 6), 3) == (1, 5, 6)
    assert fitting.prompt((2, 3, 4, 5, 6), 3) == (4, 5, 6)
    assert fitting.prompt((1, 2), 5) is None


def test_a_turn_without_its_beginning_is_not_trained(chatty):
    whole, _ = conversation(chatty)
    for length in range(len(whole.prompt) + len(whole.completion) - 1, 4, -1):
        example, fitting = conversation(chatty, length=length)
        assert fitting.longer == 1
        if example is None:
            assert fitting.left_out == 1
            continue
        assert len(example.prompt) + len(example.completion) == length
        assert example.prompt
        text = trained_text(chatty, example)
        assert text[-1] == "very blue<|im_end|>"
        assert text[:-1] in ([], ["blue<|im_end|>"])


def test_texts_say_what_fills_no_piece(tiny, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"the sky is {i}"}) for i in range(30)))
    _, tokenizer, examples = loaded(tiny, train=str(path), length=16)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    count = sum(len(tokenizer(f"the sky is {i}").input_ids) + 1 for i in order[3:])
    assert len(examples.train) == count // 16
    assert f"the last {count % 16} tokens to train on fill no piece and are left out" in (
        examples.lines
    )


def test_every_completion_is_closed_by_the_end_token(tiny, questions, tmp_path):
    """Answers that are a choice too; their score is without it."""
    open_ended = question_file(
        tmp_path, *({"prompt": "q", "completion": f" {i}"} for i in range(40))
    )
    for path in (questions, str(open_ended)):
        _, tokenizer, examples = loaded(tiny, train=path, length=64)
        for example in [*examples.train, *examples.held_out]:
            assert example.completion.count(tokenizer.eos_token_id) == 1
            assert example.completion[-1] == tokenizer.eos_token_id
            assert example.choices is None or example.completion[:-1] in example.choices


# -- where a prompt ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["the sky is", "the sky is ", "the sky is\n", "th"])
def test_prompt_and_completion_are_tokenised_together(tiny, prompt):
    tokenizer = weights.load_tokenizer(tiny)
    fitting = tokens.Fitting(64, "error", None)
    items = [formats.Question(prompt, "very blue"), formats.Question(prompt, "e sky")]
    for item, example in zip(items, tokens.questions(items, tokenizer, fitting)):
        got = example.prompt + example.completion[:-1]
        assert tokenizer.decode(got) == prompt + item.completion
        joint = tuple(tokenizer(prompt + item.completion).input_ids)
        if prompt != "th":  # "the" is a token: it cannot be divided after "th"
            assert got == joint
        else:
            assert example.prompt == tuple(tokenizer("th").input_ids)


def test_marks_that_a_tokenizer_adds_are_those_of_the_whole(tiny):
    from tokenizers.processors import TemplateProcessing

    tokenizer = weights.load_tokenizer(tiny)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", begin), ("<end>", end)]
    )
    fitting = tokens.Fitting(64, "error", begin)
    items = [formats.Question("the sky is", " blue")]
    (example,) = tokens.questions(items, tokenizer, fitting)
    whole = tuple(tokenizer("the sky is blue").input_ids)
    assert whole[0] == begin
    assert whole[-1] == end
    assert example.prompt + example.completion == whole


# -- choices ---------------------------------------------------------------------------------------


def test_each_question_is_scored_among_its_own_choices(tiny, tmp_path):
    choices = [" red", " green", " a b c"]
    row = {"prompt": "the sky is", "completion": " red"}
    rows = [{**row, "choices": choices[: 2 + i % 2]} for i in range(20)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run("--model", tiny, "--train", path, "--steps", 8, "--lr", 0.3,
               "--out", tmp_path / "out") == 0  # fmt: skip
    assert result(tmp_path / "out")["after"]["value"] == 1.0
    rows[3].pop("choices")
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(finetune.DataError, match="19 of 20 questions have choices"):
        loaded(tiny, train=str(path))


def test_part_of_the_examples_is_taken_by_the_seed(tiny, questions, tmp_path):
    def taken(**settings):
        parts = data.read(finetune.Settings(model=tiny, train=questions, train_size=10, **settings))
        return [item.prompt for item in parts.train]

    whole = [json.loads(line)["prompt"] for line in Path(questions).read_text().split("\n")]
    assert len(taken()) == 10
    assert set(taken()) <= set(whole)
    assert taken() == taken() != taken(seed=1)
    assert run("--model", tiny, "--train", questions, "--train-size", 10, "--epochs", 1,
               "--out", tmp_path / "out") == 0  # fmt: skip
    assert result(tmp_path / "out")["steps"] == 3
    text = tmp_path / "x.txt"
    text.write_text("the sky is blue\n" * 100)
    with pytest.raises(finetune.DataError, match="is one text"):
        data.read(finetune.Settings(model=tiny, train=str(text), train_size=10))


# -- parts and order -------------------------------------------------------------------------------


def test_the_order_of_a_pass_is_of_the_seed_and_the_pass():
    first, second, other = (batches(11, 4, *each) for each in ((0, 0), (0, 1), (1, 0)))
    for each in (first, second, other):
        assert [len(batch) for batch in each] == [4, 4, 3]
        assert sorted(i for batch in each for i in batch) == list(range(11))
    assert first != second != other != first
    assert batches(11, 4, 0, 1) == second


@pytest.mark.parametrize("part", ["validation", "held_out"])
def test_what_is_put_aside_is_of_the_seed(tiny, questions, part):
    def aside(seed):
        found = data.read(finetune.Settings(model=tiny, train=questions, eval_every=1, seed=seed))
        return [item.prompt for item in getattr(found, part)]

    assert aside(3) == aside(3) != aside(4)


def test_the_end_of_a_text_is_put_aside_and_not_trained_on(tiny, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text(text := "".join(f"line {i} of the text\n" for i in range(200)))
    parts = data.read(finetune.Settings(model=tiny, train=str(path), eval_every=1))
    (train,), (validation,), (held_out,) = parts.train, parts.validation, parts.held_out
    assert train.text + validation.text + held_out.text == text
    assert all(each.text.endswith("\n") for each in (train, validation, held_out))
    assert len(held_out.text) == pytest.approx(len(text) / 10, abs=40)
    assert len(validation.text) == pytest.approx(len(text) * 9 / 100, abs=40)
