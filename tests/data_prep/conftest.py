"""Small real files for the tests of data_prep."""

import json

import pytest


@pytest.fixture
def write_rows(tmp_path):
    """write_rows("rows.jsonl", rows) writes real files of each kind; bytes are written as they are."""

    def write(name, rows):
        path = tmp_path / name
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
        else:
            path.write_text("".join(line + "\n" for line in rows), encoding="utf-8")
        return str(path)

    return write
