"""A row that is null would end the process in the library that reads JSON."""

import pytest

from data import sources
from data.sources import CorpusError, open_corpus


@pytest.mark.parametrize("rows", [b"null", b"null\n" * 9, b' \n\tnull\n{"text": "a"}\n', b'{"text": "a"}\r\nnull\r\n'])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_a_null_row_is_one_line(tmp_path, monkeypatch, rows, block):
    monkeypatch.setattr(sources, "CHUNK", block)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows)
    with pytest.raises(CorpusError, match=r"rows.jsonl has a row that is null; each row must be a JSON object"):
        open_corpus(str(path))


def test_a_null_within_a_row_is_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": null}\n{"text": "nullify\\nnull"}\n{"text": "a", "b":null}\n')
    assert len(list(open_corpus(str(path)).pieces())) >= 2
