"""featherweight: fine-tune language models on the hardware you own.

    import featherweight as fw

    base = fw.load_base()                         # or a hub id, a folder, a .gguf file
    task = fw.load_task("movie-reviews")          # or a csv, jsonl, parquet file, a hub data set
    fw.attach(base.model, fw.LoRA(r=8))
    fw.train(base, task)
    print(fw.evaluate(base, task).accuracy)
    print(fw.predict(base, ["A waste of time."])[0].label)
    fw.save(base.model, "my-adapter")
    base = fw.load_adapted("my-adapter")          # another day: the base with the adapter on it

The public names are these and no others; each is loaded when it is first used, so that importing the package (and
the command line's `--help`) is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Part": "method", "Method": "method", "attach": "adapter", "detach": "adapter", "live": "adapter",
    "attached": "adapter", "count": "adapter", "rename": "adapter",
    "LoRA": "methods.lora", "PromptTuning": "methods.prompt_tuning", "PTuning": "methods.p_tuning",
    "PrefixTuning": "methods.prefix_tuning", "IA3": "methods.ia3", "AdaLoRA": "methods.adalora",
    "Base": "base", "load_base": "base",
    "Task": "task", "load_task": "task",
    "train": "api", "evaluate": "api", "predict": "api", "generate": "api",
    "save": "adapter_folder", "load": "adapter_folder", "load_adapted": "adapted",
    "merge": "merging", "unmerge": "merging",
    "InputError": "errors",
}  # fmt: skip
__all__ = ["__version__", *sorted(_WHERE)]

if TYPE_CHECKING:
    from .adapted import load_adapted
    from .adapter import attach, attached, count, detach, live, rename
    from .adapter_folder import load, save
    from .api import evaluate, generate, predict, train
    from .base import Base, load_base
    from .errors import InputError
    from .merging import merge, unmerge
    from .method import Method, Part
    from .methods.adalora import AdaLoRA
    from .methods.ia3 import IA3
    from .methods.lora import LoRA
    from .methods.p_tuning import PTuning
    from .methods.prefix_tuning import PrefixTuning
    from .methods.prompt_tuning import PromptTuning
    from .task import Task, load_task


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
