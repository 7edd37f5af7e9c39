"""Entry of the ``sparsejax`` command: imports only the subcommand asked for, turns errors into one line."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from sparsejax.errors import SparseJaxError

# Group -> command -> what the overview says. A command is a module of this package: `add_arguments`, `run`.
GROUPS = {
    "Use a model": {
        "demo": "serve a batch of documents with the model inside the package",
        "generate": "complete prompts from the command line, a file or stdin",
        "chat": "talk with a model in the terminal",
        "serve": "serve a model over HTTP to OpenAI's clients",
        "grpc": "serve a model over gRPC",
    },
    "Look at this machine": {
        "eval": "measure quality against KV bytes on long-context tasks",
        "calibrate": "choose the layers that select for the others, for a model of yours",
        "bench": "measure throughput and latency of a model here",
        "memory": "what a model and its KV cache need, and how many sequences fit",
        "doctor": "check versions, devices, kernels, caches and a model",
    },
}
ARGUMENTS = {"generate": " [PROMPT ...]", "serve": " [MODEL]", "grpc": " [MODEL]", "bench": " [serve]"}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}


def overview() -> str:
    """The grouped list of commands shown by ``sparsejax --help``."""
    lines = []
    for title, commands in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<10} {text}" for name, text in commands.items()), ""]
    return "\n".join([*lines, "sparsejax COMMAND --help shows the options of a command."])


def hyphenate(argument: str) -> str:
    """Spell a long option with hyphens: ``--top_p=0.9`` and ``--top-p=0.9`` are the same option."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsejax",
        usage="sparsejax COMMAND [options]",
        description="A sparse-first LLM inference engine in JAX.",
        epilog=overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command, with that command's module as the default ``run``."""
    module = importlib.import_module(f"sparsejax.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"sparsejax {name}",
        usage=f"sparsejax {name} [options]" + ARGUMENTS.get(name, ""),
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def split_options(argv: Sequence[str]) -> list[str]:
    """Hyphenate every option before a bare ``--``; what follows is text."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    return [hyphenate(argument) for argument in argv[:end]] + list(argv[end:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 good, 1 a check failed, 2 bad input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    if not argv or argv[0].startswith("-"):
        parser = top_parser()
        if parser.parse_args(argv).version:
            import sparsejax

            print(f"sparsejax {sparsejax.__version__}")
        else:
            parser.print_help()
        return 0
    name, rest = argv[0], split_options(argv[1:])
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        print(f"sparsejax: unknown command {name!r}.{hint}\n\n{overview()}", file=sys.stderr)
        return 2
    args = command_parser(name).parse_args(rest)
    return guarded(args)


def guarded(args: argparse.Namespace) -> int:
    """Run the command; an error of ours is one clear line, everything else keeps its traceback."""
    try:
        return args.run(args)
    except SparseJaxError as error:
        print(f"sparsejax: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsparsejax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # keeps the flush at exit quiet
        return 141
