"""The `quamba` command: one file per command, and here what they are called.

Nothing heavy (torch, transformers, lm-eval) is imported outside the body of a command, so that help is quick.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quamba.cli import bench, build, comparison, console, demo, doctor, evaluate, generate, inspection, quantize
from quamba.errors import UserError

# What a disk or its owner says, wherever it is said; other system errors are ours until shown otherwise.
_SYSTEM_ERRORS = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM, errno.EROFS,
}  # fmt: skip
# What torch says, on a CPU and on a GPU, in errors of no kind of their own or of one that comes with torch.
_NO_MEMORY = ("can't allocate memory", "out of memory")
_ENVIRONMENT_ERRORS = (
    ("quamba_kernels.registry", "BackendUnavailable"),
    ("quamba_kernels.cuda.toolchain", "CannotBuild"),
)


class _Commands(TyperGroup):
    """A group that answers every mistake of the user, its own or a command's, with one sentence and status 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            result = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.Abort:
            raise SystemExit(130) from None
        except Exception as error:
            sentence = _users_mistake(error)
            if sentence is None:
                raise
            console.fail(sentence)
        if standalone_mode:
            raise SystemExit(result if isinstance(result, int) else 0)
        return result


def _users_mistake(error: Exception) -> str | None:
    """Return in a sentence what the user got wrong, or None if the error is ours."""
    if isinstance(error, UserError):
        return str(error)
    # Usage errors have no public base class in every typer, but all of them can say what is wrong.
    if hasattr(error, "format_message"):
        return str(error.format_message())
    if isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS:
        return f"{error.filename or 'A file'} cannot be read or written: {error.strerror}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return "There is not enough memory for what was asked; give fewer or shorter sequences, or a larger machine"
    # The environment asks for a backend or for objects that cannot be had. Looked up, not imported: torch would come.
    for module, name in _ENVIRONMENT_ERRORS:
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], name)):
            return str(error)
    return None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from quamba import __version__

        print(f"quamba {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantise recurrent language models (Mamba, Mamba2) after training, and measure what it cost.

    Start with `quamba demo`: it needs no download and no GPU. Every command explains itself with --help.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command("quantize")(quantize.run)
app.command("eval")(evaluate.run)
app.command("generate")(generate.run)
app.command("inspect")(inspection.run)
app.command("compare")(comparison.run)
app.command("bench")(bench.run)
app.command("build")(build.run)
app.command("doctor")(doctor.run)
app.command("demo")(demo.run)
