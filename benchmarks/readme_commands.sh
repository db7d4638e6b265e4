#!/usr/bin/env bash
# Both README commands as a newcomer runs them: a fresh clone, a fresh virtual environment and an empty cache for each; with times.
#
#     benchmarks/readme_commands.sh > benchmarks/results/readme_commands.txt    # or one of them: … 1
set -euo pipefail
repository="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset HF_HOME || true

echo "commit $(git -C "$repository" rev-parse --short HEAD), $(date +%F), $(python3 --version), $(nproc) cores, $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs)"
for block in ${*:-1 2}; do
  git clone --quiet "$repository" "$work/clone$block"
  cd "$work/clone$block"
  command="$(awk -v wanted="$block" '/^```/ { inside = !inside; if (inside) n++; next } inside && n == wanted' README.md)"
  python3 -m venv "$work/venv$block"
  export XDG_CACHE_HOME="$work/cache$block"
  start=$(date +%s)
  (source "$work/venv$block/bin/activate" && bash -euo pipefail -c "$command") > "$work/out$block" 2> "$work/err$block" || {
    tail -30 "$work/err$block" >&2
    tail -30 "$work/out$block" >&2
    exit 1
  }
  echo
  echo "\$ $command    # $(($(date +%s) - start)) s, the installation included"
  if [ "$block" = 1 ]; then
    grep -E '^(\||-)' "$work/out$block"
  else
    tail -1 "$work/out$block"
  fi
done
exit 0
