"""A few thousand damaged and made-up files to every reader; scripts/fuzz.py does the same for as long as one likes."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jft.errors import UserError
from jft.weights.readers import open_weights
from jft.weights.unpickle import Refused, unpickle

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer limits its memory as Linux does")


def python(*words: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-W", "error", *words], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_every_reader_takes_a_file_or_refuses_it(tmp_path):
    told = python(
        str(SCRIPT), "--executions", "500", "--seed", os.environ.get("FUZZ_SEED", "0"), "--out", str(tmp_path)
    )
    lines = [line for line in told.splitlines() if " faults 0" in line]
    assert len(lines) == 8 and told.endswith(" 0 faults\n") and not list(tmp_path.iterdir())
    # Both ways out are taken: a fuzzer whose files are all refused at once would find nothing.
    for line in lines:
        assert "read 0," not in line and "refused 0 " not in line, line


def test_a_fault_is_seen_kept_and_comes_again(tmp_path):
    harm = {
        "crash": "1 / 0",
        "execution": "import os; os.system('true')",
        "writing": "open(path.parent / 'x', 'w')",
        "memory": "bytearray(4 << 30)",
        "message": "raise fuzz.UserError('x' * 10_000)",
    }
    for kind, statement in harm.items():
        out = tmp_path / kind
        lines = (
            "import sys, fuzz",
            f"def read(path):\n    {statement}",
            "fuzz.TARGETS['csv'] = fuzz.Target(read, 'x.csv', lambda folder: fuzz.CSVS, fuzz.grammar_csv)",
            f"sys.argv = ['fuzz', 'csv', '--executions', '2', '--out', {str(out)!r}]",
            "sys.exit(fuzz.main())",
        )
        told = python("-c", "\n".join(lines), code=1)
        assert "csv-" in told and " 2 faults" in told and 1 <= len(list(out.iterdir())) <= 2, kind


# What the fuzzer found, so that it stays mended.


def test_odd_escapes_in_a_pickle_are_no_warning():
    with pytest.raises(Refused):
        unpickle(b"\x80\x02cbuil\\Stins\ndict\n)R.")


def test_an_array_of_elements_of_no_bytes_is_refused(tmp_path):
    header = b"{'descr': '|S0', 'fortran_order': False, 'shape': (0,), }\n"
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(UserError, match="elements of no bytes"):
        open_weights(tmp_path / "w.npz")


@pytest.mark.parametrize("length", [10_000, 1_000_000])
def test_what_is_long_is_told_short(tmp_path, length):
    with pytest.raises(Refused) as caught:
        unpickle(b"\x80\x02cos\n" + b"x" * length + b"\n)R.")
    assert len(str(caught.value)) < 500
    header = b'{"' + b"n" * length + b'": {"dtype": "F99", "shape": [], "data_offsets": [0, 4]}}'
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError) as refused:
        open_weights(tmp_path / "w.safetensors")
    assert len(str(refused.value)) < 2000
