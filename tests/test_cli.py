"""The command line: settings, complaints, and every verb end to end on tiny models."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import featherweight as fw
import tiny
from command import BARE, Cli, complaint
from featherweight import run, training
from featherweight.config import CompareConfig, TrainConfig, merge, to_toml
from featherweight.methods import METHODS
from featherweight.methods.options import build_method, parse_options
from featherweight.recipe import read_recipe

COLUMNS = [
    "Fine-Tuning Method", "Batch Size", "Number of total params", "Trainable params", "Required memory",
    "Speed (Train)", "Speed (Eval)", "Accuracy",
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA trained on the reviews by the command line, in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny.write(folder / "reviews.csv", tiny.reviews())
    args = ("train", "--model", llama, "--data", data, "--steps", 3, "--dtype", "float32", "--out", folder / "lora")
    done = process(*args)
    assert done.returncode == 0, done.stderr
    return folder / "lora"


def process(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "featherweight.cli", *map(str, args)],
        capture_output=True, text=True, check=False, env={**os.environ, **(env or {})},
    )  # fmt: skip


# --- help and start -------------------------------------------------------------------------------------------------


def test_help_answers_at_once() -> None:
    """Half a second on an idle machine. Here other tests are at work beside it, so it is compared with what it must not import."""

    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    pairs = [(seconds("-m", "featherweight.cli", "--help"), seconds("-c", "import torch")) for _ in range(2)]
    assert min(own for own, _ in pairs) < 0.5 * min(torch for _, torch in pairs)


@pytest.mark.parametrize("verb", ["", "compare", "train", "evaluate", "generate", "merge", "methods"])
def test_help_and_a_usage_error_import_nothing_heavy(verb: str) -> None:
    code = (
        "import sys; from featherweight.cli import main; sys.argv = ['featherweight', *sys.argv[1:]]\n"
        "try: main()\nfinally: print(*(m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules), '|')"
    )
    words = [verb] if verb else []
    for last in ("--help", "--nonsense"):
        done = subprocess.run(
            [sys.executable, "-c", code, *words, last], capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == (0 if last == "--help" else 2)
        assert done.stdout.splitlines()[-1] == " |".strip()


@pytest.mark.parametrize("verb", ["compare", "train", "evaluate", "generate", "merge", "methods"])
def test_every_verb_has_a_help_that_teaches(fw_cli: Cli, verb: str) -> None:
    result = fw_cli(verb, "--help")
    assert result.code == 0
    assert "Example" in result.out
    assert "featherweight" in result.out


def test_the_quantisers_remarks_are_kept_from_the_command_line(llama: Path) -> None:
    assert importlib.util.find_spec("torchao")
    done = process("methods", "--model", llama)
    assert done.returncode == 0
    assert done.stderr == ""


def test_every_common_flag_is_there() -> None:
    common = {"model", "data", "steps", "epochs", "batch_size", "lr", "max_length", "seed", "dtype", "device", "out"}
    assert common | {"method"} <= TrainConfig.model_fields.keys()
    assert common | {"methods"} <= CompareConfig.model_fields.keys()


@pytest.mark.parametrize("flag", ["--no-packing", "--no-lean"])
def test_what_is_on_by_itself_can_be_switched_off(fw_cli: Cli, reviews: Path, llama: Path, flag: str) -> None:
    done = fw_cli(
        "train", "--model", llama, "--data", reviews, "--steps", 1, "--dtype", "float32", flag, "--out", "mine"
    )
    assert done.code == 0, done.err
    assert f"{flag.removeprefix('--no-')} = false" in Path("mine/recipe.toml").read_text()


def test_the_version_is_printed(fw_cli: Cli) -> None:
    assert fw_cli("--version") == (0, f"{fw.__version__}\n", "")


def test_without_a_verb_the_help_is_shown(fw_cli: Cli) -> None:
    result = fw_cli()
    assert "compare" in result.out
    assert result.err == ""


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["train", "--bogus", "1"], "No such option: --bogus"),
        (["train", "--steps", "many"], "'--steps'"),
        (["train", "--steps"], "--steps"),
        (["train", "stray"], "stray"),
        (["trian"], "Did you mean 'train'?"),
    ],
)
def test_a_mistyped_command_line_is_one_line(fw_cli: Cli, args: list[str], wanted: str) -> None:
    assert wanted in complaint(fw_cli(*args))


def test_a_complaint_holds_nothing_that_a_terminal_obeys(fw_cli: Cli) -> None:
    said = complaint(fw_cli("train", "--set", "\x1b[2J=\udcff\x9b"))
    assert said.isprintable()
    assert "x1b[2J" in said
    assert len(complaint(fw_cli("plan", "--gpu", "x" * 90_000))) < 3000


# --- settings -------------------------------------------------------------------------------------------------------


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('steps = 7\nbatch-size = 3\nmethod = "ia3"\n[lora]\nr = 4\nlora_alpha = 2\n')
    recipe = read_recipe(str(tmp_path / "r.toml"))
    config = merge(TrainConfig, recipe, {"steps": 9, "options": {"lora": {"r": 16}}})
    assert (config.steps, config.batch_size, config.method, config.seed) == (9, 3, "ia3", 0)
    assert config.options == {"lora": {"r": 16, "lora_alpha": 2}}


def test_steps_from_one_side_replace_epochs_from_the_other() -> None:
    assert merge(TrainConfig, {"epochs": 2}, {"steps": 5}).epochs is None
    config = merge(TrainConfig, {"steps": 5}, {"epochs": 2.0})
    assert (config.steps, config.steps_for(40)) == (None, 10)
    assert merge(TrainConfig, {}, {}).steps_for(40) == 100


@pytest.mark.parametrize(("recipe", "flags"), [({}, {"steps": 1, "epochs": 1.0}), ({"steps": 1, "epochs": 1.0}, {})])
def test_steps_and_epochs_together_are_refused(recipe: dict[str, Any], flags: dict[str, Any]) -> None:
    with pytest.raises(fw.InputError, match="--steps or --epochs, not both"):
        merge(TrainConfig, recipe, flags)


def test_the_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = merge(
        CompareConfig,
        {},
        {
            "template": 'a "quoted" \\n {text}\tü', "lr": 1e-5, "epochs": 0.5,
            "options": {"lora": {"target_modules": ("q_proj", "v_proj"), "use_rslora": True, "lora_dropout": 0.25}},
        },
    )  # fmt: skip
    (tmp_path / "r.toml").write_text(to_toml(config))
    again = merge(CompareConfig, read_recipe(str(tmp_path / "r.toml")), {})
    assert again.model_dump(exclude={"options"}) == config.model_dump(exclude={"options"})
    assert build_method("lora", again.options["lora"]) == build_method("lora", config.options["lora"])


def test_set_takes_numbers_words_lists_and_none() -> None:
    options = parse_options(["r=16", "lora_dropout=0.5", "use_rslora=true", "target_modules=q_proj,v_proj"], "lora")
    assert build_method("lora", options["lora"]) == fw.LoRA(
        r=16, lora_dropout=0.5, use_rslora=True, target_modules=("q_proj", "v_proj")
    )
    options = parse_options(['lora.target_modules=["k_proj"]', "prefix_tuning.init_weights=none"], None)
    assert build_method("lora", options["lora"]) == fw.LoRA(target_modules=("k_proj",))
    assert build_method("prefix_tuning", options["prefix_tuning"]) == fw.PrefixTuning(init_weights=None)
    text = "prompt_tuning_init_text=Good, or bad?"
    options = parse_options([text], "prompt_tuning")
    assert build_method("prompt_tuning", options["prompt_tuning"]).prompt_tuning_init_text == "Good, or bad?"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("r", "write OPTION=VALUE"),
        ("=3", "write OPTION=VALUE"),
        ("lroa.r=3", "no such method; did you mean 'lora'?"),
        ("rank=3", "lora has no option 'rank'"),
        ("r=big", "lora: r must be int, not 'big'"),
        ("r=1.5", "lora: r must be int, not 1.5"),
        ("r=true", "lora: r must be int, not True"),
        ("use_rslora=1", "lora: use_rslora must be bool, not 1"),
        ("r=0", "r must be at least 1, not 0"),
        ("lora_dropout=-0.1", "lora_dropout must be in [0, 1), not -0.1"),
        ("target_modules=q_porj,v_proj", "this model has no module 'q_porj'; did you mean 'q_proj'"),
    ],
)
def test_a_wrong_option_of_a_method_is_refused(
    fw_cli: Cli, reviews: Path, llama: Path, setting: str, wanted: str
) -> None:
    message = complaint(fw_cli("train", "--model", llama, "--data", reviews, "--set", setting))
    assert wanted in message
    assert not Path("runs").exists()


@pytest.mark.usefixtures("no_model")
def test_a_comparison_checks_the_options_of_every_method_first(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    base = ("compare", "--model", llama, "--data", reviews)
    assert "r must be at least 1" in complaint(fw_cli(*base, "--methods", "ia3,lora", "--set", "lora.r=0"))
    assert "write METHOD.OPTION=VALUE" in complaint(fw_cli(*base, "--set", "r=4"))
    assert "no module 'nope'" in complaint(fw_cli(*base, "--set", "ia3.target_modules=nope,nope"))
    assert "--methods names none" in complaint(fw_cli(*base, "--methods", ","))


# --- bad input: one line, exit code 2, before the model loads -------------------------------------------------------


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("verb", ["train", "compare"])
@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--steps", "0"], "--steps: input should be greater than 0 (got 0)"),
        (["--steps", "3", "--epochs", "1"], "give --steps or --epochs, not both"),
        (["--batch-size", "0"], "--batch-size"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--test-fraction", "1"], "--test-fraction"),
        (["--max-length", "3"], "--max-length"),
        (["--dtype", "float12"], "--dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        (["--metric", "bleu"], "--metric"),
        (["--device", "cuda:77"], "device 'cuda:77' is not available here"),
        (["--device", "abacus"], "device 'abacus' is not available here"),
        (["--text-column", "txt"], "no column 'txt'; did you mean 'text'?; its columns are: text, label"),
        (["--test-data", "none.csv"], "there is no file none.csv"),
        (["--recipe", "none.toml"], "--recipe none.toml: No such file"),
        (["--model", "./none"], "'./none' is no folder or file here, and no hub id either"),
        (["--model", "none.gguf"], "model: there is no file none.gguf"),
        (["--model", "."], "has no config.json"),
    ],
)
def test_a_wrong_setting_is_one_line_before_anything_is_made(
    fw_cli: Cli, reviews: Path, llama: Path, verb: str, args: list[str], wanted: str
) -> None:
    message = complaint(fw_cli(verb, "--data", reviews, *([] if "--model" in args else ["--model", llama]), *args))
    assert wanted in message
    assert not Path("runs").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("verb", "flag"), [("train", "--method"), ("compare", "--methods")])
def test_an_unknown_method_is_refused_with_the_nearest_name(
    fw_cli: Cli, reviews: Path, llama: Path, verb: str, flag: str
) -> None:
    message = complaint(fw_cli(verb, "--model", llama, "--data", reviews, flag, "promt_tuning"))
    assert "unknown method 'promt_tuning'; did you mean 'prompt_tuning'" in message


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("verb", ["train", "compare", "evaluate"])
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", "bad.csv has no rows"),
        ("text,label\n", "bad.csv has no rows"),
        ("text,label\na,x,y\n", "bad.csv:2: 3 fields where the header has 2"),
        ("text,label\n" + "".join(f"t{i},x\n" for i in range(30)), "has one class only ('x')"),
        ("text,label\n,x\nb,y\n", "bad.csv:2: the column 'text' is empty"),
        ("foo,bar\na,b\n", "bad.csv has the columns foo, bar"),
    ],
)
def test_broken_data_is_one_line_before_the_model_loads(
    fw_cli: Cli, in_tmp: Path, llama: Path, verb: str, content: str, wanted: str
) -> None:
    (in_tmp / "bad.csv").write_text(content)
    assert wanted in complaint(fw_cli(verb, "--model", llama, "--data", "bad.csv"))
    assert not Path("runs").exists()


@pytest.mark.usefixtures("no_model")
def test_a_label_unseen_in_training_is_refused_before_the_model_loads(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    tiny.write(Path("test.csv"), [*tiny.reviews(2), {"text": "x", "label": "superb"}])
    message = complaint(fw_cli("train", "--model", llama, "--data", reviews, "--test-data", "test.csv"))
    assert "test.csv:4: the label 'superb' is not among those of the training rows" in message


@pytest.mark.usefixtures("no_model")
def test_labels_cannot_be_scored_where_there_are_none(fw_cli: Cli, in_tmp: Path, llama: Path) -> None:
    data = tiny.write(in_tmp / "a.jsonl", tiny.requests())
    assert "needs a label column" in complaint(fw_cli("train", "--model", llama, "--data", data, "--metric", "labels"))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("verb", ["train", "compare"])
def test_a_folder_in_use_is_refused_and_kept(fw_cli: Cli, reviews: Path, llama: Path, verb: str) -> None:
    Path("mine").mkdir()
    Path("mine/precious.txt").write_text("keep me")
    base = (verb, "--model", llama, "--data", reviews)
    assert "--out mine is in use" in complaint(fw_cli(*base, "--out", "mine"))
    assert "--out reviews.csv is a file" in complaint(fw_cli(*base, "--out", "reviews.csv"))
    assert [p.name for p in Path("mine").iterdir()] == ["precious.txt"]
    assert Path("mine/precious.txt").read_text() == "keep me"


@pytest.mark.usefixtures("no_model")
def test_a_place_that_cannot_be_written_is_refused(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    base = ("--model", llama, "--data", reviews, "--out", "reviews.csv/below/it")
    for verb in ("train", "compare", "evaluate"):
        assert "--out: cannot " in complaint(fw_cli(verb, *base))
    assert Path("reviews.csv").stat().st_size > 0


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("verb", ["evaluate", "generate", "merge"])
def test_a_missing_or_broken_adapter_is_refused_before_the_model_loads(
    fw_cli: Cli, reviews: Path, adapter: Path, verb: str
) -> None:
    more = {"evaluate": ("--data", reviews), "generate": ("--prompt", "x"), "merge": ()}[verb]
    assert "there is no folder none" in complaint(fw_cli(verb, *more, "--adapter", "none"))
    Path("empty").mkdir()
    assert "has no adapter_config.json" in complaint(fw_cli(verb, *more, "--adapter", "empty"))
    shutil.copytree(adapter, "odd")
    Path("odd/adapter_config.json").write_text('{"peft_type": "LORAX"}')
    assert "did you mean 'LORA'" in complaint(fw_cli(verb, *more, "--adapter", "odd"))


@pytest.mark.parametrize("verb", ["evaluate", "generate", "merge"])
def test_an_adapter_of_another_base_is_refused_by_name(
    fw_cli: Cli, reviews: Path, adapter: Path, llama: Path, tmp_path: Path, verb: str
) -> None:
    other = tiny.save_llama(tmp_path / "other", seed=1)
    more = {"evaluate": ("--data", reviews), "generate": ("--prompt", "x"), "merge": ()}[verb]
    message = complaint(fw_cli(verb, *more, "--adapter", adapter, "--model", other))
    assert f"was made for another base: {llama}" in message


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("steps = ", "is not valid TOML"),
        ("stpes = 3", "'stpes' is not a setting here; did you mean 'steps'"),
        ("steps = 'many'", "--steps: input should be a valid integer"),
        ("steps = 2\nepochs = 1", "not both"),
        ("[lorra]\nr = 3", "the table [lorra] is no method; did you mean 'lora'"),
        ("[lora]\nr = 0", "r must be at least 1"),
    ],
)
def test_a_wrong_recipe_is_refused(fw_cli: Cli, reviews: Path, recipe: str, wanted: str) -> None:
    Path("r.toml").write_text(recipe)
    assert wanted in complaint(fw_cli("train", "--data", reviews, "--recipe", "r.toml"))


def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused_before_training(
    fw_cli: Cli, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, llama: Path
) -> None:
    monkeypatch.setattr("featherweight.tokens.Writer.answer", lambda self, text: [7])
    monkeypatch.setattr(training, "fit_with_bar", lambda *_: pytest.fail("it was trained"))
    data = tiny.write(in_tmp / "a.csv", tiny.reviews())
    result = fw_cli("train", "--model", llama, "--data", data, "--dtype", "float32")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("featherweight: error: two labels have the same tokens")


def test_the_methods_verb_refuses_wrong_options_and_missing_models(fw_cli: Cli, in_tmp: Path, llama: Path) -> None:
    assert "r must be at least 1" in fw_cli("methods", "--set", "lora.r=0").err
    assert "there is no file none.json" in complaint(fw_cli("methods", "--model", "none.json"))


# --- end to end -----------------------------------------------------------------------------------------------------


def test_methods_lists_every_method_with_its_paper(fw_cli: Cli) -> None:
    result = fw_cli("methods")
    assert result.code == 0
    for name in METHODS:
        assert f"\n{name} " in f"\n{result.out}"
    assert result.out.count("arXiv:") == len(METHODS)


def test_methods_counts_parameters_without_weights(fw_cli: Cli, llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path / "only-a-config.json")
    result = fw_cli("methods", "--model", tmp_path / "only-a-config.json", "--set", "lora.r=2")
    base = fw.load_base(str(llama), dtype="float32")
    fw.attach(base.model, fw.LoRA(r=2))
    total, trained = fw.count(base.model)
    assert f"{total:,} parameters, {trained:,} of them trained" in result.out


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "adalora"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_train_evaluate_generate(
    fw_cli: Cli, reviews: Path, request: pytest.FixtureRequest, family: str, method: str
) -> None:
    model = request.getfixturevalue(family)
    trained = fw_cli(
        "train", "--model", model, "--data", reviews, "--method", method, "--steps", 4, "--dtype", "float32", "--out", "mine"
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert trained.out.startswith("accuracy ")
    assert "n = 6" in trained.out
    assert {p.name for p in Path("mine").glob("[!.]*")} == {
        "adapter_config.json", "adapter_model.safetensors", "featherweight.json", "recipe.toml", "run.json"
    }  # fmt: skip
    assert json.loads(Path("mine/featherweight.json").read_text())["labels"] == ["bad", "fine", "very bad"]

    held_out = fw_cli("evaluate", "--adapter", "mine", "--data", reviews, "--dtype", "float32")
    assert held_out.out.split(",")[0] == trained.out.split(",")[0]  # the same rows, the same accuracy: it was reloaded

    every = fw_cli(
        "evaluate", "--adapter", "mine", "--data", reviews, "--split", "all", "--dtype", "float32", "--out", "p.jsonl"
    )  # fmt: skip
    assert every.code == 0, every.err
    assert "n = 60" in every.out
    lines = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [f"{reviews}:{i}" for i in range(2, 62)]
    assert [line["answer"] for line in lines] == [r["label"] for r in tiny.reviews()]
    assert {line["prediction"] for line in lines} <= set(tiny.LABELS)

    one = fw_cli("generate", "--adapter", "mine", "--prompt", "a film", "--max-new-tokens", 4, "--dtype", "float32")
    assert one.code == 0, one.err
    two = fw_cli(
        "generate", "--adapter", "mine", "--max-new-tokens", 4, "--dtype", "float32", stdin="a film\n\na plot\n"
    )
    assert two.out.startswith(one.out)


def test_evaluating_refuses_a_label_that_the_adapter_does_not_know(fw_cli: Cli, in_tmp: Path, adapter: Path) -> None:
    data = tiny.write(in_tmp / "new.csv", [*tiny.reviews(5), {"text": "x", "label": "superb"}])
    message = complaint(fw_cli("evaluate", "--adapter", adapter, "--data", data, "--split", "all"))
    assert f"{data}:7: the label 'superb' is not among" in message


def test_evaluating_takes_labels_from_the_adapter_not_from_the_file(fw_cli: Cli, in_tmp: Path, adapter: Path) -> None:
    data = tiny.write(in_tmp / "new.csv", [{"text": f"t{i}", "label": "bad"} for i in range(4)])
    result = fw_cli("evaluate", "--adapter", adapter, "--data", data, "--split", "all", "--dtype", "float32")
    assert result.code == 0, result.err
    assert "n = 4" in result.out


def test_the_bare_model_is_evaluated_on_every_row(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    result = fw_cli("evaluate", "--model", llama, "--data", reviews, "--split", "all", "--dtype", "float32")
    assert result.code == 0, result.err
    assert "n = 60" in result.out


def test_a_written_template_is_used_with_its_line_breaks(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    args = ("--model", llama, "--data", reviews, "--template", "Review: {text}\\nIs it:", "--dtype", "float32")
    assert fw_cli("train", *args, "--steps", 1, "--out", "mine").code == 0
    assert json.loads(Path("mine/featherweight.json").read_text())["template"] == "Review: {text}\nIs it:"
    seen: list[str] = []
    original = run.evaluate_with_bar

    def watch(base: Any, task: Any, *more: Any) -> Any:
        seen.append(task.template)
        return original(base, task, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate_with_bar", watch)
        assert fw_cli("evaluate", *args).code == 0
        assert fw_cli("evaluate", "--adapter", "mine", "--data", reviews, "--dtype", "float32").code == 0
    assert seen == ["Review: {text}\nIs it:"] * 2


def test_an_adapter_of_another_tool_brings_its_base_along(
    fw_cli: Cli, reviews: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapter, "theirs")
    Path("theirs/featherweight.json").unlink()
    result = fw_cli("evaluate", "--adapter", "theirs", "--data", reviews, "--dtype", "float32")
    assert result.code == 0, result.err


def test_generate_writes_an_adapters_prompts_as_they_were_trained(
    fw_cli: Cli, adapter: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def watch(base: Any, prompts: list[list[int]], *_: Any) -> list[str]:
        read.extend(base.tokenizer.decode(p) for p in prompts)
        return ["fine"]

    monkeypatch.setattr("featherweight.api.generate_from", watch)
    assert fw_cli("generate", "--adapter", adapter, "--prompt", "a film").out == "fine\n"
    fw_cli("generate", "--adapter", adapter, "--prompt", "a film", "--raw")
    fw_cli("generate", "--model", llama, "--prompt", "a film")
    assert read == ["<bos>a film\nLabel:", "<bos>a film", "<|user|>\na film<eos>\n<|assistant|>\n"]


def test_merge_writes_a_plain_model_that_says_what_the_adapter_said(
    fw_cli: Cli, in_tmp: Path, adapter: Path, llama: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = fw.load_base(str(llama), dtype="float32")
    plain = base.model(torch.arange(5, 25)[None]).logits
    fw.load(base.model, adapter)
    wanted = base.model(torch.arange(5, 25)[None]).logits
    done = fw_cli("merge", "--adapter", adapter, "--out", "merged")
    assert done.code == 0
    assert f"merged into {llama} in float32; transformers loads it from merged" in done.err
    assert {p.name for p in Path("merged").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not list(Path("merged").glob("adapter*"))
    model, loading = AutoModelForCausalLM.from_pretrained("merged", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    logits = model(torch.arange(5, 25)[None]).logits
    assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (logits - plain).abs().max() > 1e-3 * plain.abs().max()
    words = AutoTokenizer.from_pretrained("merged")
    assert words("a fine film").input_ids == base.tokenizer("a fine film").input_ids
    assert words.chat_template == base.tokenizer.chat_template
    assert fw_cli("generate", "--model", "merged", "--prompt", "x", "--max-new-tokens", 2).code == 0


def test_merge_keeps_the_type_that_the_base_is_stored_in(fw_cli: Cli, in_tmp: Path, adapter: Path, llama: Path) -> None:
    import torch
    from safetensors.torch import load_file

    half = fw.load_base(str(llama), dtype="bfloat16")
    half.model.save_pretrained("half")
    half.tokenizer.save_pretrained("half")
    # A rounded base differs from the adapter's own only in values: its fingerprint is taken in bfloat16.
    for options, wanted in (((), torch.bfloat16), (("--dtype", "float32"), torch.float32)):
        out = f"merged-{wanted}"
        done = fw_cli("merge", "--adapter", adapter, "--model", "half", "--out", out, *options)
        assert done.code == 0, done.err
        assert {t.dtype for t in load_file(f"{out}/model.safetensors").values()} == {wanted}


@pytest.mark.usefixtures("no_model")
def test_merge_refuses_what_cannot_be_merged_before_the_model_loads(
    fw_cli: Cli, in_tmp: Path, adapter: Path, llama: Path
) -> None:
    assert "give --adapter" in complaint(fw_cli("merge", "--model", llama))
    base = fw.load_base(str(llama), dtype="float32")
    for method in (fw.PromptTuning(num_virtual_tokens=2), fw.PrefixTuning(num_virtual_tokens=2)):
        fw.attach(base.model, method, encode=lambda _: [5])
        fw.save(base.model, "prompt", base=str(llama))
        fw.detach(base.model)
        message = complaint(fw_cli("merge", "--adapter", "prompt", "--out", "merged"))
        assert f"{method.title} cannot be merged" in message
        assert not Path("merged").exists()
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    assert "--out full is in use" in complaint(fw_cli("merge", "--adapter", adapter, "--out", "full"))


def test_the_saved_recipe_repeats_the_run(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    first = fw_cli(
        "train", "--model", llama, "--data", reviews, "--steps", 5, "--batch-size", 4, "--seed", 3, "--dtype", "float32",
        "--set", "r=4", "--set", "target_modules=q_proj,k_proj", "--out", "one",
    )  # fmt: skip
    saved = tomllib.loads(Path("one/recipe.toml").read_text())
    assert (saved["steps"], saved["batch_size"], saved["seed"], saved["lora"]["r"]) == (5, 4, 3, 4)
    assert all(line.strip() in first.err for line in Path("one/recipe.toml").read_text().splitlines())
    again = fw_cli("train", "--recipe", "one/recipe.toml", "--out", "two")
    assert again.out == first.out
    losses = [json.loads(Path(f"{name}/featherweight.json").read_text())["losses"] for name in ("one", "two")]
    assert losses[0] == losses[1]
    weights = [Path(f"{name}/adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_without_out_every_run_gets_a_folder_of_its_own(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    for _ in range(2):
        fw_cli("train", "--model", llama, "--data", reviews, "--steps", 1, "--dtype", "float32")
    assert sorted(p.name for p in Path("runs").iterdir()) == ["lora-001", "lora-002"]


def test_compare_takes_adalora_and_saves_its_ranks(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    result = fw_cli(
        "compare", *BARE, "--model", llama, "--data", reviews, "--methods", "adalora", "--steps", 10, "--dtype", "float32",
        "--set", "adalora.target_r=3", "--out", "table",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "| AdaLoRA |" in result.out
    config = json.loads(Path("table/adalora/adapter_config.json").read_text())
    assert (config["tinit"], config["tfinal"], config["total_step"]) == (1, 3, 10)
    assert sum(map(sum, config["rank_pattern"].values())) == 3 * len(config["rank_pattern"])


@pytest.mark.usefixtures("no_model")
def test_steps_that_leave_no_time_to_allocate_ranks_are_refused(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    result = fw_cli(
        "compare", "--model", llama, "--data", reviews, "--methods", "lora,adalora", "--steps", 9,
        "--set", "adalora.tinit=5", "--set", "adalora.tfinal=5",
    )  # fmt: skip
    assert "tinit=5 and tfinal=5 leave none of 9 steps" in complaint(result)


def test_compare_prints_and_saves_the_table(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    result = fw_cli(
        "compare", *BARE, "--model", llama, "--data", reviews, "--methods", "lora,ia3", "--steps", 3, "--dtype", "float32",
        "--out", "table",
    )  # fmt: skip
    assert result.code == 0, result.err
    table = Path("table/table.md").read_text()
    assert table in result.out
    first, more = ([r for r in part.splitlines() if r.startswith("|")] for part in table.split("\n\n- "))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in first]
    assert rows[0] == COLUMNS
    assert [r[0] for r in rows[2:]] == ["LoRA", "(IA)³"]
    with Path("table/table.csv").open(newline="") as f:
        written = list(csv.reader(f))
    assert [row[: len(COLUMNS)] for row in written] == [rows[0], *rows[2:]]
    assert [row[len(COLUMNS) :] for row in written] == [
        [c.strip() for c in line.strip("|").split("|")][1:] for line in (more[0], *more[2:])
    ]
    lines = [json.loads(line) for line in Path("table/rows.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["lora", "ia3"]
    for cells, line in zip(rows[2:], lines, strict=True):
        assert cells[1] == "8"
        assert cells[2] == f"{line['total_params']:,}"
        assert cells[3].startswith(f"{line['trainable_params']:,} (")
        assert cells[3].endswith(" %)")
        assert cells[4].endswith(" MiB")
        assert "it/s" in cells[5]
        assert "ex/s" in cells[5]
        assert "it/s" in cells[6]
        assert "n = 6" in cells[7]
        assert len(line["losses"]) == 3
        assert len(line["predictions"]) == 6
    assert lines[0]["lr"] == fw.LoRA.learning_rate
    assert lines[1]["lr"] == fw.IA3.learning_rate
    for name in ("lora", "ia3"):
        fw.load(fw.load_base(str(llama), dtype="float32").model, Path("table") / name)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_instructions_are_learned_and_compared_by_exact_match(
    fw_cli: Cli, in_tmp: Path, request: pytest.FixtureRequest, family: str
) -> None:
    data = tiny.write(in_tmp / "a.jsonl", tiny.requests())
    model = request.getfixturevalue(family)
    trained = fw_cli("train", "--model", model, "--data", data, "--steps", 2, "--dtype", "float32", "--out", "mine")
    assert trained.code == 0, trained.err
    result = fw_cli("evaluate", "--adapter", "mine", "--data", data, "--dtype", "float32", "--out", "p.jsonl")
    assert "metric exact_match" in result.out
    assert "n = 3" in result.out
    lines = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    right = sum(line["answer"] == line["prediction"] for line in lines)
    assert result.out.startswith(f"accuracy {100 * right / 3:.1f} %")


def test_classification_can_be_compared_by_exact_match_too(fw_cli: Cli, reviews: Path, adapter: Path) -> None:
    result = fw_cli(
        "evaluate", "--adapter", adapter, "--data", reviews, "--metric", "exact_match", "--dtype", "float32"
    )
    assert "metric exact_match" in result.out


def test_cut_texts_are_counted_and_reported(fw_cli: Cli, in_tmp: Path, llama: Path) -> None:
    rows = [{**r, "text": r["text"] * (8 if i < 20 else 1)} for i, r in enumerate(tiny.reviews())]
    data = tiny.write(in_tmp / "long.csv", rows)
    test = tiny.write(
        in_tmp / "test.csv", [{"text": "never seen " * 30, "label": "bad"}, {"text": "short", "label": "fine"}]
    )
    result = fw_cli(
        "train", "--model", llama, "--data", data, "--test-data", test, "--steps", 1, "--max-length", 32, "--dtype", "float32"
    )  # fmt: skip
    assert "20 of 60 rows were longer than 32 tokens and were cut" in result.err
    assert "1 of 2 test rows were longer than 32 tokens and were cut" in result.err


# --- Ctrl-C and divergence ------------------------------------------------------------------------------------------


def interrupted(*args: object, when: str) -> tuple[int, str]:
    """Start a command line, press Ctrl-C when a line with `when` has appeared, and return its code and stderr."""
    command = [sys.executable, "-u", "-m", "featherweight.cli", *map(str, args)]

    def hear_it() -> None:  # a suite that was started in the background would pass on that it ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=hear_it) as child:
        assert child.stderr is not None
        seen = []
        for line in child.stderr:
            if when in line and not any(when in earlier for earlier in seen):  # once: rich may print a line again
                child.send_signal(signal.SIGINT)
            seen.append(line)
        return child.wait(timeout=60), "".join(seen)


def test_ctrl_c_while_training_leaves_a_loadable_adapter(reviews: Path, llama: Path) -> None:
    code, err = interrupted(
        "train", "--model", llama, "--data", reviews, "--steps", 1200, "--dtype", "float32", "--out", "mine",
        when="train: 300/1200",
    )  # fmt: skip
    assert code == 130, err
    assert "interrupted after " in err
    assert "Traceback" not in err
    assert fw.load(fw.load_base(str(llama), dtype="float32").model, "mine").peft_type == "LORA"
    assert 300 <= json.loads(Path("mine/featherweight.json").read_text())["steps"] < 1200


def test_ctrl_c_in_a_comparison_keeps_the_finished_rows(reviews: Path, llama: Path) -> None:
    code, err = interrupted(
        "compare", *BARE, "--model", llama, "--data", reviews, "--methods", "ia3,lora,p_tuning", "--steps", 400,
        "--dtype", "float32", "--out", "table", when="LoRA: train: 100/400",
    )  # fmt: skip
    assert code == 130, err
    assert "Traceback" not in err
    rows = [json.loads(line) for line in Path("table/rows.jsonl").read_text().splitlines()]
    assert [r["name"] for r in rows] == ["ia3"]
    table = Path("table/table.md").read_text()
    assert "(IA)³" in table
    assert "interrupted during LoRA" in table
    for name in ("ia3", "lora"):
        fw.load(fw.load_base(str(llama), dtype="float32").model, Path("table") / name)
    assert not Path("table/p_tuning").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_adapter(
    fw_cli: Cli, reviews: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featherweight.engine import update

    calls = []
    original = update.labelled_loss

    def third_step_is_nan(model: Any, batch: Any, labelled: int) -> Any:
        calls.append(1)
        return original(model, batch, labelled) * (float("nan") if len(calls) == 4 else 1)  # the first is the rehearsal

    monkeypatch.setattr(update, "labelled_loss", third_step_is_nan)
    result = fw_cli("train", "--model", llama, "--data", reviews, "--steps", 9, "--dtype", "float32", "--out", "mine")
    assert result.code == 1
    assert "not finite at step 3" in result.err
    from safetensors.torch import load_file

    tensors = load_file("mine/adapter_model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    assert any(t.abs().max() > 0 for n, t in tensors.items() if "lora_B" in n)


def test_evaluate_holds_out_the_rows_that_the_adapter_was_not_trained_on(
    fw_cli: Cli, reviews: Path, llama: Path
) -> None:
    common = ("--data", reviews, "--dtype", "float32")
    fw_cli("train", "--model", llama, *common, "--steps", 1, "--seed", 5, "--test-fraction", 0.2, "--out", "mine")
    done = fw_cli("evaluate", "--adapter", "mine", *common, "--out", "p.jsonl")
    assert done.code == 0, done.err
    tested = [json.loads(line)["place"] for line in Path("p.jsonl").read_text().splitlines()]
    own = fw.load_task(str(reviews), seed=5, test_fraction=0.2)
    assert sorted(tested) == sorted(r.place for r in own.test)
    every = fw_cli("evaluate", "--adapter", "mine", *common, "--split", "all")
    assert "the ones that the adapter was trained on" in every.err
    shutil.copy(reviews, "moved.csv")
    moved = fw_cli("evaluate", "--adapter", "mine", "--data", "moved.csv", "--dtype", "float32")
    assert moved.out == done.out
    assert "it is asked those that were held out" in moved.err
    with Path("moved.csv").open("a") as file:
        file.write("another film,bad\n")
    n = len(Path("moved.csv").read_text().splitlines()) - 1
    others = fw_cli("evaluate", "--adapter", "mine", "--data", "moved.csv", "--dtype", "float32")
    assert f"n = {n}" in others.out


def test_an_adapter_finds_its_base_again_from_another_folder(
    fw_cli: Cli, reviews: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama, "base")
    fw_cli("train", "--model", "base", "--data", reviews, "--steps", 1, "--dtype", "float32", "--out", "mine")
    adapter = Path("mine").resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = fw_cli("generate", "--adapter", adapter, "--prompt", "a film", "--max-new-tokens", 2)
    assert done.code == 0, done.err


def test_an_adapter_trained_with_a_test_file_is_evaluated_on_it_not_on_its_training_rows(
    fw_cli: Cli, reviews: Path, llama: Path, in_tmp: Path
) -> None:
    test = tiny.write(in_tmp / "test.csv", [{"text": f"new {i}", "label": tiny.LABELS[i % 3]} for i in range(6)])
    common = ("--data", reviews, "--dtype", "float32")
    fw_cli("train", "--model", llama, *common, "--test-data", test, "--steps", 1, "--out", "mine")
    done = fw_cli("evaluate", "--adapter", "mine", *common, "--out", "p.jsonl")
    assert done.code == 0, done.err
    assert all(json.loads(line)["place"].startswith(str(test)) for line in Path("p.jsonl").read_text().splitlines())


def test_another_file_is_evaluated_whole(fw_cli: Cli, adapter: Path, in_tmp: Path) -> None:
    data = tiny.write(in_tmp / "new.csv", tiny.reviews(9))
    assert "n = 9" in fw_cli("evaluate", "--adapter", adapter, "--data", data).out


def test_a_recipe_serves_several_verbs_and_a_slip_in_it_is_found(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    recipe = Path("all.toml")
    recipe.write_text(f"model = '{llama}'\ndata = '{reviews}'\nsteps = 1\ndtype = 'float32'\n")
    assert fw_cli("train", "--recipe", recipe).code == 0
    assert fw_cli("evaluate", "--recipe", recipe).code == 0
    recipe.write_text("stepz = 1\n")
    assert "'stepz' is not a setting here; did you mean 'steps'" in complaint(fw_cli("train", "--recipe", recipe))


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("seed = 1\nsteps = '8'\n", "r.toml:2: --steps: input should be a valid integer (got '8')"),
        ("seed = 1\nbatch-size = true\n", "r.toml:2: --batch-size: input should be a valid integer"),
        ("seed = 1\n\nlr = nan\n", "r.toml:3: --lr: input should be a finite number"),
        ("seed = 1\nsteps = 8 8\n", "r.toml:2 is not valid TOML"),
        ("seed = 1\nstepz = 8\n", "r.toml:2: 'stepz' is not a setting here"),
        ("seed = 1\n[lora]\nlora_alpha = 4.0\nr = '8'\n", "r.toml:4: lora: r must be int, not '8'"),
        ("seed = 1\n[adalora]\ninit_r = 2\ntarget_r = 5\n", "r.toml:2: AdaLoRA: "),
        ("seed = 1\n[lora]\nlora_alpha = nan\n", "r.toml:3: lora: lora_alpha must be float, not nan"),
        ("seed = 1\n[loraa]\nr = 8\n", "r.toml:2: the table [loraa] is no method"),
        ("seed = 1\noptions = 3\n", "r.toml:2: options of a method go into a table of its name"),
        ('template = "a\\u0000"\n', "r.toml:1: --template: value error, a text"),
        ("x = " + "[" * 9000, "r.toml is not valid TOML: it is nested too deeply"),
        ("seed = " + "9" * 5000, "r.toml is not valid TOML: it holds a number of thousands of digits"),
        ("epochs = 1e300\n", "r.toml:1: --epochs"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_model")
def test_a_slip_in_a_recipe_is_named_by_its_line(fw_cli: Cli, reviews: Path, recipe: str, wanted: str) -> None:
    Path("r.toml").write_text(recipe)
    assert wanted in complaint(fw_cli("train", "--data", reviews, "--recipe", "r.toml"))


def test_a_wrong_flag_is_not_blamed_on_the_recipe(fw_cli: Cli, reviews: Path) -> None:
    Path("r.toml").write_text("steps = 3\n")
    assert complaint(fw_cli("train", "--recipe", "r.toml", "--steps", "-3")).startswith("--steps: ")


@pytest.mark.parametrize("verb", [["evaluate"], ["generate", "--prompt", "x"], ["merge"]])
def test_an_adapter_that_does_not_fit_is_refused_before_the_model_loads(
    fw_cli: Cli, in_tmp: Path, adapter: Path, verb: list[str], no_model: None
) -> None:
    mine = Path(shutil.copytree(adapter, in_tmp / "mine"))
    (mine / "featherweight.json").unlink()
    tensors = load_file(mine / "adapter_model.safetensors")
    save_file({**tensors, "stray": torch.ones(1)}, mine / "adapter_model.safetensors")
    assert "has the unexpected tensor stray" in complaint(fw_cli(*verb, "--adapter", mine))
    save_file({k: v[:, :1].contiguous() for k, v in tensors.items()}, mine / "adapter_model.safetensors")
    assert "has the shape" in complaint(fw_cli(*verb, "--adapter", mine))
    (mine / "adapter_model.safetensors").rename(mine / "adapter_model.bin")
    assert "adapter_model.bin is a pickled file" in complaint(fw_cli(*verb, "--adapter", mine))


@pytest.mark.usefixtures("no_model")
def test_predictions_are_not_written_over_the_data(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    before = reviews.read_bytes()
    said = complaint(
        fw_cli("evaluate", "--model", llama, "--data", reviews, "--out", f"../{reviews.parent.name}/{reviews.name}")
    )
    assert "is the file of --data, which would be lost" in said
    assert reviews.read_bytes() == before


def test_an_option_of_a_method_that_does_not_run_is_checked_too(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    result = fw_cli("train", "--method", "ia3", "--set", "lora.rr=3", "--model", llama, "--data", reviews)
    assert "lora has no option 'rr'" in complaint(result)


def test_methods_gives_typical_sizes_without_a_model(fw_cli: Cli) -> None:
    listed = fw_cli("methods").out
    for trained in ("460,800", "11,520", "176,192", "230,400", "57,600"):
        assert f"parameters, {trained} of them trained" in listed


def test_a_comparison_says_which_classes_are_never_answered(fw_cli: Cli, reviews: Path, llama: Path) -> None:
    fw_cli(
        "compare", *BARE, "--model", llama, "--data", reviews, "--methods", "ia3", "--steps", 1, "--dtype", "float32", "--out", "t",
    )  # fmt: skip
    [row] = [json.loads(line) for line in Path("t/rows.jsonl").read_text().splitlines()]
    never = set(tiny.LABELS) - set(row["predictions"])
    table = Path("t/table.md").read_text()
    assert all(f"no method answers {label!r}" in table for label in never)
    assert "the whole command took" in table
