"""Wrong arguments of every subcommand: one clear line and a failure, no traceback."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from click import Command
from project_folder import give_presets
from typer.testing import CliRunner

from flows.cli.app import app
from svd.core.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are not what the commands want."""
    folder = tmp_path_factory.mktemp("mistakes")
    give_presets(folder)
    (folder / "empty").mkdir()
    for name in ("text.mp4", "note.safetensors", "note.pt"):
        (folder / name).write_text("neither video nor weights")
    (folder / "blank.txt").touch()
    (folder / "broken.yaml").write_text("seed: [1")
    (folder / "list.yaml").write_text("- seed")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (folder / "date.yaml").write_text("seed: 2024-99-99")
    tiny = (ROOT / "presets" / "tiny.yaml").read_text()
    (folder / "unknown.yaml").write_text(tiny.replace("\nseed: 0", "\nseeed: 0"))
    (folder / "deep.yaml").write_text(tiny.replace("min_scene_seconds:", "min_scene_secods:"))
    (folder / "range.yaml").write_text(re.sub(r"sources_per_shard: \d+", "sources_per_shard: -8", tiny))
    (folder / "type.yaml").write_text(tiny.replace("curation: {workers: 2}", "curation: {workers: many}"))
    (folder / "escape.yaml").write_text(tiny.replace("name: tiny", "name: ../elsewhere"))
    return folder


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield str(server.getsockname()[1])


def mistake(arguments: list[str]) -> str:
    """The message of a command that must fail as a user's mistake."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code != 0, result.output
    if isinstance(result.exception, UserError):  # main() prints it as one line
        said = str(result.exception)
        assert said and "\n" not in said.strip(), said
        return said
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    return result.output


PRESETS = {
    "nothing": "no preset 'nothing': give a YAML file or one of: finetune, paper, tiny",
    "empty": "no preset 'empty'",
    "broken.yaml": "broken.yaml: not valid YAML",
    "binary.yaml": "binary.yaml: not valid YAML",
    "date.yaml": "date.yaml: not valid YAML",
    "list.yaml": "list.yaml: expected a mapping of sections, found list",
    "text.mp4": "text.mp4: expected a mapping of sections, found str",
    "unknown.yaml": "unknown.yaml: unknown key 'seeed'; did you mean 'seed'?",
    "deep.yaml": "unknown key 'curation.cuts.min_scene_secods'; did you mean 'min_scene_seconds'?",
    "range.yaml": "range.yaml: 'sources.sources_per_shard': Input should be greater than 0 (got -8)",
    "type.yaml": "type.yaml: 'compute.curation.workers': Input should be a valid integer",
    "escape.yaml": "escape.yaml: 'name': String should match",
}
WITH_PRESET = (
    "stage curation",
    "pipeline",
    "config show",
    "config check",
    "doctor",
    "curate empty",
    "refilter empty",
    "generate text hello",
    "generate image text.mp4",
)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_bad_preset_is_named_with_its_key(folder: Path, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert PRESETS[preset] in mistake(["config", "check", "-p", preset])


@pytest.mark.parametrize("command", WITH_PRESET)
def test_every_command_refuses_a_bad_preset(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "params.yaml").write_text("preset: tiny\n")
    assert "did you mean 'seed'?" in mistake([*command.split(), "-p", "unknown.yaml"])


MISTAKES = {
    "stages --reaching README.md": "README.md: no file of ",
    "stage nothing": "no stage 'nothing'; stages: sources, ",
    "stage latents": "needs outputs/tiny/curation, which is not there; run `svd stage curation",
    "stage curation --profile 3": "stage 'curation' trains no diffusion model, so it can't be profiled; those that do",
    "stage camera-lora --profile 0": "--profile",
    "stage sources": "not a DVC repository",
    "curate nowhere --dry-run": "'nowhere' does not exist",
    "curate empty --dry-run": "empty: no videos there",
    "browse nowhere": "nowhere/catalogue/clips.parquet: no clip catalogue here",
    "browse text.mp4": "no clip catalogue here",
    "browse empty --port 70000": "--port",
    "refilter empty": "no clip catalogue here",
    "compare empty empty": "no clip catalogue here",
    "fetch nobody/nothing out --sha256 x": "--sha256 takes FILE=HASH",
    "convert nowhere out": "nowhere: no such file",
    "convert note.safetensors out": "note.safetensors: not a safetensors file",
    "convert empty out": "in diffusers' layout already",
    "convert note.safetensors empty": "empty: exists already",
    "convert note.safetensors out --to nothing": "--to",
    "vote create study ours": "name each model once, as NAME=FOLDER",
    "vote create study a=nowhere b=nowhere": "no clip has the same name",
    "vote serve empty": "empty/study.json: no study there",
    "vote results nowhere": "no study there",
    "evaluate clips nowhere nowhere --offline": "nowhere: no such folder",
    "evaluate clips empty empty --offline": "empty: 0 clips",
    "evaluate clips text.mp4 empty --offline": "text.mp4: no such folder",
    "evaluate clips empty empty": "--weights",
    "evaluate clips empty empty --weights nowhere.pt": "nowhere.pt: no such file",
    "evaluate clips empty empty --weights note.pt": "note.pt: not a TorchScript file",
    "evaluate clips empty empty --offline --protocol nothing": "no protocol 'nothing'; known: ",
    "evaluate compare empty empty": "empty/result.json: no evaluation there",
    "evaluate gate text.mp4": "text.mp4/result.json: no evaluation there",
    "generate text": "no prompt",
    "generate text -f nowhere.txt": "nowhere.txt: no such file",
    "generate text -f blank.txt": "blank.txt: holds no prompt",
    "generate text hello": "run `svd stage high-quality-finetuning -p tiny`, or give --model",
    "generate text hello -m nowhere": "nowhere: no such model",
    "generate text hello -m empty": "empty/config.json: no such file",
    "generate text hello -m note.safetensors": "note.safetensors: not a safetensors file",
    "generate text hello --out a.webm": "a.webm: unknown format '.webm'",
    "generate text hello again --out a.mp4": "a file holds one clip, not 2",
    "generate text hello --steps 0": "--steps",
    "generate image nowhere.png": "nowhere.png: no such file",
    "generate image text.mp4": "text.mp4: not a readable picture",
    "generate interpolate nowhere.mp4": "nowhere.mp4: ",
    "generate interpolate text.mp4": "text.mp4: not a readable video",
    "generate interpolate empty": "empty: the folder holds no .png",
    "generate multiview empty": "empty: not a readable picture",
    "generate multiview text.mp4 --elevation 100": "--elevation",
    "lineage": "give a model, for example",
    "lineage svd-image-to-video@best": "not a DVC repository",
    "lineage a --source b": "give a model, for example",
    "gc": "not a DVC repository",
    "gc --older-than -1": "--older-than",
    "stack up --prefect 99999": "--prefect",
    "stack up --s3 -5": "--s3",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_in_one_line(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert MISTAKES[command] in mistake(command.split())


@pytest.mark.parametrize("command", ["browse {}", "vote serve {}", "stack up --prefect"])
def test_a_taken_port_is_named(command: str, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("svd.catalogue.browser.app.create_app", lambda *given: None)
    monkeypatch.setattr("evaluation.preference.study.load_study", lambda *given: None)
    words = command.format("folder").split()
    port = [taken] if "stack" in command else ["--port", taken]
    assert f"port {taken} for " in mistake([*words, *port])


def leaves(command: Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Command]]:
    children = getattr(command, "commands", None)
    if not children:
        yield path, command
    for name, child in (children or {}).items():
        yield from leaves(child, (*path, name))


COMMANDS = dict(leaves(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_unknown_options_and_missing_arguments_show_the_usage(path: tuple[str, ...]) -> None:
    given = [*path, "--plan"] if path == ("train",) else path  # it hands its options on
    said = mistake([*given, "--no-such-option"])
    assert "No such option" in said and "Usage:" in said
    if any(parameter.param_type_name == "argument" and parameter.required for parameter in COMMANDS[path].params):
        assert "Missing argument" in mistake(list(path))


def test_the_paper_preset_prints_resolved_values() -> None:
    result = CliRunner().invoke(app, ["config", "show", "-p", "paper"])
    assert result.exit_code == 0
    values = yaml.safe_load(result.output)
    assert values["video_pretraining"]["betas"] == [0.9, 0.999], "a default that the file does not name"
    assert values["image_to_video"]["phases"][2]["frames"] == 25


def test_outside_a_project_the_pipeline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "params.yaml: expected a line `preset: NAME`" in mistake(["pipeline"])
    (tmp_path / "params.yaml").write_text("preset: tiny\n")
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    assert "not a DVC repository" in mistake(["pipeline"])


@pytest.mark.parametrize("option", [[], ["--check"]])
def test_outside_a_project_no_file_is_rendered(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "run the command in the project's folder" in mistake(["platform", "render", *option])
    assert not list(tmp_path.iterdir())
