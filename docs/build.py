"""Build the handbook into build/site:

    python docs/build.py            # then open build/site/index.html, or: python docs/build.py --serve

Pages are written into build/handbook first: those of `docs/` with their links, those that are generated (methods, references,
numbers), and the files of the repository that they link to. Then zensical builds the site; a warning is an error.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from handbook.contents import contents, summary
from handbook.links import ROOT, copy_wanted, relinked
from handbook.pages import pages

PAGES, SITE = ROOT / "build/handbook", ROOT / "build/site"


def stage() -> None:
    """Write every page, and what pages need, into build/handbook."""
    shutil.rmtree(PAGES, ignore_errors=True)
    docs, wanted, found = ROOT / "docs", set[Path](), pages()
    for place, text in found.items():
        target = PAGES / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relinked(text, docs / place, Path(place), wanted, found), encoding="utf-8")
    copy_wanted(wanted, PAGES)
    for folder in ("assets", "vendor"):
        shutil.copytree(docs / folder, PAGES / folder)
    (PAGES / "SUMMARY.md").write_text(summary(), encoding="utf-8")
    for _, there in contents():
        for page in [there] if isinstance(there, str) else [page for _, page in there]:
            if not (PAGES / page).exists():
                raise FileNotFoundError(f"the navigation names {page}, which no one writes")


def build() -> int:
    """Make the site of the pages; the exit code is zensical's, or 1 where it warned."""
    shutil.rmtree(SITE, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout + done.stderr, end="")
    (SITE / "SUMMARY.html").unlink(missing_ok=True)  # the navigation, which is no page
    warned = "warning" in (done.stdout + done.stderr).lower()
    return done.returncode or int(warned)


def serve(port: int) -> None:
    """Show the built site on this machine alone."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{port}/index.html (Ctrl-C ends it)")
        server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--serve", type=int, nargs="?", const=8000, metavar="PORT", help="show the site after building it"
    )
    arguments = parser.parse_args()
    stage()
    code = build()
    if arguments.serve and code == 0:
        serve(arguments.serve)
    sys.exit(code)
