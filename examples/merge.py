"""Merging: fold a trained LoRA into the weights; the model is then a plain one, for any tool that reads transformers."""

import featherweight as fw

base = fw.load_base(dtype="float32")  # in bfloat16 the merged weights are rounded, the adapter beside them is not
task = fw.load_task("movie-reviews", test_rows=60)

fw.train(base, task, fw.LoRA(r=8), steps=20)
beside = fw.evaluate(base, task)

fw.merge(base.model)
merged = fw.evaluate(base, task)
print(f"accuracy beside the base {beside.accuracy:.1%}, merged {merged.accuracy:.1%}")

fw.unmerge(base.model)  # every weight as it was, bit for bit; the adapter runs beside it again
assert fw.evaluate(base, task).predictions == beside.predictions

fw.merge(base.model, keep=False)  # for good
base.model.save_pretrained("runs/example-merged")
base.tokenizer.save_pretrained("runs/example-merged")
assert fw.evaluate(fw.load_base("runs/example-merged", dtype="float32"), task).accuracy == merged.accuracy
