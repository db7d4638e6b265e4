"""Your own method: subclass Part and Method, and everything else — training, saving, counting — follows.

This one learns a bias after every linear layer that is named (BitFit's idea, as an adapter around the call).
"""

from dataclasses import dataclass

import torch

import featherweight as fw
from featherweight import sites


class BiasPart(fw.Part):
    def __init__(self, width):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(width))

    def forward(self, call, x):
        y = call(x)
        return y + self.bias.to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class Bias(fw.Method):
    peft_type, title, paper, learning_rate = "BIAS", "Bias", "Ben Zaken et al. 2021, arXiv:2106.10199", 1e-2
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")

    def sites(self, model):
        return sites.linear_sites(model, self.target_modules)

    def part(self, model, path):
        return BiasPart(sites.features(model.get_submodule(path))[1])


base, task = fw.load_base(), fw.load_task("movie-reviews", test_rows=30)
fw.train(base, task, Bias(), steps=20)
print(f"{fw.count(base.model)[1]:,} parameters; accuracy {fw.evaluate(base, task).accuracy:.1%}")
