"""LoRA in a few lines: train on the movie reviews, measure, save, load again."""

import featherweight as fw

base = fw.load_base()  # SmolLM2-135M-Instruct; or a hub id, a folder, a .gguf file
task = fw.load_task("movie-reviews", test_rows=30)  # or your own .csv, .jsonl, .parquet, a hub data set

report = fw.train(base, task, fw.LoRA(r=8), steps=20)
print(f"loss {report.losses[0]:.2f} → {report.losses[-1]:.2f}, {report.examples_per_second:.1f} rows a second")

score = fw.evaluate(base, task)
low, high = score.interval
print(f"accuracy {score.accuracy:.1%} [{low:.1%}, {high:.1%}], n = {score.n}")

fw.save(base.model, "runs/example-lora", base=base.name)  # HF PEFT's format: its PeftModel.from_pretrained reads it too
again = fw.load_adapted("runs/example-lora")  # another day: the base that the folder names, with the adapter on it
assert fw.evaluate(again, task).predictions == score.predictions
print(fw.predict(again, ["A waste of time."])[0].label)
