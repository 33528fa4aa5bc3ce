"""Models of this project in the hands of their clients: tunix, qwix, optax and orbax.

Each cell adds a line to the Markdown table in the file that CLIENTS_TABLE names.
"""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")


def pytest_collection_modifyitems(items):
  for item in items:
    if item.path.parent == pathlib.Path(__file__).parent:
      # The clients use older names of jax and flax.
      item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  report = yield
  subject = getattr(item, "callspec", None) and item.callspec.params.get("subject")
  if subject and (table := os.environ.get("CLIENTS_TABLE")) and (report.when == "call" or report.failed):
    if hasattr(report, "wasxfail"):
      outcome, reason = "theirs", report.wasxfail
    elif report.failed:
      lines = str(call.excinfo.value if call.excinfo else report.longrepr).split("\n")
      outcome, reason = "ours", f"{call.excinfo.typename if call.excinfo else 'xpass'}: {lines[0]}"
    else:
      outcome, reason = "works", ""
    cells = (subject.case, subject.family, subject.placement, outcome, reason.replace("|", "\\|"))
    with pathlib.Path(table).open("a") as file:
      file.write(f"| {' | '.join(cells)} |\n")
  return report
