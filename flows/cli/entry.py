"""The beginning of the `svd` command.

Nothing is imported at the top: a process that is spawned imports the program's main module again, and the processes of
curation would hold everything that the commands need.
"""


def main() -> None:
    """Run the command line."""
    from flows.cli.app import run_command_line

    run_command_line()
