"""SuperGLUE's tasks, on rows written for these tests in the official release's format."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from finetuning import alone, loaded, result, run  # noqa: E402

from lomo_kernels import finetune  # noqa: E402
from lomo_kernels.finetune import data, scoring, superglue  # noqa: E402
from lomo_kernels.finetune.examples import Example  # noqa: E402
from lomo_kernels.finetune.ranks import Ranks  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

SEA = "The sky saw the sea and it was red."
BLUE = "The sky is blue."


def rows(names, *values):
    return [dict(zip(names.split(), row)) for row in values]


RELEASE = {
    "boolq": rows(
        "question passage label idx",
        ("is the sky blue", "Sky -- It is blue.", True, 0),
        ("is it red", "It is green.", False, 1),
    ),
    "cb": rows(
        "premise hypothesis label idx",
        ("It is red.", "it is red", "entailment", 0),
        ("It is red.", "it is blue", "contradiction", 1),
        ("A sky.", "it is of a", "neutral", 2),
    ),
    "copa": rows(
        "premise choice1 choice2 question label idx",
        ("The sky is red.", "The day ends.", "It is a sky.", "cause", 0, 0),
        ("It is red.", "It is blue.", "It is very red.", "effect", 1, 1),
    ),
    "multirc": rows(
        "idx version passage",
        (0, 1.1, {"text": BLUE, "questions": rows(
            "idx question answers",
            (0, "What is blue?", rows("idx text label", (0, "The sky", 1), (1, "A day", 0))),
            (1, "Is it red?", rows("idx text label", (2, "No", 1))),
        )}),
    ),
    "rte": rows(
        "premise hypothesis label idx",
        ("It is very red.", "It is red.", "entailment", 0),
        ("It is red.", "It is a {sky}.", "not_entailment", 1),
    ),
    "wic": rows(
        "word sentence1 sentence2 idx label start1 start2 end1 end2 version",
        ("sky", "A sky.", "Two skies.", 0, True, 2, 4, 5, 9, 1.1),
    ),
    "wsc": rows(
        "text idx label target",
        (SEA, 0, False, {
            "span1_index": 1, "span1_text": "The sky", "span2_index": 6, "span2_text": "it"
        }),
    ),
}  # fmt: skip
HUB_LABELS = {"boolq": (1, 0), "cb": (0, 1, 2), "copa": (0, 1), "rte": (0, 1), "wic": (1,)}
HUB = {  # the same rows as the hub has them
    **{
        task: [{**row, "label": label} for row, label in zip(RELEASE[task], labels)]
        for task, labels in HUB_LABELS.items()
    },
    "multirc": rows(
        "paragraph question answer idx label",
        (BLUE, "What is blue?", "The sky", {"paragraph": 0, "question": 0, "answer": 0}, 1),
        (BLUE, "What is blue?", "A day", {"paragraph": 0, "question": 0, "answer": 1}, 0),
        (BLUE, "Is it red?", "No", {"paragraph": 0, "question": 1, "answer": 2}, 1),
    ),
    "wsc": rows(
        "text idx label span1_index span1_text span2_index span2_text",
        (SEA, 0, 0, 1, "The sky", 6, "it"),
    ),
}
CB_ENDS = "Yes, No, or Maybe?\nAnswer:"
MULTIRC_ENDS = "Is that correct? Yes or No?\nAnswer:"
QUESTIONS = {  # prompt and answer, as the authors' code joins them
    "boolq": [
        ("Sky -- It is blue. is the sky blue\nAnswer:", " Yes"),
        ("It is green. is it red\nAnswer:", " No"),
    ],
    "cb": [
        (f'Suppose It is red. Can we infer that "it is red"? {CB_ENDS}', " Yes"),
        (f'Suppose It is red. Can we infer that "it is blue"? {CB_ENDS}', " No"),
        (f'Suppose A sky. Can we infer that "it is of a"? {CB_ENDS}', " Maybe"),
    ],
    "copa": [
        ("The sky is red. because", " The day ends."),
        ("It is red. so", " It is very red."),
    ],
    "multirc": [
        (f'{BLUE}\nQuestion: {question}\nI found this answer "{answer}". {MULTIRC_ENDS}', right)
        for question, answer, right in (
            ("What is blue?", "The sky", " Yes"),
            ("What is blue?", "A day", " No"),
            ("Is it red?", "No", " Yes"),
        )
    ],
    "rte": [
        (f'{premise}\nDoes this mean that "{claim}" is true? Yes or No?\nAnswer:', answer)
        for premise, claim, answer in (
            ("It is very red.", "It is red.", " Yes"), ("It is red.", "It is a {sky}.", " No")
        )
    ],
    "wic": [
        (
            'Does the word "sky" have the same meaning in these two sentences? Yes, No?\n'
            "A sky.\nTwo skies.\nAnswer:",
            " Yes",
        ),
    ],
    "wsc": [
        (
            f'{SEA}\nIn the previous sentence, does the pronuon "it" refer to "The sky"? '
            "Yes or No?\nAnswer:",
            " No",
        ),
    ],
}  # fmt: skip


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def release(folder, task, train, validation=None):
    """The files of a task as the release names them."""
    name = superglue.TASKS[task].folder
    write(folder / name / "train.jsonl", train)
    if validation is not None:
        write(folder / name / "val.jsonl", validation)
    return str(folder)


def many(task, count):
    """So many rows of a task, with different texts."""
    texts = [json.dumps(row) for row in RELEASE[task]]
    texts = [texts[i % len(texts)].replace("It ", f"It {i} ") for i in range(count)]
    return [json.loads(text) for text in texts]


@pytest.mark.parametrize("task", superglue.TASKS)
def test_the_release_and_the_hub_give_the_same_questions(tmp_path, task):
    given = RELEASE[task]
    train, validation = superglue.read(task, release(tmp_path / "release", task, given, given[:1]))
    assert [(q.prompt, q.completion) for q in train] == QUESTIONS[task]
    assert all(q.completion in q.choices for q in train)
    assert validation == train[: len(validation)]
    alone = tmp_path / "release" / superglue.TASKS[task].folder
    assert superglue.read(task, str(alone)) == (train, validation)
    write(tmp_path / "hub" / task / "train.jsonl", HUB[task])
    assert superglue.read(task, str(tmp_path / "hub")) == (train, None)


def test_the_hub_s_parquet_files_and_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    flat = HUB["multirc"]
    pieces = [datasets.Dataset.from_list(part) for part in (flat[:2], flat[2:])]
    folder = tmp_path / "hub" / "multirc"
    folder.mkdir(parents=True)
    for i, piece in enumerate(pieces):
        piece.to_parquet(folder / f"train-0000{i}-of-00002.parquet")
    pieces[0].to_parquet(folder / "validation-00000-of-00001.parquet")
    train, validation = superglue.read("multirc", str(tmp_path / "hub"))
    wanted, _ = superglue.read("multirc", release(tmp_path, "multirc", RELEASE["multirc"]))
    assert train == wanted
    assert validation == wanted[:2]
    whole = datasets.concatenate_datasets(pieces)
    datasets.DatasetDict({"train": whole, "validation": pieces[0]}).save_to_disk(tmp_path / "saved")
    assert superglue.read("multirc", str(tmp_path / "saved")) == (wanted, wanted[:2])


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("boolq", {"question": "a", "passage": "b"}, "line 1: no row of boolq, whose columns are"),
        ("boolq", {"question": "a", "passage": "b", "label": -1}, "its label is -1"),
        ("boolq", {"passage": "b", "label": 1}, "there is no 'question'"),
        ("cb", {"premise": "a", "hypothesis": "b", "label": "perhaps"}, "invalid literal for int"),
        ("copa", {"premise": "a", "question": "why", "label": 1}, "there is no 'why'"),
        ("multirc", {"passage": {"text": "a", "questions": [{}]}}, "there is no 'answers'"),
    ],
)  # fmt: skip
def test_rows_of_another_task_are_refused(tmp_path, task, row, message):
    with pytest.raises(finetune.DataError, match=message):
        superglue.read(task, release(tmp_path, task, [row]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "boolq"], "data must be where the rows of boolq are, got None"),
        (
            ["--task", "sst2", "--data", "x"],
            "task must be one of boolq, cb, copa, multirc, rte, wic",
        ),
        (["--data", "x"], "data must be of a task: name one with --task"),
        (["--prompt-file", "x"], "prompt_file must be of a task: name one with --task"),
        (["--task", "rte", "--data", "x", "--train", "y"], "train must be left out with a task"),
        (["--task", "rte", "--data", "."], ". has no training part of rte: looked for RTE/train"),
        (["--task", "rte", "--data", "none"], "there is no file none"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


# -- prompts of one's own --------------------------------------------------------------------------


def test_a_prompt_of_one_s_own(tiny, tmp_path):
    folder = release(tmp_path, "cb", many("cb", 12), many("cb", 6))
    path = tmp_path / "prompt.yaml"
    path.write_text(
        "prompt: |-\n  {hypothesis} <- {premise}\n  Verdict:\nchoices: [' red', ' blue', ' of']\n"
    )
    train, _ = superglue.read("cb", folder, str(path))
    assert (train[2].prompt, train[2].completion) == ("it is of a <- A sky.\nVerdict:", " of")
    arguments = ["--model", tiny, "--task", "cb", "--data", folder, "--prompt-file", path]
    assert run(*arguments, "--steps", 1, "--out", tmp_path / "out") == 0
    path.write_text("prompt: '{hypothesis} {premise}'\n")
    train, _ = superglue.read("cb", folder, str(path))
    assert train[0].choices == (" Yes", " No", " Maybe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt: '{sentence}'", "is no text with the columns premise, hypothesis in braces"),
        ("prompt: '{premise'", "is no text with the columns"),
        ("prompt: 3", "is no text with the columns"),
        ("choices: [a, b, c]", "wanted prompt, and choices where they are others"),
        ("prompt: a\nchoices: [a, b]", "wanted 3 choices, in the order of the labels"),
        ("prompt: [", "cannot be read as YAML"),
    ],
)
def test_a_prompt_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "prompt.yaml"
    path.write_text(text)
    with pytest.raises(finetune.DataError, match=message):
        superglue.read("cb", release(tmp_path, "cb", many("cb", 3)), str(path))


def test_the_page_has_the_prompts(tmp_path):
    """docs/downstream.md: its table, and its own prompt for BoolQ."""
    page = (Path(__file__).parent.parent / "docs" / "downstream.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.+?)`", page, re.MULTILINE))
    assert listed.keys() == superglue.TASKS.keys()
    for name, prompt in listed.items():
        want = superglue.TASKS[name].prompt.replace("{connective}", "so")
        assert prompt.replace("\N{RETURN SYMBOL}", "\n") == want
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "prompt.yaml"
    path.write_text(block)
    train, _ = superglue.read("boolq", release(tmp_path, "boolq", RELEASE["boolq"]), str(path))
    prompt = "Sky -- It is blue.\nQuestion: is the sky blue?\nAnswer:"
    assert (train[0].prompt, train[0].completion) == (prompt, " yes")


# -- samples ---------------------------------------------------------------------------------------


def settings(tiny, folder, task, **more):
    return finetune.Settings(model=tiny, task=task, data=folder, **more)


def test_a_thousand_are_taken_as_the_authors_take_them(tiny, tmp_path):
    """By Python's generator with the seed, 0 there."""
    given = many("rte", 1200)
    parts = data.read(settings(tiny, release(tmp_path, "rte", given, given[:1100]), "rte"))
    for got, count in ((parts.train, 1200), (parts.held_out, 1100)):
        random.seed(0)
        want = random.sample(list(range(count)), 1000)
        assert [q.prompt.split("\n")[0] for q in got] == [given[i]["premise"] for i in want]
    fewer = data.read(settings(tiny, str(tmp_path), "rte", train_size=20, eval_size=10, seed=1))
    assert (len(fewer.train), len(fewer.held_out)) == (20, 10)


def paragraphs(count):
    """MultiRC with 2 questions to a paragraph, of 3 and 2 answers."""
    rows = []
    for i in range(count):
        questions = [
            {"question": f"{kind}?", "answers": [
                {"text": f"answer {k}", "label": (i + k) % 2} for k in range(answers)
            ]}
            for kind, answers in (("who", 3), ("why", 2))
        ]  # fmt: skip
        rows.append({"passage": {"text": f"Sky {i} is blue.", "questions": questions}})
    return rows


def test_multirc_is_divided_and_sampled_by_paragraphs(tiny, tmp_path):
    folder = release(tmp_path, "multirc", paragraphs(40))
    parts = data.read(settings(tiny, folder, "multirc", train_size=62, eval_every=1))
    seen = []
    for part in (parts.train, parts.validation, parts.held_out):
        groups = [q.paragraph for q in part]
        assert all(groups.count(group) == 5 for group in groups)  # whole
        seen.append(set(groups))
    assert [len(groups) for groups in seen] == [12, 4, 4]
    assert len(set.union(*seen)) == 20


# -- scores ----------------------------------------------------------------------------------------


def answered(*rows):
    """Examples and choices made, from (question, right, chosen)."""
    examples = [Example((1,), (2,), right=right, question=question) for question, right, _ in rows]
    return examples, [chosen for *_, chosen in rows]


def test_measures_of_superglue_by_hand():
    examples, chosen = answered(
        ("a", 1, 1), ("a", 0, 0), ("b", 1, 0), ("b", 1, 1), ("c", 0, 1), ("d", 0, 0)
    )  # fmt: skip
    assert scoring.exact_match(examples, chosen) == 2 / 4
    assert scoring.f1_of_answers(examples, chosen) == pytest.approx(2 * 2 / (3 + 3))
    # labels 0, 1, 2: 2 of 3 and 3; 1 of 2 and 1; 0 of 1 and 2
    examples, chosen = answered(
        *[(None, r, c) for r, c in zip((0, 0, 0, 1, 1, 2), (0, 0, 2, 1, 2, 0))]
    )
    assert scoring.macro_f1(examples, chosen) == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    # an answer that was only chosen counts too
    examples, chosen = answered((None, 0, 0), (None, 0, 2))
    assert scoring.macro_f1(examples, chosen) == pytest.approx((2 / 3 + 0) / 2)


def test_measures_are_scikit_learn_s():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    for seed in range(20):
        order = random.Random(seed)
        rows = [(None, order.randrange(3), order.randrange(3)) for _ in range(2 + seed % 9)]
        examples, chosen = answered(*rows)
        right = [r for _, r, _ in rows]
        assert scoring.macro_f1(examples, chosen) == pytest.approx(
            metrics.f1_score(right, chosen, average="macro")
        )
        right, chosen = [r % 2 for r in right], [c % 2 for c in chosen]
        examples, chosen = answered(*[(None, r, c) for r, c in zip(right, chosen)])
        assert scoring.f1_of_answers(examples, chosen) == pytest.approx(
            metrics.f1_score(right, chosen, zero_division=0.0)
        )


WORDS = ("red", "green", "blue", "very", "of", "the", "sky", "is", "a")
COPA = [
    {"premise": f"the sky is {word}.", "choice1": word, "choice2": f"{other} {word} {other}",
     "question": ("cause", "effect")[i % 2], "label": i % 2, "idx": i}
    for i, (word, other) in enumerate(zip(WORDS, WORDS[3:] + WORDS[:3]))
]  # fmt: skip


def test_mean_and_sum_choose_differently(tiny, tmp_path):
    """The score is that of running each answer alone, by either rule."""
    folder = release(tmp_path, "copa", COPA, COPA)
    model, tokenizer, examples = loaded(tiny, task="copa", data=folder)
    model.eval()
    means = [[alone(model, e.prompt, c) for c in e.choices] for e in examples.held_out]
    sums = [
        [m * len(c) for m, c in zip(row, e.choices)] for row, e in zip(means, examples.held_out)
    ]
    chosen = {name: [row.index(max(row)) for row in rows]
              for name, rows in (("mean", means), ("sum", sums))}  # fmt: skip
    assert chosen["mean"] != chosen["sum"]
    for rule, want in chosen.items():
        got = scoring.score(
            model, examples.held_out, measures=examples.measures, rule=rule, batch_size=4,
            pad=tokenizer.pad_token_id, team=Ranks(), progress=iter,
        )  # fmt: skip
        items = "".join(str(int(c == e.right)) for c, e in zip(want, examples.held_out))
        assert got.items == items
        assert got.value == items.count("1") / len(want)
        arguments = ["--model", tiny, "--task", "copa", "--data", folder, "--steps", 1]
        assert run(*arguments, "--score", rule, "--out", tmp_path / rule) in (0, 1)
        assert result(tmp_path / rule)["before"]["items"] == items


def test_lm_evaluation_harness_gives_the_same_accuracy(tiny, tmp_path):
    """Its acc ranks by the sum, without an end token: every likelihood is the same."""
    models = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    from lm_eval.api.instance import Instance

    folder = release(tmp_path, "copa", COPA, COPA)
    model, tokenizer, examples = loaded(tiny, task="copa", data=folder)
    theirs = models.HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=2, device="cpu")
    questions, _ = superglue.read("copa", folder)
    by_prompt = {q.prompt: q for q in questions}
    with torch.no_grad():
        ours = scoring.log_likelihoods(model, examples.held_out, tokenizer.pad_token_id, "cpu")
    for example, got in zip(examples.held_out, ours):
        question = by_prompt[tokenizer.decode(example.prompt)]
        asked = [Instance("loglikelihood", {}, (question.prompt, choice), i)
                 for i, choice in enumerate(question.choices)]  # fmt: skip
        want = [value for value, _ in theirs.loglikelihood(asked, disable_tqdm=True)]
        assert got.tolist() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("task", superglue.TASKS)
def test_every_task_runs(tiny, tmp_path, capsys, task):
    given = paragraphs(6) if task == "multirc" else many(task, 12)
    folder = release(tmp_path, task, given, given)
    arguments = ["--model", tiny, "--task", task, "--data", folder, "--length", 200, "--steps", 2]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    record = result(tmp_path / "out")
    assert record["after"]["name"] == "accuracy"
    assert record["after"]["count"] == (30 if task == "multirc" else 12)
    more = {"multirc": {"exact match", "F1a"}, "cb": {"macro F1"}}
    assert set(record["after"]["more"]) == more.get(task, set())
    printed = capsys.readouterr().out
    for name, value in record["after"]["more"].items():
        assert f"{name} {value:.3f}" in printed


def test_a_task_is_learned(tiny, tmp_path):
    """BoolQ on a sky of a colour."""
    rows = []
    for i in range(96):
        colour = random.Random(i).choice(("red", "blue"))
        rows.append({"passage": f"sky {i} {colour}", "question": "red", "label": colour == "red"})
    folder = release(tmp_path, "boolq", rows[:64], rows[64:])
    assert run("--model", tiny, "--task", "boolq", "--data", folder, "--epochs", 20, "--lr", 0.3,
               "--batch-size", 16, "--out", tmp_path / "out") == 0  # fmt: skip
    record = result(tmp_path / "out")
    assert record["after"]["value"] > max(0.9, record["before"]["value"])
