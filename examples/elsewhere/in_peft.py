"""The same adapter in HF PEFT: trained and saved here; loaded, and asked for a label, there."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import featherweight as fw

base = fw.load_base(dtype="float32")
fw.train(base, fw.load_task("movie-reviews", test_rows=30), fw.LoRA(r=8), steps=5)
fw.save(base.model, "runs/example-in-peft", base=base.name)
ours = fw.predict(base, ["A fine film."])[0]

# From here on without featherweight. `folder` is the hub id or path of the base; this is where the embedded default lies.
folder = base.model.name_or_path
theirs = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), "runs/example-in-peft"
)
theirs.eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
about = json.loads(Path("runs/example-in-peft/featherweight.json").read_text())  # how a row is written, and the labels

ids = tokenizer(about["template"].replace("{text}", "A fine film."), return_tensors="pt").input_ids
answers = [tokenizer(f" {label}").input_ids[0] for label in about["labels"]]  # each is one token of this tokenizer
with torch.no_grad():
    probabilities = theirs(ids).logits[0, -1, answers].softmax(-1).tolist()
print(dict(zip(about["labels"], probabilities, strict=True)))

torch.testing.assert_close(probabilities, list(ours.probabilities.values()), atol=1e-3, rtol=1e-3)
