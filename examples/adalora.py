"""AdaLoRA: start with rank 12 everywhere, end with a mean of 8, and see which layers kept the most."""

import featherweight as fw
from featherweight.adapter import parts

base = fw.load_base()
task = fw.load_task("movie-reviews", test_rows=30)

fw.train(base, task, fw.AdaLoRA(init_r=12, target_r=8), steps=20)
print(f"accuracy {fw.evaluate(base, task).accuracy:.1%}")

ranks = {path: len(part.saved()["lora_E"]) for path, part in parts(base.model).items()}
print(f"mean rank {sum(ranks.values()) / len(ranks):.1f}")
for path in sorted(ranks, key=ranks.__getitem__)[:2] + sorted(ranks, key=ranks.__getitem__)[-2:]:
    print(f"{path}: {ranks[path]}")
fw.save(base.model, "runs/example-adalora")  # only the triplets that are left
