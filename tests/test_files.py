"""Names in their natural order."""

from pathlib import Path

from looplm.files import natural_key


def test_numbers_in_names_are_compared_as_numbers() -> None:
    names = ["step_1000", "step_200", "model_1000000.pt", "model_999999.pt", "a2b10", "a2b9", "a10b1", "a"]
    assert sorted(names, key=natural_key) == [
        *("a", "a2b9", "a2b10", "a10b1"),
        *("model_999999.pt", "model_1000000.pt"),
        *("step_200", "step_1000"),
    ]
    assert sorted([Path("x/10.txt"), Path("x/9.txt")], key=natural_key) == [Path("x/9.txt"), Path("x/10.txt")]


def test_the_natural_order_is_total_and_takes_any_number_of_digits() -> None:
    names = ["a01", "a1", "a001", "b", "", "1"]
    assert sorted(names, key=natural_key) == ["", "1", "a001", "a01", "a1", "b"]
    assert sorted(["1" * 6000, "9" * 5999], key=natural_key) == ["9" * 5999, "1" * 6000]
