"""The demo's documents: fixed, answerable, and scored by the number they ask for."""

from __future__ import annotations

import pytest

from sparsejax.cli.stories import story


def test_a_story_is_fixed_and_holds_its_answer_once():
    one = story(3, 12)
    assert one == story(3, 12) != story(4, 12)
    assert one.text.count(".") == 12
    assert one.text.count(f" The magic number for {one.noun} is {one.value}.") == 1
    assert one.prompt.endswith(f"\nQ: What is the magic number for {one.noun}?\nA:")


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (" NOUN VALUE.\n", True),
        (" VALUE", True),
        (" NOUN 99.", False),
        (" VALUE 999", False),
        ("\nVALUE\n1", True),
        ("", False),
    ],
)
def test_the_number_decides(reply, right):
    one = story(0, 8)
    assert one.answered_by(reply.replace("NOUN", one.noun).replace("VALUE", one.value)) is right
