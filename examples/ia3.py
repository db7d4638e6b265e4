"""(IA)³: a few thousand factors, and the two that the model came to use most differently from one."""

import featherweight as fw
from featherweight.adapter import parts

base = fw.load_base()
task = fw.load_task("movie-reviews", test_rows=30)

fw.train(base, task, fw.IA3(), steps=20)
print(f"{fw.count(base.model)[1]:,} factors trained; accuracy {fw.evaluate(base, task).accuracy:.1%}")

moved = {path: (part.state_dict()["ia3_l"] - 1).abs().max().item() for path, part in parts(base.model).items()}
for path in sorted(moved, key=moved.__getitem__, reverse=True)[:2]:
    print(f"{path}: up to {moved[path]:.3f} away from 1")
