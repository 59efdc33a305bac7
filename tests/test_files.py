"""jft.files."""

import pytest

from jft.files import writing


def test_a_file_is_replaced_when_all_is_written(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with writing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_what_stood_there_stays_whatever_goes_wrong(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), writing(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_wanted(tmp_path):
    path = tmp_path / "none" / "a.txt"
    with pytest.raises(OSError) as error, writing(path) as part:
        part.write_text("new")
    assert error.value.filename == str(path)


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with writing(path) as one, writing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
