"""Merging: fold a trained LoRA into the weights; the model is then a plain one, for any tool that reads transformers."""

import torch

import featherweight as fw

base = fw.load_base()
task = fw.load_task("movie-reviews", test_rows=30)
weight = base.model.model.layers[0].self_attn.q_proj.weight
before = weight.clone()

fw.train(base, task, fw.LoRA(r=8), steps=10)
print(f"accuracy beside the base {fw.evaluate(base, task).accuracy:.1%}")

fw.merge(base.model)  # in bfloat16 the merged weights are rounded, which an adapter beside them is not
merged = fw.evaluate(base, task)
print(f"accuracy merged {merged.accuracy:.1%}; largest change of a weight {(weight - before).abs().max():.4f}")

fw.unmerge(base.model)  # as it was, bit for bit; the adapter runs beside it again
assert torch.equal(weight, before)

fw.merge(base.model, keep=False)  # for good
base.model.save_pretrained("runs/example-merged")
base.tokenizer.save_pretrained("runs/example-merged")
again = fw.load_base("runs/example-merged").model
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), base.model.parameters(), strict=True))
