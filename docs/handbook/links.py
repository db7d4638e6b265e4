"""Links between pages, and from a page to a file of the repository, so that they work in the site as they do beside the code.

A page under `docs/` keeps its links to other pages. A file elsewhere becomes a page of its own under `repository/`: Markdown as
it is, code as a listing, a folder as a list of what is in it, data as a file to download. Only what is linked is copied. A link that
begins with `/` leads from the repository's root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LISTED = {".py": "python", ".toml": "toml", ".sh": "bash", ".txt": "text", ".csv": "text", "": "text"}
SKIPPED = ("__pycache__", ".pyc")
FENCE = re.compile(r"^(```|~~~).*?^\1[^\S\n]*$", flags=re.S | re.M)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FRONT = "---\nsearch:\n  exclude: true\n---\n\n"


def place_of(path: Path) -> Path:
    """Where a file or folder of the repository stands among the pages."""
    inside = path.relative_to(ROOT)
    if inside.parts[0] == "docs" and path.suffix == ".md":
        return inside.relative_to("docs")
    if inside == Path("README.md"):
        return Path("index.md")
    there = Path("repository") / inside
    if path.is_dir():
        return there / "index.md"
    return there.with_name(there.name + ".md") if path.suffix in LISTED else there


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """The text with everything changed but its code blocks."""
    done, at = [], 0
    for fence in FENCE.finditer(text):
        done += [change(text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*done, change(text[at:])])


def relinked(text: str, source: Path, place: Path, wanted: set[Path], pages: Collection[str] = ()) -> str:
    """The page's text with links that hold at `place`; files that it needs are added to `wanted`. `pages` are there without a file."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        file, hash_, anchor = target.partition("#")
        path = Path(os.path.normpath(ROOT / file[1:] if file.startswith("/") else source.parent / file))
        if not path.exists() and place_of(path).as_posix() not in pages:
            raise FileNotFoundError(f"{source.relative_to(ROOT)}: the link {target} leads nowhere")
        goal = place_of(path)
        if goal.parts[0] == "repository":
            wanted.add(path)
        return f"[{words}]({os.path.relpath(goal, place.parent)}{hash_}{anchor})"

    return outside_fences(text, lambda part: LINK.sub(link, part))


def repository_page(path: Path, wanted: set[Path]) -> str:
    """A file or folder of the repository as a page."""
    inside = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        found = [p for p in sorted(path.iterdir()) if not p.name.endswith(SKIPPED)]
        wanted |= set(found)
        here = place_of(path).parent
        links = [f"* [{p.name}]({os.path.relpath(place_of(p), here)})" for p in found]
        return f"{FRONT}# {inside}\n\n" + "\n".join(links) + "\n"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return FRONT + relinked(text, path, place_of(path), wanted)
    fence = "`" * 6
    return f"{FRONT}# {inside}\n\n{fence}{LISTED[path.suffix]}\n{text.rstrip()}\n{fence}\n"


def copy_wanted(wanted: set[Path], pages: Path) -> None:
    """Write everything that was linked, and what that links to in turn."""
    done: set[Path] = set()
    while left := sorted(wanted - done):
        for path in left:
            target = pages / place_of(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix == ".md":
                target.write_text(repository_page(path, wanted), encoding="utf-8")
            else:
                target.write_bytes(path.read_bytes())
            done.add(path)
