"""The reference table's recipe as far as a machine without a hub goes: mt0-large's shape with random weights, batch 8, five methods.

    python benchmarks/reference_recipe.py --out benchmarks/results/reference      # a quarter of an hour on 2 cores, 12 GB of memory

What it shows: the numbers of parameters, which must equal the reference's to the digit, and that all five train, in how much memory. What
it cannot show: accuracy (the weights know nothing), and the reference's speed (that was a GPU's, on other data). With a hub and a GPU,
`featherweight compare --recipe recipes/reference.toml` is the whole of it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import featherweight as fw
from featherweight.results import read

REFERENCE = {
    "lora": (1_231_940_608, 2_359_296), "prompt_tuning": (1_229_622_272, 40_960), "p_tuning": (1_229_902_080, 320_768),
    "prefix_tuning": (1_230_564_352, 983_040), "ia3": (1_229_863_936, 282_624),
}  # fmt: skip
"""(total, trainable) of the reference table."""


def random_mt0(folder: Path) -> None:
    """A model of mt0-large's shape in bfloat16, with the default model's tokenizer: its words are the first of mt0's 250,112."""
    from transformers import MT5Config, MT5ForConditionalGeneration

    tokenizer = fw.load_base().tokenizer
    config = MT5Config(
        d_model=1024, d_ff=2816, d_kv=64, num_heads=16, num_layers=24, num_decoder_layers=24, vocab_size=250_112,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = MT5ForConditionalGeneration(config)
        model.lm_head.weight = torch.nn.Parameter(
            torch.randn(250_112, 1024) * 0.02
        )  # mt0's own head; transformers ties it
        model.config.tie_word_embeddings = False
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the model, compare, and check the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        random_mt0(Path(folder) / "mt0-large-shape")
        command = [sys.executable, "-m", "featherweight.cli", "compare", "--model", "mt0-large-shape", "--steps", str(args.steps),
                   "--batch-size", "8", "--test-rows", "16", "--references", "none", "--general-text", "none", "--dtype", args.dtype,
                   "--out", "run"]  # fmt: skip
        subprocess.run(command, check=True, cwd=folder)
        found = {line.name: (line.total_params, line.trainable_params) for line in read(Path(folder) / "run")}
        args.out.mkdir(parents=True, exist_ok=True)
        for file in (Path(folder) / "run").iterdir():
            if file.is_file() and file.name in ("table.md", "table.csv", "rows.jsonl"):
                shutil.copy(file, args.out / file.name)
    for name, counts in REFERENCE.items():
        print(
            f"{name}: {found[name][0]:,} / {found[name][1]:,}",
            "as in the reference" if found[name] == counts else f"NOT {counts}",
        )
    if found != REFERENCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
