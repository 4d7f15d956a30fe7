from __future__ import annotations

import re

import pytest

from tests.support import ROOT

TABLE = (ROOT / "tests" / "faults" / "README.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", TABLE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_of_the_table_is_there(file: str, name: str) -> None:
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert f"def {name}(" in text or not name


def test_no_fault_is_without_a_test() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [row for row in rows if not row.endswith("| test |")]
    assert len(rows) == 32 and all(".py" in row for row in rows)
