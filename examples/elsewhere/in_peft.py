"""The same adapter in HF PEFT: trained and saved here, loaded there, the same answers."""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import featherweight as fw
from featherweight.demo import cache_folder

base = fw.load_base(dtype="float32")
fw.train(base, fw.load_task("movie-reviews", test_rows=30), fw.LoRA(r=8), steps=5)
fw.save(base.model, "runs/example-in-peft", base=base.name)

folder = cache_folder() / base.name  # where the embedded default lies; for others the hub id or folder you gave
theirs = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), "runs/example-in-peft"
)
ids = AutoTokenizer.from_pretrained(folder)("A fine film.", return_tensors="pt").input_ids
with torch.no_grad():
    torch.testing.assert_close(theirs.eval()(ids).logits, base.model(ids).logits, atol=1e-3, rtol=1e-3)
