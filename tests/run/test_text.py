"""Local text is read as it is, and cut into windows."""

import numpy as np
import pytest

from flatjax.run import text


def test_files_and_folders_are_read_and_what_is_no_text_is_left_out(tmp_path):
    for name in ("a/one.py", "a/b/two.py", "three.py", "four.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}, Größe\n", encoding="utf-8")
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.py").write_text("\n")
    of_folder = text.read([tmp_path], "*.py")
    assert [(each.name, each.module) for each in of_folder] == [
        ("a/b/two.py", "a"),
        ("a/one.py", "a"),
        ("three.py", "three"),
    ]
    several = text.read([tmp_path / "a", tmp_path / "four.txt"], "*.py")
    assert [each.name for each in several] == ["a/b/two.py", "a/one.py", "four.txt"]
    with pytest.raises(SystemExit, match="which is not there"):
        text.read([tmp_path / "five.txt"])
    with pytest.raises(SystemExit, match=r"--text has .*bytes\.py, which is not UTF-8 at byte 0, 0xff"):
        text.read([tmp_path / "a", tmp_path / "bytes.py"])


def test_every_token_but_the_first_is_the_label_of_one_window():
    tokens = np.arange(32, dtype=np.int32)
    windows = text.windows(tokens, 5)
    assert windows.shape == (6, 6)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), tokens[1:31])
    np.testing.assert_array_equal(windows[:, :-1], windows[:, 1:] - 1)
    assert len(text.windows(tokens, 31)) == 1
    with pytest.raises(SystemExit, match="no window"):
        text.windows(tokens, 32)


def test_rows_are_taken_evenly_from_first_to_last():
    rows = np.arange(20)[:, None]
    np.testing.assert_array_equal(text.evenly(rows, 3)[:, 0], [0, 10, 19])
    np.testing.assert_array_equal(text.evenly(rows, 50), rows)
