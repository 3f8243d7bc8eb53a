"""The committed rows of bench.memory: the paper's Table 1, and which model fits which card."""

import pytest

from lomo_kernels.memory import CATEGORIES, plan

pytest.importorskip("transformers", reason="transformers is not installed")

from bench import memory, record

ROWS = record.read("table1")
CARDS = record.read("cards")
ADAPTED = record.read("adapters")


def test_parameters_gradients_and_states_are_the_papers():
    compared = set()
    for row in ROWS:
        key = memory.STEPS[row["optimizer"]][0], memory._checkpointing(row["checkpointing"])
        if key in memory.PAPER:
            compared.add(key)
            for category, gib in list(zip(CATEGORIES, memory.PAPER[key]))[:3]:
                found = int(row[f"{category}_bytes"]) / memory.GIB
                assert found == pytest.approx(gib, abs=0.01), (row["optimizer"], category)
    assert compared == set(memory.PAPER)


@pytest.mark.parametrize("name", ["lomo", memory.REFERENCE])
def test_rows_are_what_the_plan_says(name):
    if name == memory.REFERENCE:
        pytest.importorskip("lomo_optim", reason="lomo-optim is not installed")
    (row,) = (r for r in ROWS if r["optimizer"] == name and r["checkpointing"] != "no")
    found = memory.step(memory.STEPS[name][1], "non_reentrant", "eager")
    assert found.peak.total == int(row["peak_bytes"])
    assert {c: int(row[f"{c}_bytes"]) for c in CATEGORIES} == found.maxima


def test_cards_are_what_the_plan_says():
    card = "llama-7b", memory.Card(1, 24)
    (row,) = (r for r in CARDS if memory.card_of(r) == card)
    found = memory.card_row(*card)
    assert {key: str(value) for key, value in found.items()} == {key: row[key] for key in found}


def test_every_model_has_every_card():
    listed = [memory.card_of(row) for row in CARDS]
    assert listed == [(model, card) for model in memory.MODELS for card in memory.CARDS]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_are_what_the_plan_says():
    pytest.importorskip("peft", reason="peft is not installed")
    assert [memory.way_of(row) for row in ADAPTED] == [
        (model, *way) for model in memory.ADAPTED for way in memory.WAYS
    ]
    row, model, way = ADAPTED[0], memory.ADAPTED[0], next(iter(memory.WAYS))
    found = memory.adapter_row(model, way)
    assert {key: str(value) for key, value in found.items()} == {key: row[key] for key in found}


def test_full_tuning_needs_what_lora_needs():
    """By lomo in two backwards, with LoRA beside it or without, within 2 %."""
    peaks = {memory.way_of(row): int(row["peak_bytes"]) for row in ADAPTED}
    lora, _, _, lomo, both, adamw = memory.WAYS
    for model in memory.ADAPTED:
        like_lora = pytest.approx(peaks[(model, *lora)], rel=0.02)
        assert peaks[(model, *lomo)] == like_lora
        assert peaks[(model, *both)] == like_lora
        assert peaks[(model, *adamw)] > 3 * peaks[(model, *both)]


@pytest.mark.parametrize("card", [memory.Card(8, 24), memory.Card(1, 24, "cpu")], ids=str)
def test_65b_fits_small_cards(card):
    """With what the context and the allocator want; the paper has 8 of them."""
    (row,) = (r for r in CARDS if memory.card_of(r) == ("llama-65b", card))
    assert int(row["device_memory_bytes"]) - int(row["least_peak_bytes"]) >= memory.GIB
    found = plan(
        "llama-65b", **memory.STEP, devices=card.devices, units="fine", offload=card.offload,
        strategy="two_backward",
    )  # fmt: skip
    assert found.peak == int(row["least_peak_bytes"])
    assert (found.host_peak or 0) == int(row["least_host_bytes"])
