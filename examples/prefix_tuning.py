"""Prefix-Tuning: two starts, the same steps. Random keys and values learn little in so few steps; those of a real text do."""

import featherweight as fw

base = fw.load_base()
task = fw.load_task("movie-reviews", test_rows=30)

for start in ("text", None):  # None: random, HF PEFT's default
    report = fw.train(base, task, fw.PrefixTuning(init_weights=start), steps=20)
    accuracy = fw.evaluate(base, task).accuracy
    print(
        f"starting from {start or 'random'}: loss {report.losses[0]:.2f} → {report.losses[-1]:.2f}, accuracy {accuracy:.1%}"
    )
    fw.detach(base.model)
