"""What benchmarks print is kept in files, and the documentation finds in them what it plots."""

import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
HEADER = "- command: `python benchmarks/attention.py`\n- date: 2000-01-01\n"
ATTENTION = """\
some device

| T | pass | dense ms | blockwise ms | ratio |
|---|---|---|---|---|
| 512 | forward | 2.5 | 1.0 | 2.5 |
| 4096 | forward | 1,250.5 | 400.0 | 3.1 |

| another | table |
|---|---|
| 1 | 2 |
"""
FAKE = """\
import sys
print("| option |\\n|---|")
print(*(f"| {option} |" for option in sys.argv[1:]), sep="\\n")
print("progress", file=sys.stderr)
sys.exit("--fail" in sys.argv and 3)
"""


@pytest.fixture
def record(monkeypatch, tmp_path):
  """The script, with a benchmark that prints its options."""
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  module = importlib.import_module("record")
  (tmp_path / "fake.py").write_text(FAKE)
  monkeypatch.setitem(module.BENCHMARKS, "fake", (str(tmp_path / "fake.py"), ("--default",)))
  return module


@pytest.fixture
def plots(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "docs")
  return importlib.import_module("benchmark_plots")


def attention(plots):
  return next(plot for plot in plots.PLOTS if plot.name == "attention")


def test_what_a_benchmark_prints_is_printed_and_kept(record, plots, capfd, tmp_path):
  folder = tmp_path / "results"
  assert record.record("fake", ["--more", "a b"], folder) == 0
  printed = "| option |\n|---|\n| --default |\n| --more |\n| a b |\n"
  assert capfd.readouterr() == (printed, "progress\n")
  assert [file.name for file in folder.iterdir()] == ["fake.md"]
  header, kept = plots.split((folder / "fake.md").read_text())
  assert kept == printed
  facts = dict(re.findall(r"^- (\w+): (.+)$", header, re.M))
  assert list(facts) == ["command", "date", "machine", "versions"]
  assert facts["command"].endswith("fake.py --default --more 'a b'`")
  assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"])
  assert re.fullmatch(r".+, \d+ cores, \d+ GiB of memory", facts["machine"])
  assert "jax 0." in facts["versions"]
  assert "jaxlib 0." in facts["versions"]


def test_a_benchmark_that_fails_leaves_its_file(record, tmp_path):
  (tmp_path / "fake.md").write_text("before")
  assert record.record("fake", ["--fail"], tmp_path) == 3
  assert (tmp_path / "fake.md").read_text() == "before"


def test_the_status_of_a_benchmark_that_fails_is_the_scripts(record):
  with pytest.raises(SystemExit) as error:
    record.main(["fake", "--", "--fail"])
  assert error.value.code == 3


def test_a_file_that_cannot_be_written_stays_whole(record, monkeypatch, tmp_path):
  (tmp_path / "fake.md").write_text("before")
  before = set(tmp_path.iterdir())
  monkeypatch.setattr(record.os, "replace", lambda *paths: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    record.record("fake", [], tmp_path)
  assert (tmp_path / "fake.md").read_text() == "before"
  assert set(tmp_path.iterdir()) == before


def test_a_processor_without_a_name_is_its_architecture(record, tmp_path):
  (tmp_path / "named").write_text("processor: 0\nmodel name\t: One @ 2 GHz\n\nmodel name\t: One @ 2 GHz\n")
  assert record.processor(tmp_path / "named") == "One @ 2 GHz"
  assert record.processor(tmp_path / "none") == record.platform.machine()


def test_the_first_table_is_read(plots):
  first = {"T": "512", "pass": "forward", "dense ms": "2.5", "blockwise ms": "1.0", "ratio": "2.5"}
  rows = plots.table(plots.split(f"{HEADER}\n{ATTENTION}")[1])
  assert rows[0] == first
  assert [row["T"] for row in rows] == ["512", "4096"]
  assert plots.table("no | table\n|") == []


def test_points_of_a_plot(plots):
  assert plots.points(attention(plots), plots.table(ATTENTION), "file.md") == [
    ("512", "dense, forward", 2.5),
    ("512", "blockwise, forward", 1.0),
    ("4096", "dense, forward", 1250.5),
    ("4096", "blockwise, forward", 400.0),
  ]


def test_points_of_a_column_that_says_two_things(plots):
  plot = next(plot for plot in plots.PLOTS if plot.name == "compile")
  rows = plots.table("| variant | min s |\n|---|---|\n| 80 layers, a list | 9.5 |\n")
  assert plots.points(plot, rows, "file.md") == [("80", "a list", 9.5)]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (ATTENTION.replace("blockwise ms", "blocks"), "file.md: the table has no column 'blockwise ms'"),
    (ATTENTION.replace(" pass ", " way "), "file.md: the table has no column 'pass'"),
    (ATTENTION.replace("| 2.5 | 1.0", "| fast | 1.0"), "file.md: column 'dense ms' has a cell 'fast'"),
    ("nothing", "file.md: there is no table with the columns 'dense ms', 'blockwise ms'"),
  ],
)
def test_what_is_missing_is_named(plots, text, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    plots.points(attention(plots), plots.table(text), "file.md")


def test_the_page_shows_the_results_that_are_there(plots, tmp_path):
  (tmp_path / "attention.md").write_text(f"{HEADER}\n{ATTENTION}")
  assert plots.page(tmp_path).splitlines()[4:] == [
    "## Attention by length",
    "",
    *HEADER.splitlines(),
    "",
    "![Attention block by block and all at once](pictures/benchmark-attention.svg)",
    "",
    *ATTENTION.splitlines(),
  ]


def test_the_page_without_results_says_how_to_make_them(plots, tmp_path):
  _, _, text = plots.page(tmp_path).splitlines()
  assert "python benchmarks/record.py" in text
  assert list(plots.pictures(tmp_path)) == []


def test_each_benchmark_has_a_plot_and_a_section(record, plots):
  names = record.BENCHMARKS.keys() - {"fake"}
  assert {plot.result for plot in plots.PLOTS} == names
  assert names <= plots.titles().keys()
  assert all((ROOT / "benchmarks" / record.BENCHMARKS[name][0]).exists() for name in names)
