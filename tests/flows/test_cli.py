"""The command line: help for a stranger, one line for a mistake, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from project_folder import give_presets

from flows.cli.app import app

SVD = str(Path(sys.executable).parent / "svd")


def svd(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SVD, *arguments], capture_output=True, text=True, cwd=cwd)


def commands() -> list[tuple[str, ...]]:
    import typer

    def walk(command: object, path: tuple[str, ...]) -> list[tuple[str, ...]]:
        children = getattr(command, "commands", None)
        if not children:
            return [path]
        return [leaf for name, child in children.items() for leaf in walk(child, (*path, name))]

    return walk(typer.main.get_command(app), ())


def test_processes_that_a_command_spawns_do_not_import_the_commands():
    """They run the script again up to its main function."""
    program = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__mp_main__'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, SVD], capture_output=True, text=True, check=True)
    assert "flows.cli.entry" in done.stdout.split()
    assert not {"flows.cli.app", "typer", "mlflow", "pandas"} & set(done.stdout.split())


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    import click
    import typer
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    command: click.Command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    assert command.help and len(command.help) > 20
    bare = [p.name for p in command.params if isinstance(p, click.Option) and p.name != "help" and not p.help]
    assert not bare, f"options without help: {bare}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("stage", "nothing"), "no stage 'nothing'"),
        (("config", "check", "--preset", "nothing"), "no preset 'nothing'"),
        (("stage", "latents", "--preset", "paper"), "run `svd stage curation"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = svd(*arguments, cwd=give_presets(tmp_path))
    assert result.returncode == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) <= 2
