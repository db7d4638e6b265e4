"""P-Tuning: a small network makes the prompt while it trains; only the prompt is saved."""

import json
from pathlib import Path

from safetensors import safe_open

import featherweight as fw

base = fw.load_base()
task = fw.load_task("movie-reviews", test_rows=30)

report = fw.train(base, task, fw.PTuning(encoder_hidden_size=128), steps=20)
print(f"{fw.count(base.model)[1]:,} parameters were trained; accuracy {fw.evaluate(base, task).accuracy:.1%}")

folder = fw.save(base.model, "runs/example-p-tuning", base=base.name)
with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
    print({name: tensors.get_slice(name).get_shape() for name in tensors.keys()})  # noqa: SIM118
print(json.loads(Path(folder / "adapter_config.json").read_text())["peft_type"])
