"""Labelled pictures from a folder, a CSV, TFDS or arrays: names, labels and how to read each; no pixel is decoded."""

import csv
import errno
import math
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jft.data.decode import DecodeError, formats, quiet, to_rgb
from jft.errors import UserError, near, printable

VALUE = "value"  # a CSV's column of a quantity, or what its name begins with: value:NAME
COLUMNS = ("path", "label", VALUE, "split")
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# What others call the validation split and the column of paths, to be told what these are called here.
VALS = {"dev", "devel", "development", "eval", "evaluation", "validate"}
PATHS = {"file", "filename", "file_name", "filepath", "file_path", "image", "images", "image_path", "img", "picture"}
LITTER = {"thumbs.db", "desktop.ini", "__macosx"}
QUARANTINE = "quarantine.txt"
MAX_FILE = 1 << 29  # bytes; each thread that decodes holds a whole file
MAX_LABEL = 1000  # characters; a longer one is a quote that is not closed
MAX_MATRIX = 1 << 32  # bytes of the labels of pictures that have several

Excluded = list[tuple[str, str]]


@dataclass(frozen=True)
class Dataset:
    """Pictures and their labels, in an order that depends on nothing but their names.

    `labels` is int32 [n], indices into `classes`, or float32 [n, k] of zeros and ones where a picture has several.
    Where the labels are `quantities`, numbers to be predicted, it is float64 [n, k], and `classes` are their names.
    `read(i)` gives the encoded file as bytes, or the pixels as an array; `jft.data.decode` makes pictures of either.
    Names and classes that come from files hold no control characters: those stand as escapes, bytes that are no UTF-8
    too. `files` says where each picture lies, if it is a file.
    """

    names: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], bytes | np.ndarray]
    files: tuple[Path, ...] | None = None
    quantities: bool = False

    @property
    def several(self) -> bool:
        """Whether a picture can have several labels."""
        return self.labels.ndim == 2 and not self.quantities

    def __len__(self) -> int:
        return len(self.names)

    def select(self, indices: np.ndarray | Sequence[int]) -> "Dataset":
        """The examples at these indices, in their order."""
        chosen = np.asarray(indices, np.int64)
        read = self.read
        names = tuple(self.names[i] for i in chosen)
        files = tuple(self.files[i] for i in chosen) if self.files is not None else None
        return replace(self, names=names, labels=self.labels[chosen], read=lambda i: read(int(chosen[i])), files=files)


@dataclass(frozen=True)
class Splits:
    """What training, validation and test see; `excluded` names what was left out, with the reason.

    `root` is the folder that the names are relative to, `unknown` what its quarantine list names and is not there;
    `held_out` tells that the validation set was drawn from the training set here.
    """

    train: Dataset
    val: Dataset | None
    test: Dataset | None
    classes: tuple[str, ...]
    excluded: Excluded
    root: Path | None = None
    unknown: tuple[str, ...] = ()
    held_out: bool = False

    def sets(self) -> dict[str, Dataset]:
        """The splits there are, by name."""
        return {name: data for name, data in (("train", self.train), ("val", self.val), ("test", self.test)) if data}


def load(data: Any, *, seed: int = 0, val_fraction: float = 0.2) -> Splits:
    """Training, validation and test sets from one description of the data. Raises UserError.

    `data` is a folder (`train/ val/ [test/]` of class folders, or class folders alone), a CSV file with the columns
    `path,label[,split]` (several labels separated by `|`) or, where numbers are to be predicted, `path,value[,split]`
    (of several `value:NAME` each), `tfds:NAME[:CONFIG]`, a Dataset (see `arrays`), or a
    mapping from `train`, `val`, `test` to Datasets or to pairs (images, labels). Without a validation set, the
    fraction `val_fraction` of the training set becomes one, stratified by label, the same for the same seed (0: none).
    Pictures that `quarantine.txt` names (in the folder, or beside the CSV; see `read_quarantine`) are left out, after
    the split, so that all others stay where they are.

    >>> splits = load("hymenoptera_data")
    >>> splits.classes, len(splits.train), len(splits.val)
    (('ants', 'bees'), 245, 153)
    """
    found, excluded, root = _found(data)
    train = found["train"]
    _check_classes(train, data if isinstance(data, (str, Path)) else "The data")
    val = found.get("val")
    drawn = val is None and val_fraction > 0
    if drawn:
        alike = np.zeros(len(train), np.int32) if train.quantities else train.labels
        kept, held_out = stratified_split(alike, val_fraction, seed)
        if not len(held_out):
            raise UserError(
                f"{'There are no' if train.quantities else 'No class has'} two images, so none can be held out for "
                f"validation (there are {len(train)} in all). Add images, or give a validation set."
            )
        train, val = train.select(kept), train.select(held_out)
    splits = Splits(train, val, found.get("test"), train.classes, excluded, root, held_out=drawn)
    return splits if root is None else _without_quarantined(splits, root / QUARANTINE)


def to_score(data: Any) -> tuple[str, Dataset]:
    """The split to score a model on, and its name: `test` where there is one, else `val`, else `train`.

    `data` is what `load` takes; of a folder or a CSV the other splits play no part, and one class is enough. Pictures
    that `quarantine.txt` names are left out. Raises UserError.
    """
    found, _, root = _found(data, train=False)
    name = _scored(found)
    dataset, listed = found[name], read_quarantine(root / QUARANTINE) if root else {}
    dataset = dataset.select([i for i, picture in enumerate(dataset.names) if picture not in listed])
    if not len(dataset):
        raise UserError(f"{QUARANTINE} of {root} leaves no image of {name}.")
    return name, dataset


def _scored(splits: Collection[str]) -> str:
    return next(split for split in ("test", "val", "train") if split in splits)


def _found(data: Any, train: bool = True) -> tuple[dict[str, Dataset], Excluded, Path | None]:
    """The splits there are, what was left out, and the folder of the names; without `train` at least that to score."""
    if isinstance(data, str) and data.startswith("tfds:"):
        return *_tfds(data.removeprefix("tfds:"), train), None
    if isinstance(data, (str, Path)):
        path = Path(data).expanduser()
        if os.path.isdir(path):
            return *_folder(path, train), path
        if os.path.isfile(path):
            return *_csv(path, train), path.parent
        raise UserError(_no_such(path))
    if isinstance(data, Dataset):
        return {"train": data}, [], None
    if isinstance(data, Mapping):
        return _mapping(data, train), [], None
    raise UserError(
        f"data is a {type(data).__name__}; expected a folder, a CSV file, tfds:NAME, jft's arrays(images, labels), "
        'or {"train": (images, labels), "val": (images, labels)}.'
    )


def read_quarantine(file: Path) -> dict[str, str]:
    """What a quarantine list leaves out: names, as jft prints them, with the reason. Raises UserError.

    A line is a name, relative to the list's folder, and perhaps a tab and a reason; `# ` begins a comment. `./` before
    a name changes nothing: a picture in a folder `# x` is `./# x/0.png`.
    """
    if not os.path.isfile(file):
        return {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"{file} cannot be read: {reason}. It lists pictures to leave out, one a line.") from None
    listed = {}
    for line in lines:
        name, _, reason = line.partition("\t")
        if name.strip() and not line.startswith("# ") and line != "#":
            listed[name.strip().removeprefix("./")] = printable(reason.strip())
    return listed


def _without_quarantined(splits: Splits, file: Path) -> Splits:
    listed = read_quarantine(file)
    if not listed:
        return splits
    left: dict[str, Dataset] = {}
    excluded = list(splits.excluded)
    seen = {name for name, _ in excluded}
    for split, dataset in splits.sets().items():
        out = np.array([name in listed for name in dataset.names], bool)
        for i in np.flatnonzero(out):
            name = dataset.names[i]
            excluded.append((name, f"in {QUARANTINE}" + (f": {listed[name]}" if listed[name] else "")))
            seen.add(name)
        left[split] = dataset.select(np.flatnonzero(~out)) if out.any() else dataset
    train = left["train"].labels
    here = np.flatnonzero((train > 0).any(0)) if train.ndim == 2 else np.unique(train)
    missing = [] if splits.train.quantities else [c for i, c in enumerate(splits.classes) if i not in here]
    if missing:
        raise UserError(f"{file} leaves no training image of {_few(missing)}.")
    for split, dataset in left.items():
        if not len(dataset):
            raise UserError(f"{file} leaves no image of {split}.")
    unknown = tuple(name for name in listed if name not in seen)
    return replace(
        splits, train=left["train"], val=left.get("val"), test=left.get("test"), excluded=excluded, unknown=unknown
    )


def arrays(images: np.ndarray | Sequence, labels: Any, classes: Sequence[str] | None = None) -> Dataset:
    """A Dataset of pictures in memory. Raises UserError.

    `images` is [n, h, w] or [n, h, w, 1 | 3 | 4], or a sequence of such pictures of any sizes: uint8, uint16, or
    floating point within 0..1; or a sequence of Pillow's images. `labels` are indices into `classes`; without
    `classes` any integers or strings, whose sorted values become the classes; or a matrix [n, k] of zeros and ones
    where a picture has several labels. Floating point labels [n], or [n, k] that hold more than zeros and ones, are
    quantities, and `classes` their names.
    """
    pixels = images if isinstance(images, np.ndarray) else [_pixels(i, image) for i, image in enumerate(images)]
    if not len(pixels):
        raise UserError("There are no images: the array is empty.")
    pixels = _as_uint(pixels)
    given = np.asarray(labels)
    quantities = given.dtype.kind == "f" and (given.ndim == 1 or not np.isin(given, (0, 1)).all())
    indices, names = (_quantities if quantities else _label_indices)(given, classes)
    if len(indices) != len(pixels):
        raise UserError(f"There are {len(pixels)} images and {len(indices)} labels; expected one label for each image.")
    digits = len(str(len(pixels) - 1))
    places = tuple(f"{i:0{digits}d}" for i in range(len(pixels)))
    return Dataset(places, indices, names, lambda i: pixels[i], quantities=quantities)


def unlabelled(paths: Iterable[str | Path], classes: Sequence[str] = ()) -> tuple[Dataset, Excluded]:
    """Picture files, and those in folders, to predict on: every label is -1. Raises UserError for a missing path."""
    files: list[tuple[str, Path]] = []
    excluded: Excluded = []
    for given in paths:
        path = Path(given).expanduser()
        if os.path.isdir(path):
            inside, left_out = _pictures(path, shown(str(path)).rstrip("/"))
            files += inside
            excluded += left_out
        elif os.path.isfile(path):
            files.append((shown(str(path)), path))
        elif os.path.lexists(path):
            excluded.append((shown(str(path)), _no_file(path)))
        else:
            raise UserError(
                _no_such(path, "an image, a folder of images, a glob in quotes, or a CSV with a column path")
            )
    labels = np.full(len(files), -1, np.int32)
    return _files_dataset(files, labels, tuple(classes)), excluded


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), each sorted, with about `fraction` of every class held out.

    Every class of two or more has at least one on each side; a class of one is kept. The choice within a class
    depends on the seed, the class and its size alone. Rows of a 0/1 matrix are dealt label by label, the rarest
    first (Sechidis et al. 2011, "On the stratification of multi-label data").
    """
    if not 0 < fraction < 1:
        raise UserError(f"The fraction held out for validation is {fraction}; expected a number between 0 and 1.")
    n = len(labels)
    held_out = np.zeros(n, bool)
    if labels.ndim == 1:
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            if len(members) >= 2:
                count = min(max(int(fraction * len(members) + 0.5), 1), len(members) - 1)
                rng = np.random.default_rng([seed, int(label) + 1])  # + 1: -1 stands for an unknown label
                held_out[rng.permutation(members)[:count]] = True
    else:
        dealt = np.zeros(n, bool)
        # Rows without any label form a group of their own, dealt last.
        groups = np.concatenate([labels > 0, (labels <= 0).all(1, keepdims=True)], 1)
        for column in np.argsort(groups.sum(0), kind="stable"):
            members = np.flatnonzero(groups[:, column])
            free = members[~dealt[members]]
            if len(members) >= 2 and len(free):
                wanted = min(max(int(fraction * len(members) + 0.5), 1), len(members) - 1)
                count = min(max(wanted - int(held_out[members].sum()), 0), len(free))
                rng = np.random.default_rng([seed, int(column) + 1])
                held_out[rng.permutation(free)[:count]] = True
            dealt[members] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


# Folders


def _folder(root: Path, train: bool = True) -> tuple[dict[str, Dataset], Excluded]:
    """Without `train` the split to score alone, which need not have been trained on."""
    folders, files, odd = _entries(root)
    files = [f for f in files if f.name != QUARANTINE]
    splits: dict[str, Path] = {}
    excluded: Excluded = []
    # A class of trains holds images, not folders.
    named = [SPLITS[f.name.lower()] for f in folders if f.name.lower() in SPLITS and _children(f)[0]]
    if "train" in named or (not train and named and len(named) == len(folders)):
        for folder in folders:
            split = SPLITS.get(folder.name.lower())
            if split is None:
                excluded.append((shown(folder.name) + "/", f"neither train, val nor test{_called(folder.name)}"))
            elif split in splits:
                raise UserError(f"{root} has both {splits[split].name}/ and {folder.name}/; keep one of them.")
            else:
                splits[split] = folder
    else:
        splits["train"] = root
    main = "train" if train else _scored(splits)
    if not train:
        splits = {main: splits[main]}
    if splits[main] != root:
        excluded += [(shown(f.name), "not in a class folder") for f in files]
        excluded += [(shown(f.name), _no_file(f)) for f in odd]

    found: dict[str, dict[str, list[tuple[str, Path]]]] = {}
    for split, folder in splits.items():
        prefix = "" if folder == root else f"{shown(folder.name)}/"
        found[split], left_out = _class_folders(folder, prefix)
        excluded += left_out
        if split == main:
            _check_depth(folder, [[n.removeprefix(prefix) for n, _ in pictures] for pictures in found[split].values()])
    classes = tuple(sorted(name for name, pictures in found[main].items() if pictures))
    if not classes:
        raise UserError(_no_images(root, splits[main], excluded))
    for split, by_class in found.items():
        unknown = sorted(
            name for name in by_class if name not in found[main] or (by_class[name] and name not in classes)
        )
        missing = sorted(set(found[main]) - set(by_class)) if split == "val" else []
        if unknown or missing:
            raise UserError(
                f"The class folders of {splits[split]} and {splits['train']} differ: "
                + "; ".join(
                    f"{text} {', '.join(names)}"
                    for text, names in (("without training images:", unknown), (f"missing in {split}:", missing))
                    if names
                )
                + "."
                + (near(unknown[0], classes) if unknown else "")
                + " Every split needs the same class folders."
            )
        for name in sorted(n for n, pictures in by_class.items() if not pictures):
            where = name if splits[split] == root else f"{shown(splits[split].name)}/{name}"
            note = "class folder without images" + ("; the class is left out" if split == "train" else "")
            excluded.append((f"{where}/", note))
    datasets = {}
    for split, by_class in found.items():
        rows = sorted((name, path, label) for label, c in enumerate(classes) for name, path in by_class.get(c, ()))
        if rows:
            labels = np.array([label for _, _, label in rows], np.int32)
            datasets[split] = _files_dataset([(name, path) for name, path, _ in rows], labels, classes)
        else:
            raise UserError(_no_images(root, splits[split], excluded))
    return datasets, excluded


def _class_folders(folder: Path, prefix: str) -> tuple[dict[str, list[tuple[str, Path]]], Excluded]:
    """For each class folder its pictures (name, path). Names that only Unicode's normal forms tell apart are one."""
    folders, files, odd = _entries(folder)
    excluded: Excluded = [
        (prefix + shown(f.name), "not in a class folder") for f in files if prefix or f.name != QUARANTINE
    ]
    excluded += [(prefix + shown(f.name), _no_file(f)) for f in odd]
    classes: dict[str, list[tuple[str, Path]]] = {}
    for inside in folders:
        pictures, left_out = _pictures(inside, prefix + shown(inside.name))
        classes.setdefault(_nfc(shown(inside.name)), []).extend(pictures)
        excluded += left_out
    return classes, excluded


def _check_depth(folder: Path, by_class: Iterable[Sequence[str]]) -> None:
    """Raises UserError where the class folders hold nothing but the same folders: those may be the classes."""
    paths = [[name.split("/") for name in names] for names in by_class if names]
    below = {frozenset(words[1] if len(words) > 2 else "" for words in of_class) for of_class in paths}
    inner = sorted(next(iter(below))) if len(below) == 1 else []
    if len(inner) < 2 or "" in inner:
        return
    outer = [of_class[0][0] for of_class in paths]
    raise UserError(
        f"{folder} has the folders {_few(outer)}, and the pictures lie in {_few(inner)} in each of them, so either may "
        f"be the classes. If {inner[0]} is a class: name the outer folders train, val and test, or give one of them as "
        f"--data. If {outer[0]} is one: move its pictures up into it, or list all in a CSV file with path,label."
    )


def _pictures(folder: Path, name: str) -> tuple[list[tuple[str, Path]], Excluded]:
    """The pictures anywhere below a folder, and what else is there. A folder reached twice by links is read once."""
    pictures: list[tuple[str, Path]] = []
    excluded: Excluded = []
    seen: set[tuple[int, int]] = set()
    waiting = [(name, folder)]
    while waiting:
        name, folder = waiting.pop()
        try:
            status = folder.stat()
        except OSError as error:  # it was there when the folder around it was read
            excluded.append((f"{name}/", f"cannot be read: {error.strerror}"))
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, files, odd = _entries(folder)
        excluded += [(f"{name}/{shown(f.name)}", _no_file(f)) for f in odd]
        waiting += [(f"{name}/{shown(f.name)}", f) for f in reversed(folders)]
        for file in files:
            if _is_picture(file):
                pictures.append((f"{name}/{shown(file.name)}", file))
            else:
                excluded.append((f"{name}/{shown(file.name)}", "not an image"))
    return pictures, excluded


def _children(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files in a folder, each sorted by name, without the hidden and the system's litter."""
    return _entries(folder)[:2]


def _entries(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The folders, the files and what is neither: links that lead nowhere, pipes, sockets, devices."""
    folders: list[Path] = []
    files: list[Path] = []
    odd: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in LITTER:
                    continue
                path = Path(entry.path)
                # os.path's take a link in a circle for no file, where the entry's own raise.
                (folders if os.path.isdir(path) else files if os.path.isfile(path) else odd).append(path)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from None
    for paths in (folders, files, odd):
        paths.sort(key=lambda p: p.name)
    return folders, files, odd


def _no_file(path: Path) -> str:
    """What it is that is no file."""
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return "no permission to read it"
    except OSError as error:
        return "a link in a circle" if error.errno == errno.ELOOP else "a link that leads nowhere"
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return f"{kinds.get(stat.S_IFMT(mode), 'a device')}, not a file"


def _is_picture(path: Path) -> bool:
    """By its extension where Pillow knows it (decoding will tell), else by its content."""
    accepted = formats()
    if Image.registered_extensions().get(path.suffix.lower()) in accepted:
        return True
    try:
        with quiet(), Image.open(path, formats=accepted):
            return True
    except Exception:
        return False


def _files_dataset(files: list[tuple[str, Path]], labels: np.ndarray, classes: tuple[str, ...]) -> Dataset:
    paths = tuple(path for _, path in files)
    return Dataset(tuple(name for name, _ in files), labels, classes, lambda i: read_file(paths[i]), paths)


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises OSError for what is no file, or one of more than MAX_FILE bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(_no_file(path))
    if status.st_size > MAX_FILE:
        raise OSError(f"a file of {status.st_size:,} bytes; {MAX_FILE:,} are the limit")
    return path.read_bytes()


def shown(name: str) -> str:
    """A file name as text that can be printed and written anywhere, whatever its bytes are."""
    return printable(os.fsencode(name).decode("utf-8", "backslashreplace"))


def _no_such(path: Path, expected: str = "a folder of class folders, a CSV file, or tfds:NAME") -> str:
    try:
        path.stat()
    except PermissionError as error:
        return f"{path} cannot be read: {error.strerror}."
    except OSError:
        pass
    what = "file" if path.suffix else "folder or file"
    parent = path.parent
    close = near(path.name, [p.name for kind in _children(parent) for p in kind]) if os.path.isdir(parent) else ""
    return f"There is no {what} {path}.{close} Expected {expected}."


def _no_images(root: Path, train: Path, excluded: Excluded) -> str:
    folders, files = _children(train)
    if not folders and any(_is_picture(f) for f in files[:100]):
        return (
            f"{train} has images but no class folders. Put the images of each class into a folder named after it, "
            "or list them in a CSV file with the columns path,label."
        )
    seen = f" Left out: {_few([f'{name} ({reason})' for name, reason in excluded])}." if excluded else ""
    return f"{train} has no images in class folders.{seen} Expected {root}/CLASS/IMAGE or {root}/train/CLASS/IMAGE."


def _few(items: Sequence[str], n: int = 5) -> str:
    return ", ".join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")


# CSV


def _csv(path: Path, train: bool = True) -> tuple[dict[str, Dataset], Excluded]:
    """`path,label[,split]` or `path,value[,split]`; paths are relative to the CSV's folder, and stay in it.

    Without `train` the split to score alone, which need not have been trained on.
    """
    rows = csv_rows(path, "path,label[,split]", _lacks)
    root = Path(os.path.abspath(path.parent))
    quantities = _quantity_columns(rows[0][1]) if rows else {}
    several = not quantities and any("|" in row["label"] for _, row in rows)
    files: dict[str, tuple[tuple[Any, ...], str, Path]] = {}
    excluded: Excluded = []
    missing = []
    for line, row in rows:
        name, where = row["path"], f"{path}, line {line}"
        target = Path(os.path.normpath(root / name))
        if not target.is_relative_to(root):
            raise UserError(
                f"{where}: {name!r} lies outside {root}. Paths in a CSV file are relative to it and stay in its "
                "folder; move the CSV file to a folder that holds the images."
            )
        there = os.path.isfile(target)
        if not there:
            others = (Path(os.path.normpath(root / other)) for other in spellings(name))
            if other := next((o for o in others if o.is_relative_to(root) and os.path.isfile(o)), None):
                target, there = other, True
        name = target.relative_to(root).as_posix()
        labels: tuple[Any, ...]
        if quantities:
            labels = tuple(_number(row[column], name, where) for column, name in quantities.items())
        else:
            labels = tuple(sorted({_nfc(label.strip()) for label in row["label"].split("|")} - {""}))
        if long := next((label for label in labels if not quantities and len(label) > MAX_LABEL), None):
            raise UserError(
                f"{where}: a label has {len(long):,} characters, {long[:40]!r}…; {MAX_LABEL:,} are the limit. "
                "Is a quote not closed?"
            )
        if not labels and not several:
            raise UserError(f"{where}: {name} has no label.")
        split = SPLITS.get(row.get("split", "train").lower())
        if split is None:
            named = row["split"]
            raise UserError(f"{where}: the split is {named!r}; expected train, val or test{_called(named)}.")
        if name in files:
            if files[name][:2] != (labels, split):
                raise UserError(
                    f"{where}: {name} was listed before with another {'value' if quantities else 'label'} or split. "
                    "An image has one line" + ("." if quantities else "; several labels are separated by |.")
                )
            excluded.append((shown(name), "listed twice"))
            continue
        if not there:
            missing.append(name)
        files[name] = (labels, split, target)
    if not files:
        raise UserError(f"{path} lists no images: it has a header and no lines.")
    if missing:
        raise UserError(f"{path} lists {len(missing)} files that do not exist below {root}: {_few(missing)}.")
    present = {split for _, split, _ in files.values()}
    if train and "train" not in present:
        raise UserError(f"{path} has no training images: no line's split is train.")
    main = "train" if train else _scored(present)
    if not train:
        files = {name: about for name, about in files.items() if about[1] == main}
    if quantities:
        return _by_split(files, tuple(quantities.values()), lambda rows: np.array(rows, np.float64), True), excluded
    used = {split: {c for labels, s, _ in files.values() if s == split for c in labels} for split in SPLITS.values()}
    classes = tuple(sorted(used[main]))
    if not several and _are_quantities(classes):
        raise UserError(
            f"The labels of {path} are decimal numbers: {_few(classes)}. A label names a class. Where the numbers are "
            "what is to be predicted, name the column value instead of label; where they are names, write them as v0.5."
        )
    if several and 4 * len(files) * len(classes) > MAX_MATRIX:
        raise UserError(
            f"{path} has {len(classes):,} labels for {len(files):,} images, too many for a table of both. Is `label` "
            "the right column?"
        )
    for split in ("val", "test"):
        if unknown := sorted(used[split] - used[main]):
            raise UserError(
                f"{path}: the labels {_few(unknown)} of {split} have no training images.{near(unknown[0], classes)}"
            )
    index = {name: i for i, name in enumerate(classes)}

    def matrix(rows: list[tuple[str, ...]]) -> np.ndarray:
        if not several:
            return np.array([index[labels[0]] for labels in rows], np.int32)
        of_all = np.zeros((len(rows), len(classes)), np.float32)
        for i, labels in enumerate(rows):
            of_all[i, [index[label] for label in labels]] = 1
        return of_all

    return _by_split(files, classes, matrix), excluded


def _by_split(
    files: Mapping[str, tuple[tuple[Any, ...], str, Path]],
    classes: tuple[str, ...],
    matrix: Callable[[list[tuple[Any, ...]]], np.ndarray],
    quantities: bool = False,
) -> dict[str, Dataset]:
    """A Dataset of each split that a CSV's lines name, in the order of their names."""
    datasets = {}
    for split in ("train", "val", "test"):
        chosen = sorted((name, labels, target) for name, (labels, s, target) in files.items() if s == split)
        if chosen:
            found = [(shown(name), target) for name, _, target in chosen]
            labels = matrix([labels for _, labels, _ in chosen])
            datasets[split] = replace(_files_dataset(found, labels, classes), quantities=quantities)
    return datasets


def _quantity_columns(row: Mapping[str, str]) -> dict[str, str]:
    """The columns `value` and `value:NAME` of a CSV, with the names of their quantities."""
    return {c: _nfc(c.partition(":")[2].strip() or c) for c in row if c.partition(":")[0] == VALUE}


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: the {name} is {text[:40]!r}; a number is expected.")
    return value


def _are_quantities(labels: Iterable[str]) -> bool:
    """Whether all of these are numbers, and not all of them whole."""
    try:
        values = [float(label) for label in labels]
    except ValueError:
        return False
    return all(map(math.isfinite, values)) and any(value % 1 for value in values)


def _nfc(name: str) -> str:
    """A class's name: printable, and in one of Unicode's normal forms, as which systems write them differs."""
    return unicodedata.normalize("NFC", printable(name))


def spellings(path: str) -> Iterator[str]:
    """What a path may be called here that another system wrote: in Unicode's other normal forms, with / for \\."""
    for text in (path, path.replace("\\", "/")):
        yield from (text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text))


def _called(split: str) -> str:
    """What a split of this name is called here, where it is likely to be validation."""
    return f" ({split} is named val here)" if split.lower() in VALS else ""


def _lacks(header: Sequence[str]) -> str:
    """What columns of labelled pictures lack, as a sentence; empty where it is nothing."""
    wanted = ["label" in header, bool(_quantity_columns(dict.fromkeys(header, "")))]
    if "path" in header and sum(wanted) == 1:
        return ""
    return (
        "expected path,label[,split] in its first line, or where numbers are to be predicted path,value[,split]"
        f"{', not both: give one of them another name' if all(wanted) else ''}."
    )


def _likely(header: Sequence[str]) -> str:
    """What is likely to be wrong with a header that lacks columns: what separates them, or the name of the paths'."""
    if len(header) == 1 and (found := next((c for c in ";\t|" if c in header[0]), None)):
        return f" The separator is {'a tab' if found == chr(9) else found}; a comma is expected."
    named = next((c for c in header if c in PATHS), None)
    return f" The column {named!r} is to be named path." if named and "path" not in header else ""


def csv_rows(path: Path, columns: str, lacks: Callable[[Sequence[str]], str]) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells, by column, of each line of a CSV that is not blank. Raises UserError.

    `columns` says which are expected; `lacks` is given those that there are, and says what is wrong with them. No
    `path` is empty.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            words = [column.strip().partition(":") for column in next(reader, [])]
            header = [kind.lower() + colon + name for kind, colon, name in words]
            if twice := [c for c, n in Counter(header).items() if n > 1 and c.partition(":")[0] in COLUMNS]:
                raise UserError(f"{path} has the column {twice[0][:40]!r} twice.")
            if wrong := lacks(header):
                told = _few([c[:40] for c in header], 10) or "(none)"
                raise UserError(f"{path} has the columns {told}; {wrong}{_likely(header)}")
            rows = []
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(cells) != len(header):
                    raise UserError(
                        f"{where}: {len(cells)} values for {len(header)} columns. Values with a comma in them go in "
                        "double quotes."
                    )
                row = {c: v if c == "path" else v.strip() for c, v in zip(header, cells, strict=True)}
                if not row["path"].strip():
                    raise UserError(f"{where}: the path is empty.")
                if "\0" in row["path"]:
                    raise UserError(f"{where}: the path {row['path'][:80]!r} has a zero byte in it.")
                rows.append((reader.line_num, row))
            return rows
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text; expected a CSV file with the columns {columns}.") from None
    except csv.Error as error:
        raise UserError(f"{path} is no valid CSV file: {error}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


# Arrays


def _mapping(data: Mapping, train: bool) -> dict[str, Dataset]:
    found: dict[str, Dataset] = {}
    pairs = {}
    for key, value in data.items():
        split = SPLITS.get(str(key).lower())
        if split is None or split in pairs or split in found:
            raise UserError(f"data has the keys {', '.join(map(str, data))}; expected train, and perhaps val and test.")
        if isinstance(value, Dataset):
            found[split] = value
        elif isinstance(value, tuple) and len(value) == 2:
            pairs[split] = value
        else:
            raise UserError(f"data[{key!r}] is a {type(value).__name__}; expected a pair (images, labels).")
    if not pairs.keys() | found.keys() or (train and "train" not in pairs and "train" not in found):
        raise UserError(f"data has the keys {', '.join(map(str, data)) or '(none)'}, and no train.")
    if pairs:
        sets = [np.asarray(labels) for _, labels in pairs.values()]
        numbers = any(labels.dtype.kind == "f" for labels in sets)
        if found:
            classes = next(iter(found.values())).classes
            known = {name: i for i, name in enumerate(classes)}
        elif numbers or any(labels.ndim == 2 for labels in sets):
            known = None
        else:
            sets = [np.asarray(pairs["train"][1])] if "train" in pairs else sets
            values = np.unique(np.concatenate(sets)).tolist()
            classes, known = tuple(map(str, values)), {str(v): i for i, v in enumerate(values)}
        for split, (images, labels) in pairs.items():
            if known is None or not len(images):
                found[split] = arrays(images, labels)
                continue
            names = [str(v) for v in np.asarray(labels).tolist()]
            if unknown := sorted(set(names) - known.keys()):
                raise UserError(f"The labels {_few(unknown)} of {split} do not occur in train.")
            _label_indices(np.asarray(labels), None)  # refuses labels of the wrong kind
            found[split] = arrays(images, np.array([known[v] for v in names]), classes)
    if len({dataset.quantities for dataset in found.values()}) > 1:
        raise UserError("The labels of one of the given sets are quantities, those of another are not.")
    if len({dataset.classes for dataset in found.values()}) > 1:
        raise UserError(
            "The classes of the given sets differ: " + "; ".join(f"{s}: {_few(d.classes)}" for s, d in found.items())
        )
    return found


def _pixels(i: int, image: Any) -> np.ndarray:
    if not isinstance(image, Image.Image):
        return np.asarray(image)
    try:
        return np.asarray(to_rgb(image))  # as an array a palette's picture would be its indices
    except DecodeError as error:
        raise UserError(f"Image {i} cannot be used: {error}.") from None


def _as_uint(pixels: Any) -> Any:
    whole = pixels if isinstance(pixels, np.ndarray) else None
    kinds = {whole.dtype} if whole is not None else {image.dtype for image in pixels}
    if kinds <= {np.dtype(np.uint8), np.dtype(np.uint16)}:
        return pixels
    if all(kind.kind == "f" for kind in kinds):
        parts = [whole] if whole is not None else pixels
        if empty := [i for i, part in enumerate(parts) if not part.size]:
            raise UserError(f"Image {empty[0]} has no pixels: it is {list(pixels[empty[0]].shape)}.")
        if all(np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1 for p in parts):
            scaled = [np.rint(p * 255).astype(np.uint8) for p in parts]
            return scaled[0] if whole is not None else scaled
        raise UserError("The images are floating point beyond 0..1; expected uint8, uint16, or values within 0..1.")
    raise UserError(
        f"The images are {', '.join(sorted(map(str, kinds)))}; expected uint8, uint16, or floats within 0..1."
    )


def _label_indices(labels: np.ndarray, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if labels.ndim == 2:
        names = tuple(classes) if classes is not None else tuple(str(i) for i in range(labels.shape[1]))
        if len(names) != labels.shape[1]:
            raise UserError(f"The label matrix has {labels.shape[1]} columns for {len(names)} classes.")
        if not np.isin(labels, (0, 1)).all():
            raise UserError("The label matrix holds values other than 0 and 1.")
        return labels.astype(np.float32), names
    if labels.ndim != 1 or labels.dtype.kind not in "iubUO":
        raise UserError(
            f"The labels are {labels.dtype} {list(labels.shape)}; expected integers or strings [n], "
            "or zeros and ones [n, k]."
        )
    if labels.dtype.kind in "UO":
        labels = labels.astype(str)
    if classes is None:
        values, indices = np.unique(labels, return_inverse=True)
        return indices.astype(np.int32), tuple(str(v) for v in values.tolist())
    names = tuple(classes)
    if labels.dtype.kind == "U":
        index = {name: i for i, name in enumerate(names)}
        if unknown := sorted({str(v) for v in labels} - index.keys()):
            raise UserError(f"The labels {_few(unknown)} are not among the classes {_few(names)}.")
        return np.array([index[str(v)] for v in labels], np.int32), names
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise UserError(
            f"The labels reach from {labels.min()} to {labels.max()}; expected 0 to {len(names) - 1}, one per class."
        )
    return labels.astype(np.int32), names


def _quantities(labels: np.ndarray, names: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if labels.ndim not in (1, 2):
        raise UserError(f"The labels are {labels.dtype} {list(labels.shape)}; quantities are [n], or [n, k].")
    values = labels.astype(np.float64).reshape(len(labels), -1)
    if not np.isfinite(values).all():
        raise UserError(f"The label of image {int(np.argmin(np.isfinite(values).all(1)))} is no finite number.")
    k = values.shape[1]
    names = tuple(names or ([VALUE] if k == 1 else [f"{VALUE}{i}" for i in range(k)]))
    if len(names) != k:
        raise UserError(f"The labels have {k} columns for {len(names)} names of quantities.")
    return values, names


def _check_classes(train: Dataset, where: Any) -> None:
    if train.labels.ndim == 1 and len(train.classes) < 2:
        raise UserError(
            f"{where} has one class only, {train.classes[0]!r}; a classifier needs at least two."
            if train.classes
            else f"{where} has no classes."
        )
    doubled = [name for name, count in Counter(train.classes).items() if count > 1]
    if doubled:
        raise UserError(f"The class {doubled[0]!r} is named twice.")


# TFDS


def _tfds(given: str, train: bool = True) -> tuple[dict[str, Dataset], Excluded]:
    """A data set that TFDS has prepared, read without TensorFlow and without the code that prepared it."""
    folder = _tfds_folder(given)
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        kept_as = str(getattr(builder.info.file_format, "value", None))
        if kept_as not in ("array_record", "parquet"):
            raise UserError(
                f"The TFDS data in {folder} were prepared as {kept_as}, which cannot be read without TensorFlow. "
                f"Prepare them again with data_dir= another folder. {_tfds_help(given)}"
            )
        features = builder.info.features
        image, label = _tfds_keys(given, features, builder.info.supervised_keys, tfds.features)
        sources = builder.as_data_source(decoders={image: tfds.decode.SkipDecoding()})
    except UserError:
        raise
    except Exception as error:  # of many kinds, from the metadata of a damaged or foreign folder
        reason = str(error).partition("\n")[0]
        raise UserError(f"The TFDS data in {folder} cannot be read: {reason}. {_tfds_help(given)}") from None
    kind = features[label]
    several = not isinstance(kind, tfds.features.ClassLabel)
    classes = tuple((kind.feature if several else kind).names)
    found: dict[str, Dataset] = {}
    excluded: Excluded = []
    for name, source in sources.items():
        split = SPLITS.get(name)
        if split is None or split in found:
            excluded.append((name, f"neither train, val nor test{_called(name)}"))
            continue
        labels = [source[i][label] for i in range(len(source))]
        if several:
            matrix = np.zeros((len(labels), len(classes)), np.float32)
            for i, some in enumerate(labels):
                matrix[i, some] = 1
        else:
            matrix = np.array(labels, np.int32)
        digits = len(str(max(len(source) - 1, 0)))
        dataset = Dataset(
            tuple(f"{name}/{i:0{digits}d}" for i in range(len(source))), matrix, classes, _TfdsRead(source, image)
        )
        if not several and (matrix < 0).any():  # how TFDS marks an example whose label is kept secret
            excluded += [(dataset.names[i], "no label") for i in np.flatnonzero(matrix < 0)]
            dataset = dataset.select(np.flatnonzero(matrix >= 0))
        if len(dataset):
            found[split] = dataset
    if ("train" not in found) if train else not found:
        raise UserError(
            f"The TFDS data in {folder} has no training images: its splits are {', '.join(sources) or 'none'}."
        )
    return found, excluded


@dataclass(frozen=True)
class _TfdsRead:
    source: Any
    image: str

    def __call__(self, i: int) -> bytes | np.ndarray:
        return self.source[i][self.image]


def _tfds_folder(given: str) -> Path:
    """The prepared folder of `NAME[:CONFIG][:VERSION]`, or of `NAME/CONFIG`, or a path to one; its newest version."""
    if os.path.isfile(Path(given).expanduser() / "features.json"):
        return Path(given).expanduser()
    root = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    parts = [part for part in re.split("[:/]", given) if part]
    version = parts.pop() if len(parts) > 1 and re.fullmatch(r"\d+\.\d+\.\d+", parts[-1]) else None
    if not parts or len(parts) > 2 or any(part in (".", "..") for part in parts):
        raise UserError(f"tfds:{given} is no name of a TFDS data set; expected tfds:NAME or tfds:NAME:CONFIG.")
    folder = root.joinpath(*parts)
    if not os.path.isdir(folder):
        prepared = [f.name for f in _children(root)[0]] if os.path.isdir(root) else []
        raise UserError(
            f"There is no prepared TFDS data set in {folder}.{near(parts[0], prepared)} {_tfds_help(given)}"
        )
    versions = {f.name: f for f in _children(folder)[0] if (f / "features.json").is_file()}
    if version is not None and version not in versions:
        raise UserError(f"{folder} has no version {version}; it has {', '.join(sorted(versions)) or 'none'}.")
    if versions:
        return versions[version or max(versions, key=_version)]
    configs = [f.name for f in _children(folder)[0] if any((v / "features.json").is_file() for v in _children(f)[0])]
    if len(configs) == 1 and len(parts) == 1:
        return _tfds_folder(f"{parts[0]}:{configs[0]}")
    if configs and len(parts) == 1:
        raise UserError(
            f"tfds:{given} has several configs: {', '.join(configs)}. Choose one: tfds:{given}:{configs[0]}."
        )
    raise UserError(f"{folder} holds no prepared TFDS data set. {_tfds_help(given)}")


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", name))


def _tfds_keys(given: str, features: Any, supervised: Any, kinds: Any) -> tuple[str, str]:
    """The names of the picture and of its label among the features."""

    def is_label(kind: Any) -> bool:
        return isinstance(kind, kinds.ClassLabel) or (
            isinstance(kind, kinds.Sequence) and isinstance(kind.feature, kinds.ClassLabel)
        )

    images = [key for key, kind in features.items() if isinstance(kind, kinds.Image)]
    labels = [key for key, kind in features.items() if is_label(kind)]
    if supervised and len(supervised) == 2 and supervised[0] in images and supervised[1] in labels:
        return supervised[0], supervised[1]
    if len(images) != 1 or len(labels) != 1:
        raise UserError(
            f"tfds:{given} has the features {', '.join(features)}; expected one image and one class label, "
            f"found {len(images)} and {len(labels)}."
        )
    return images[0], labels[0]


def _tfds_help(given: str) -> str:
    return (
        "jft reads TFDS data without TensorFlow, but most sets need it once, to be prepared: `pip install tensorflow`, "
        f'then `python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{given.replace(':', '/', 1)}', file_format='array_record').download_and_prepare()\"`. "
        "Where the set lies elsewhere than in ~/tensorflow_datasets, name that folder in the variable TFDS_DATA_DIR."
    )
