"""Where weights come from: files and folders, Hugging Face repositories, addresses with a checksum, buckets."""

import hashlib
import importlib.util
import json
import logging
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jft.data.cache import cache_dir
from jft.errors import UserError, printable
from jft.files import sweep, writing
from jft.preprocess import Preprocess
from jft.weights import native
from jft.weights.transformers import NUMBERS, SEVERAL

# The names under which repositories and folders keep their weights, the better readable first.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
)
WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".ckpt")
CONFIGS = ("config.json", "preprocessor_config.json")
TIMEOUT = 10.0  # seconds until a silent network counts as none
PAUSE = 60.0  # seconds in which the Hub is not asked again in vain: one command locates the same weights more than once
_asked: dict[Path, float] = {}  # in vain, when
log = logging.getLogger(__name__)
_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}


@dataclass(frozen=True)
class Located:
    """A weight file on this machine, where it came from, and the JSON files that lay beside it."""

    path: Path
    origin: str
    configs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def preprocess(self) -> Preprocess | None:
        """What the JSON beside the weights says about the pictures, in timm's, Hugging Face's or our keys, if any."""
        try:
            if isinstance(cfg := self.configs.get("config.json", {}).get("pretrained_cfg"), dict):
                return _timm_preprocess(cfg).checked()
            if isinstance(own := self.configs.get("config.json", {}).get("preprocess"), dict):
                given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
                return Preprocess(**given).checked()
            if cfg := self.configs.get("preprocessor_config.json"):
                return _hf_preprocess(cfg).checked()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"The preprocessing in the JSON beside {self.path} cannot be read ({error!r}). Correct it, or move it "
                "away and state the preprocessing yourself."
            ) from None
        return None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The class names in the JSON beside the weights, in order, if it has any."""
        config = self.configs.get("config.json", {})
        names = config.get("label_names", config.get("classes"))
        if isinstance(names, list):
            described = config.get("label_descriptions")
            told = described if isinstance(described, dict) else {}
            return tuple(printable(str(told.get(str(n), n))) for n in names)
        by_index = config.get("id2label")
        if isinstance(by_index, dict) and set(by_index) == {str(i) for i in range(len(by_index))}:
            found = tuple(printable(str(by_index[str(i)])) for i in range(len(by_index)))
            # transformers writes LABEL_0, LABEL_1 … where it knows no names.
            return None if all(re.fullmatch(r"LABEL_\d+", n) for n in found) else found
        return None

    def answer(self, count: int) -> str | None:
        """What the JSON says that `count` outputs are, other than one label's: transformers' `SEVERAL` or `NUMBERS`."""
        config = self.configs.get("config.json", {})
        names = (config.get(key) for key in ("id2label", "label_names", "classes"))
        told = next((len(n) for n in names if isinstance(n, dict | list)), config.get("num_labels", count))
        for key, problem in (("quantities", NUMBERS), ("multi_label", SEVERAL)):
            if told == count and (config.get(key) is True or config.get("problem_type") == problem):
                return problem
        return None


def locate(source: str | Path) -> Located:
    """Find weights: a file, a folder, `hf:ORG/REPO[@REVISION][:FILE]`, `https://…#sha256=HEX` or `gs://BUCKET/FILE`.

    What is fetched is kept in a cache, which is looked into first. Raises UserError where there is nothing, or no
    network to fetch it.
    """
    text = str(source)
    if text.startswith("hf:"):
        return _from_hub(text)
    if text.startswith("https://"):
        return _from_address(text)
    if text.startswith("gs://"):
        return _from_bucket(text)
    if re.match(r"[a-z][a-z0-9+]+:", text) and not Path(text).exists():
        raise UserError(
            "Weights come from a file, a folder, hf:ORG/REPO, https://…#sha256=… or gs://BUCKET/FILE; "
            f"{text!r} is none of them."
        )
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            if native.described(_configs(path / "model")):  # a run's folder: its model
                path = path / "model"
            path = path / _choose([p.name for p in path.iterdir() if p.is_file()], f"the folder {path}")
        found = path.is_file()
    except PermissionError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}.") from None
    if not found:
        raise UserError(
            f"There is no weight file {path}. Weights come from a file, a folder, hf:ORG/REPO, https://…#sha256=… or "
            "gs://BUCKET/FILE."
        )
    return Located(path, str(path), _configs(path.parent))


def with_header(located: Located, metadata: Mapping[str, str]) -> Located:
    """The same weights, with what their file's own header says, where an export of ours wrote it."""
    try:
        about = json.loads(metadata["jft"])
    except (KeyError, ValueError, RecursionError):
        return located
    return replace(located, configs={"config.json": about}) if isinstance(about, dict) else located


def _choose(names: Iterable[str], where: str) -> str:
    names = sorted(names)
    for name in WEIGHT_FILES:
        if name in names:
            return name
    found = [n for n in names if n.endswith(WEIGHT_ENDINGS) and n != "predictions.npz"]  # what a run said of images
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"There are no weights in {where}: no file ends in {', '.join(WEIGHT_ENDINGS)}.")
    raise UserError(f"Which weights in {where}? It has {', '.join(found[:12])}. Name the file.")


def _configs(folder: Path) -> dict[str, Any]:
    configs = {}
    for name in CONFIGS:
        try:
            content = json.loads((folder / name).read_bytes())
        except OSError:
            continue
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{folder / name}, which lies beside weights, is no JSON, or damaged ({error}). Copy it again, or move "
                "it away."
            ) from None
        if isinstance(content, dict):
            configs[name] = content
    return configs


# --- Hugging Face


def _from_hub(uri: str) -> Located:
    parsed = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./ -]+))?", uri)
    if not parsed or ".." in (parsed[3] or "").split("/") or (parsed[3] or "").startswith("/"):
        raise UserError(f"{uri!r} is no Hugging Face source; expected hf:ORG/REPO, hf:ORG/REPO@REVISION or …:FILE.")
    repo, revision, wanted = parsed[1], parsed[2], parsed[3]

    # Imported here because it takes as long to import as a small model takes to load.
    import huggingface_hub as hub

    def cached(name: str) -> Path | None:
        path = hub.try_to_load_from_cache(repo, name, revision=revision)
        return Path(path) if isinstance(path, str) else None

    for name in (wanted,) if wanted else WEIGHT_FILES:
        if (path := cached(name)) and all(cached(_beside(name, shard)) for shard in _shards(path)):
            _complete(path, repo, name)
            return _located(path, repo)
    file = wanted or "model.safetensors"
    try:
        info = hub.HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
        names = [s.rfilename for s in info.siblings or []]
        name = wanted or _choose([n for n in names if "/" not in n], f"https://huggingface.co/{repo}")
        file = name

        def fetch(name: str) -> Path:
            return Path(hub.hf_hub_download(repo, name, revision=revision))

        for config in CONFIGS:
            if _beside(name, config) in names:
                fetch(_beside(name, config))
        path = fetch(name)
        for shard in _shards(path):
            fetch(_beside(name, shard))
    except UserError:
        raise
    except Exception as error:  # the client's own errors and those of two generations of its HTTP library
        raise UserError(_hub_failure(hub, repo, revision, file, error)) from error
    return _located(path, repo)


def _complete(path: Path, repo: str, name: str) -> None:
    """Fetch the JSON that belongs beside cached weights, of their commit: other libraries keep the weights alone."""
    import huggingface_hub as hub

    commit = _commit(path)

    def wanted() -> list[str]:
        # Neither in the cache nor known to be missing; the second only where the first tells no preprocessing.
        told = {"pretrained_cfg", "preprocess"} & _configs(path.parent).get(CONFIGS[0], {}).keys()
        names = [_beside(name, config) for config in CONFIGS[: 1 if told else None]]
        return [n for n in names if hub.try_to_load_from_cache(repo, n, revision=commit) is None]

    if not (missing := wanted()) or time.monotonic() - _asked.get(path, float("-inf")) < PAUSE:
        return
    try:
        # Asked first because it fails at once where there is no network, which a download waits for.
        hub.HfApi().model_info(repo, revision=commit, timeout=TIMEOUT)
        for config in missing:
            if config in wanted():
                try:
                    hub.hf_hub_download(repo, config, revision=commit)
                except hub.errors.EntryNotFoundError as error:  # which the cache then knows
                    if isinstance(error, hub.errors.LocalEntryNotFoundError):
                        raise
    except Exception as error:  # as in _from_hub
        _asked[path] = time.monotonic()
        log.warning(
            f"The cache {hub.constants.HF_HUB_CACHE} has {name} of {repo} without {' and '.join(wanted())}, which "
            f"cannot be fetched ({_reason(error)}), so what they say of preprocessing and classes is not known. With a "
            "network they are fetched once and kept."
        )


def card(located: Located) -> Path | None:
    """The model card beside weights of the Hub, fetched now, as only who copies them wants it; None where none is."""
    file = located.path.with_name("README.md")
    snapshot = next((p for p in file.parents if p.parent.name == "snapshots"), None)
    if file.is_file() or snapshot is None:
        return file if file.is_file() else None
    import huggingface_hub as hub

    repo, name = located.origin.removeprefix("hf:").partition("@")[0], file.relative_to(snapshot).as_posix()
    try:
        # Asked first because it fails at once where there is no network, which a download waits for.
        info = hub.HfApi().model_info(repo, revision=snapshot.name, timeout=TIMEOUT)
        if name not in [s.rfilename for s in info.siblings or []]:
            return None
        return Path(hub.hf_hub_download(repo, name, revision=snapshot.name))
    except Exception as error:  # as in _from_hub
        log.warning(
            f"The model card of {repo} is not in the cache and cannot be fetched ({_reason(error)}), so what is "
            "written says nothing of figures and licence. With a network it is fetched once and kept."
        )
        return None


def _beside(name: str, other: str) -> str:
    return f"{name.rpartition('/')[0]}/{other}".lstrip("/")


def _shards(path: Path) -> list[str]:
    if not path.name.endswith(".index.json"):
        return []
    try:
        return sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: it is no index of a sharded safetensors file.") from None


def _located(path: Path, repo: str) -> Located:
    return Located(path, f"hf:{repo}@{_commit(path)}:{path.name}", _configs(path.parent))


def _commit(path: Path) -> str:
    return next((p.name for p in path.parents if p.parent.name == "snapshots"), "main")


def _hub_failure(hub: Any, repo: str, revision: str | None, file: str, error: Exception) -> str:
    kinds = hub.errors
    at = f" at revision {revision}" if revision else ""
    if isinstance(error, kinds.GatedRepoError):
        return f"The repository {repo} wants its terms accepted: https://huggingface.co/{repo}, then `hf auth login`."
    if isinstance(error, kinds.RepositoryNotFoundError):
        return f"There is no public model repository {repo} on Hugging Face (for a private one, `hf auth login`)."
    if isinstance(error, kinds.RevisionNotFoundError):
        return f"The repository {repo} has no revision {revision}."
    if isinstance(error, kinds.EntryNotFoundError) and not isinstance(error, kinds.LocalEntryNotFoundError):
        return f"The repository {repo}{at} has no file {file}."
    return (
        f"Cannot fetch {file} of {repo}{at} from Hugging Face ({_reason(error)}), and the cache "
        f"{hub.constants.HF_HUB_CACHE} does not have it. With a network it is fetched once and kept. "
        f"Without: fetch it elsewhere (`hf download {repo} {file} config.json --local-dir FOLDER`) and pass "
        f"--weights FOLDER/{file}."
    )


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


# --- addresses


def _from_address(uri: str) -> Located:
    address, _, fragment = uri.partition("#")
    digest = fragment.removeprefix("sha256=").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digest) or not fragment.startswith("sha256="):
        raise UserError(
            f"{address} needs the SHA-256 of its content, so that what is fetched is what was meant: "
            f"{address}#sha256=HEX. `sha256sum FILE` prints that of a copy you trust."
        )
    path = _kept(digest, address.split("?")[0])
    if not path.is_file():
        try:
            _fetch(lambda: urllib.request.urlopen(address, timeout=TIMEOUT), address, digest, path)
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"Cannot fetch {address} ({error}), and {path} does not exist. Fetch it elsewhere and pass the file."
            ) from error
    return Located(path, address)


def _kept(key: str, address: str) -> Path:
    """The place in the cache of what an address holds."""
    name = re.sub(r"[^\w.-]", "_", address.rsplit("/", 1)[-1]).lstrip(".") or "weights"
    return cache_dir() / "weights" / key[:16] / name


def _fetch(opened: Callable[[], Any], address: str, digest: str, path: Path) -> None:
    """Copy what `opened` reads to `path`, which appears when it is whole and, where there is one, of this digest."""
    from huggingface_hub.utils import tqdm  # so that all downloads look alike, and are hushed alike

    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    seen, count = hashlib.sha256(), 0
    with writing(path) as part:
        with opened() as response, open(part, "wb") as out:
            size = getattr(response, "length", getattr(response, "size", None))  # of an HTTP response, of a file
            with tqdm(desc=path.name, total=size, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read(1 << 20):
                    seen.update(block)
                    count += out.write(block)
                    bar.update(len(block))
                # A connection that breaks off looks like an end to who reads block by block.
                if size is not None and count != size:
                    raise UserError(
                        f"{address} broke off after {count:,} of {size:,} bytes. Nothing was kept; try again."
                    )
        if digest and seen.hexdigest() != digest:
            raise UserError(f"{address} has the SHA-256 {seen.hexdigest()}, expected {digest}. Nothing was kept.")


# --- Google Cloud Storage


def _from_bucket(uri: str) -> Located:
    """An object of a bucket, through gcsfs and the machine's credentials where it is installed, else as the public."""
    address, _, fragment = uri.partition("#")
    digest = fragment.removeprefix("sha256=").lower()
    if not re.fullmatch(r"gs://[a-z0-9][\w.-]*/.*[^/]", address) or not re.fullmatch(
        r"(sha256=[0-9a-fA-F]{64})?", fragment
    ):
        raise UserError(f"{uri!r} is no object in a bucket; expected gs://BUCKET/FILE, or gs://BUCKET/FILE#sha256=HEX.")
    path = _kept(digest or hashlib.sha256(address.encode()).hexdigest(), address)
    if path.is_file():
        return Located(path, address)
    public = f"https://storage.googleapis.com/{urllib.parse.quote(address.removeprefix('gs://'))}"
    credentials = importlib.util.find_spec("gcsfs") is not None

    def opened() -> Any:
        if not credentials:
            return urllib.request.urlopen(public, timeout=TIMEOUT)
        import fsspec

        return fsspec.open(address, "rb").open()

    try:
        _fetch(opened, address, digest, path)
    except UserError:
        raise
    except Exception as error:  # the errors of gcsfs, of google-auth below it and of the HTTP library below that
        way = "is the machine logged in (`gcloud auth application-default login`)?"
        if not credentials:
            way = "a bucket that is not public needs gcsfs (pip install 'jft[gcs]') and a login."
        raise UserError(
            f"Cannot fetch {address} ({str(error)[:200] or type(error).__name__}): {way} Or fetch it elsewhere "
            f"(`gcloud storage cp {address} .`) and pass the file."
        ) from error
    return Located(path, address)


# --- what the JSON beside the weights says


def _timm_preprocess(cfg: Mapping[str, Any]) -> Preprocess:
    mode = cfg.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ValueError(f"crop_mode {mode!r}")
    _, height, width = cfg["input_size"]
    return Preprocess(
        size=(int(height), int(width)),
        crop_pct=float(cfg.get("crop_pct") or 0.875),
        interpolation=_filter(cfg.get("interpolation", "bicubic")),
        mean=tuple(float(v) for v in cfg["mean"]),
        std=tuple(float(v) for v in cfg["std"]),
        squash=mode == "squash",
    )


def _hf_preprocess(cfg: Mapping[str, Any]) -> Preprocess:
    cropped = cfg.get("do_center_crop", "crop_size" in cfg)
    kind = str(cfg.get("image_processor_type") or cfg.get("feature_extractor_type"))
    # ConvNeXt's and ResNet's: the crop's share is given instead of its size.
    by_share = kind.startswith("ConvNext") or (cfg.get("crop_pct") is not None and cfg.get("crop_size") is None)
    size = cfg["size"]
    if isinstance(size, int):
        size = {"shortest_edge": size} if cropped or by_share else {"height": size, "width": size}
    crop = cfg.get("crop_size", size) if cropped else size
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    squash = False
    if "shortest_edge" in size and (by_share or "height" not in crop):
        side = size["shortest_edge"]
        crop = {"height": side, "width": side}
        squash = by_share and side >= 384  # where that processor cuts nothing off
        share = float(cfg.get("crop_pct") or 224 / 256) if by_share and not squash else 1.0
    elif "shortest_edge" in size:
        share = min(crop["height"], crop["width"]) / size["shortest_edge"]
    else:
        share = min(crop["height"], crop["width"]) / min(size["height"], size["width"])
        # DeiT's processor squashes to 256×256 and cuts 224×224 out of that. Here the shorter side becomes 256, which
        # is the same for a square picture, and of others shows less of the longer side, undistorted.
        squash = (crop["height"], crop["width"]) == (size["height"], size["width"])
    plain = cfg.get("do_normalize", True) is False
    return Preprocess(
        size=(int(crop["height"]), int(crop["width"])),
        crop_pct=share,
        interpolation=_filter(_PIL_FILTERS.get(cfg.get("resample", 2), "")),
        mean=(0.0, 0.0, 0.0) if plain else tuple(float(v) for v in cfg["image_mean"]),
        std=(1.0, 1.0, 1.0) if plain else tuple(float(v) for v in cfg["image_std"]),
        squash=squash,
    )


def _filter(name: str) -> str:
    if name not in _PIL_FILTERS.values():
        raise ValueError(f"interpolation {name!r}")
    return name
