"""No option is dropped in silence: each applies in every mode of its command, or is refused where it does not."""

import ast
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import SHORT_AXIS, refused, run, save, slices, study
from small import HEART, saved

from copedit_rt import cli
from copedit_rt.config import DiffusionConfig
from copedit_rt.synthesizer import Synthesizer


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command by its whole name."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from leaves(inner, (*path, name))
    else:
        yield " ".join(path), command


COMMANDS = dict(leaves(typer.main.get_command(cli.app)))
# What applies whatever else is given. Permissions, which say what may be done where it is needed, are among them:
# --overwrite, --resample, --resume, --large, --compile.
ALWAYS = {
    "synth": "output more model steps seed samples solver device dtype overwrite resample preview report no_dicom "
    "shard quiet verbose as_json",
    "inspect": "more model device quiet as_json",
    "serve": "host port model device engine dtype max_memory queue max_size time_limit grace token_file scratch quiet",
    "doctor": "as_json",
    "export onnx": "model output precision as_json",
    "export tensorrt": "model output precision device as_json",
    "export triton-repo": "model output backend precision max_batch as_json",
    "bench kernels": "output op dtype seconds against device as_json",
    "bench serve": "output model requests clients alone steps as_json",
    "bench cpu": "output large compiled quick as_json",
    "bench tokenizers": "output quick as_json",
    "bench sampler": "output batch steps dtype compiled device as_json",
    "bench train-step": "output stage batch compiled device as_json",
    "bench cost": "output measure methods device as_json",
    "demo": "output subjects seed device as_json",
    "evaluate": "output model data subjects steps patterns seed seeds solver beside fid_network fvd_network "
    "lpips_network device as_json",
    "figure": "output model data subjects beside seed device as_json",
    "sweep": "output steps model data subjects patterns seed device as_json",
    "ablate": "kind output preset data subjects full runs fid_network fvd_network as_json",
    "analyse": "kind output model data subjects device as_json",
    "segment": "output model data beside override full device as_json",
    "network": "kind weights output",
    "train tokenizer": "preset output quick estimate",
    "train denoiser": "preset output quick estimate",
    "train method": "name preset output quick resume",
    "train prior": "preset output tokenizer data resume",
    "train check-data": "data preset deep as_json output",
    "train check-simulation": "studies data preset count",
}
# Where the others do not apply, and what is said there. IN: a brain study; SAX: a stack; OUT, MODEL: of a heart.
AMONG = "--task, --select and labels choose among files"
EXPLICIT = ["--file", "t1=IN/case_t1.nii.gz"]
SYNTH: list[tuple[str, list[str], str]] = [
    ("inputs", ["-i", "IN", *EXPLICIT], "not both"),
    ("file", ["-i", "IN", *EXPLICIT], "not both"),
    *((name, ["-i", "IN", f"--{name}", "IN/case_t1.nii.gz"], "not both") for name in "t1 t1ce t2 flair pd sax".split()),
    ("task", [*EXPLICIT, "--task", "brain"], AMONG),
    ("select", [*EXPLICIT, "--select", "run-1"], AMONG),
    ("participant_label", [*EXPLICIT, "--participant-label", "01"], AMONG),
    ("session", [*EXPLICIT, "--session", "a"], AMONG),
    ("run", [*EXPLICIT, "--run", "1"], AMONG),
    ("missing_slices", ["-i", "IN", "--missing-slices", "1"], "cardiac stacks only"),
    ("engine", ["-i", "SAX", "--engine", "onnxruntime", "--device", "cuda"], "the engine onnxruntime runs on the CPU"),
]
LEFT_OUT: list[tuple[str, str, list[str], str]] = [
    *(("synth", option, [*given, "-o", "OUT"], words) for option, given, words in SYNTH),
    *(("inspect", option, given, words) for option, given, words in SYNTH),
    ("synth", "summary", ["-i", "IN", "-o", "OUT", "--summary", "--steps", "3"], "computes nothing; leave out --steps"),
    ("synth", "target", ["-i", "SAX", "-o", "OUT", "--target", "t1"], "name slices with --missing-slices"),
    ("synth", "detail", ["-i", "SAX", "-o", "OUT", "--model", "MODEL", "--detail", "guided"], "among a brain's images"),
    (
        "synth",
        "max_memory",
        ["-i", "SAX", "-o", "OUT", "--max-memory", "1GB", "--engine", "onnxruntime"],
        "takes whole volumes",
    ),
    ("export triton-repo", "device", ["--model", "MODEL", "-o", "OUT", "--device", "cuda"], "onnxruntime has none"),
    ("bench sampler", "preset", ["-o", "OUT", "--device", "cpu", "--preset", "cardiac"], "on a CPU a tiny model"),
    ("bench train-step", "preset", ["-o", "OUT", "--device", "cpu", "--preset", "cardiac"], "on a CPU a tiny model"),
    *(
        (command, option, [*kind, "-o", "OUT", *given], words)
        for command, kind in (("evaluate", []), ("figure", []), ("sweep", ["--steps", "1"]), ("analyse", ["gradcam"]))
        for option, given, words in (
            ("first_seed", ["--first-seed", "1000001", "--data", "IN"], "--first-seed is of simulated subjects"),
            ("split", ["--split", "all"], "--split all is of a data set"),
        )
    ),
    ("evaluate", "samples", ["--samples", "2", "--beside", "IN", "-o", "OUT"], "--samples 2: methods give one each"),
    ("figure", "missing", ["--missing", "t1+pd", "-o", "OUT"], "--missing t1+pd: demo-brain fills in t1, t1ce"),
    *(
        ("train method", option, ["mmgan", "--preset", "demo-brain", "-o", "OUT", *given], words)
        for option, given, words in (
            ("data", ["--data", "IN/nothing"], "IN/nothing"),
            ("override", ["--data", "IN", "--set", "subjects=3"], "--set subjects=3: is of simulated subjects"),
            ("override", ["--set", "guidance=mask"], "there is no place for it in MM-GAN"),
        )
    ),
    (
        "train prior",
        "override",
        ["--preset", "brain-2mm", "--tokenizer", "brain-2mm", "-o", "OUT", "--set", "lr=0.1"],
        "--set lr=0.1: the prior of brain-2mm does not go by it; it goes by seed, subjects, patients",
    ),
    ("ablate", "device", ["prompts", "-o", "OUT", "--device", "cpu", "--set", "device=cuda"], "give one of them"),
    ("ablate", "override", ["prompts", "-o", "OUT", "--set", "image_weight=0.1"], "trains the denoiser alone"),
    ("ablate", "override", ["prompts", "-o", "OUT", "--set", "validate_every=1"], "measures it at the end"),
    ("ablate", "override", ["prompts", "-o", "OUT", "--data", "IN", "--set", "subjects=3"], "of simulated subjects"),
    *(
        (f"train {stage}", option, ["--preset", "demo-brain", "-o", "OUT", *given], words)
        for stage in ("tokenizer", "denoiser")
        for option, given, words in (
            ("resume", ["--estimate", "--resume"], "--resume: --estimate starts nothing"),
            ("data", ["--estimate", "--data", "IN"], "--data IN: --estimate starts nothing"),
            ("override", ["--data", "IN", "--set", "subjects=3"], "--set subjects=3: is of simulated subjects"),
            ("override", ["--set", "validate_subjects=3"], "has no effect with validate_every = 0"),
        )
    ),
    *(
        ("train tokenizer", "override", ["--preset", "cardiac", "-o", "OUT", "--set", item], "with prompt_steps = 0")
        for item in ("prompt_lr=0.1", "prompt_batch=3")
    ),
    *(
        ("train denoiser", "override", ["--preset", "brain-brats", "-o", "OUT", "--set", item], words)
        for item, words in (
            ("muon_lr=0.1", "has no effect with optimizer = adam"),
            ("whole_steps=3", "has no effect with crop = 0"),
            ("relative=true", "there is no prior in brain-brats"),
        )
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("options")
    stack = slices(16, 12)
    stack[..., 5] = 0
    heart = saved(replace(HEART, diffusion=DiffusionConfig(steps=1)), folder / "heart")
    sax = save(folder / "sax_stack.nii.gz", stack, SHORT_AXIS)
    return {"IN": study(folder / "in"), "SAX": sax, "MODEL": heart, "OUT": folder / "out"}


def placed(text: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        text = text.replace(name, str(path))
    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_applies_or_is_refused(command):
    """A new option is entered here."""
    elsewhere = {option for name, option, *_ in LEFT_OUT if name == command}
    always = set(ALWAYS[command].split())
    assert not always & elsewhere
    assert always | elsewhere == {parameter.name for parameter in COMMANDS[command].params}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_read(command):
    """The function of a command uses every parameter that it takes."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(_plain(COMMANDS[command].callback)))).body
    read = {node.id for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    assert {parameter.name for parameter in COMMANDS[command].params} <= read


def _plain(callback: Callable[..., Any]) -> Callable[..., Any]:
    return inspect.unwrap(callback)


@pytest.mark.parametrize(("command", "option", "given", "words"), LEFT_OUT, ids=lambda x: x if len(x) < 20 else "")
def test_an_option_that_does_not_apply_is_refused(places, command, option, given, words):
    result = run(*command.split(), *(placed(text, places) for text in given))
    refused(result, placed(words, places))
    assert not places["OUT"].exists()


@pytest.mark.parametrize(
    "given",
    [
        ["synth", "-o", "OUT", "-i", "IN", "--model", "LONG"],
        ["synth", "-o", "OUT", "--t1", "LONG"],
        ["inspect", "LONG"],
        ["evaluate", "-o", "OUT", "--fid-network", "LONG", "--model", "demo-cardiac"],
        ["train", "tokenizer", "-o", "OUT", "--preset", "LONG"],
        ["train", "tokenizer", "-o", "OUT", "--preset", "demo-brain", "--data", "LONG"],
    ],
)
def test_a_path_that_is_too_long_is_one_sentence(places, given):
    refused(run(*(placed(text, places).replace("LONG", "x" * 300) for text in given)), "x" * 200)
    assert not places["OUT"].exists()


def test_a_picture_that_is_not_drawn_is_told(places, tmp_path, monkeypatch):
    command = ["synth", "-i", places["SAX"], "-o", tmp_path, "--model", places["MODEL"]]
    assert run(*command).exit_code == 0
    monkeypatch.setattr(Synthesizer, "load", lambda *a, **k: pytest.fail("loaded"))
    assert "no picture was drawn; --overwrite makes both" in run(*command, "--preview").stderr
    (tmp_path / "sax_stack_preview.png").write_bytes(b"")
    assert run(*command, "--preview").stderr == ""


@pytest.mark.parametrize("kind", ["analyse tsne", "segment"])
def test_experiments_refuse_a_model_with_a_prior(tmp_path, kind):
    """They give the network no fill, without which it computes nothing."""
    refused(run(*kind.split(), "--model", "heart-3mm", "-o", tmp_path / "x"), "heart-3mm starts from a prior")
    refused(run("ablate", "prompts", "--preset", "heart-3mm", "-o", tmp_path / "x"), "heart-3mm starts from a prior")


def test_json_says_what_the_text_says(places, tmp_path):
    command = ["synth", "-i", places["SAX"], "-o", tmp_path, "--model", places["MODEL"], "--json"]
    assert json.loads(run(*command).stdout)["studies"][0]["record"]["output"]["detail"] is False
