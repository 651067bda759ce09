"""CSV files: what a spreadsheet would compute is text, numbers are numbers."""

import csv
import io

import pytest

from logger.metrics_csv import csv_text


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-a.png", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "=A1*2"])
def test_no_cell_is_a_formula(text):
    for table in (csv_text(["path"], [{"path": text}]), csv_text([text], [])):
        cell = list(csv.reader(io.StringIO(table, newline="")))[-1][0]
        assert cell == "'" + text


def test_numbers_and_words_stay():
    table = csv_text(["a", "b"], [{"a": -0.5, "b": "-0.25"}, {"a": None, "b": "a=b"}, {"a": 0.0}])
    assert csv_text(["a"], [{"a": "b\r=1"}]) == 'a\n"b\r=1"\n', "a line end inside a cell begins no new one"
    assert table == "a,b\n-0.5,-0.25\n,a=b\n0.0,\n"
