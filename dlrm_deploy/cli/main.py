"""`dlrm-deploy`: the command group. Commands are imported when they run, so that `--help` answers at once."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from importlib import import_module

import click

from dlrm_deploy import __version__
from dlrm_deploy.errors import DlrmDeployError

# Name, module and first line of help of each command, in the order of the road.
_COMMANDS = {
    "demo": ("dlrm_deploy.cli.demo:demo", "The whole road on real data, in minutes."),
    "train": ("dlrm_deploy.cli.train:train", "Train a DLRM from a recipe; run again to resume."),
    "export": ("dlrm_deploy.cli.export:export", "Turn a checkpoint, of this project or another, into a bundle."),
    "build": ("dlrm_deploy.cli.build:build", "Build a TensorRT plan for a bundle."),
    "check": ("dlrm_deploy.cli.check:check", "Compare an engine with PyTorch."),
    "bench": ("dlrm_deploy.cli.bench:bench", "Measure engines side by side."),
    "loadtest": ("dlrm_deploy.cli.loadtest:loadtest", "Serve a bundle to MLPerf LoadGen."),
    "trace": ("dlrm_deploy.cli.trace:trace", "Profile traffic, and generate traffic like it."),
    "inspect": ("dlrm_deploy.cli.inspect:inspect", "Show what is in a bundle and verify its hashes."),
}

# The extra that brings each package which only some commands need.
_EXTRAS = {"torch": "train", "tensorboard": "train", "onnx": "export", "matplotlib": "bench"}


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: `timeout`, `docker stop`, a scheduler."""


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except DlrmDeployError as err:
            click.echo(f"Error: {err}", err=True)
            ctx.exit(err.exit_code)
        except ModuleNotFoundError as err:
            extra = _EXTRAS.get((err.name or "").partition(".")[0])
            if extra is None:
                raise
            click.echo(
                f"Error: this needs the package {err.name}, which is not installed. Install it with "
                f"`pip install 'dlrm-deploy[{extra}]'`.",
                err=True,
            )
            ctx.exit(DlrmDeployError.exit_code)
        except KeyboardInterrupt as err:
            click.echo("Interrupted. Nothing half-written was left behind.", err=True)
            ctx.exit(128 + (signal.SIGTERM if isinstance(err, _Terminated) else signal.SIGINT))
        except BrokenPipeError:  # the reader, such as `head`, has seen enough: no verdict, and nothing to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(128 + signal.SIGPIPE)
        except OSError as err:
            click.echo(f"Error: {err.strerror or err}{f': {err.filename}' if err.filename else ''}.", err=True)
            ctx.exit(DlrmDeployError.exit_code)
        except MemoryError as err:
            click.echo(f"Error: not enough memory here. {err}", err=True)
            ctx.exit(DlrmDeployError.exit_code)
        except Exception:
            # A bug of ours. Not exit code 1, which would read as a verdict.
            traceback.print_exc()
            click.echo("Error: this is a bug of dlrm-deploy; please report it with the lines above.", err=True)
            ctx.exit(DlrmDeployError.exit_code)


@click.group(cls=_Lazy, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Take a trained DLRM to production: train, export to ONNX, build TensorRT plans, check parity, measure.

    Exit codes of every command: 0 done (and passed), 1 compared and not equal or altered, 2 wrong usage, 3 could not
    run, 130 interrupted. Errors name what was seen, what was expected and what to do.
    """


def main() -> None:
    """Entry point of the `dlrm-deploy` script. Being terminated cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(cli())


if __name__ == "__main__":
    main()
