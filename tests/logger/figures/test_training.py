"""Curves over epochs: what is drawn, and how lines are named."""
import pytest

from logger.figures.training import MOST_NAMED, compared


def history(last: float, epochs: int = 5) -> list[dict[str, float]]:
    return [{"epoch": float(e), "accuracy": last * e / epochs} for e in range(1, epochs + 1)]


def test_few_lines_are_named_at_their_ends():
    (axes,) = compared({f"run {n}": [history(n / 10)] for n in range(1, MOST_NAMED + 1)}).axes
    assert axes.get_legend() is None
    assert {text.get_text() for text in axes.texts} == {f"run {n}" for n in range(1, MOST_NAMED + 1)}


def test_many_lines_have_a_legend_in_order_of_their_last_values():
    most = MOST_NAMED + 2
    (axes,) = compared({f"run {n}": [history(n / 10), history(n / 10)] for n in range(1, most + 1)}).axes
    assert not axes.texts
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == [f"run {n}" for n in range(most, 0, -1)]
    by_name = {line.get_label(): line for line in axes.get_lines()}
    for handle, name in zip(axes.get_legend().legend_handles, texts):
        line = by_name[name]
        assert (handle.get_color(), handle.get_linestyle()) == (line.get_color(), line.get_linestyle())
        assert line.get_ydata()[-1] == pytest.approx(100 * int(name.split()[1]) / 10)
