"""`moesaic`: find the verb, run it, and turn what went wrong into one line and an exit status.

0    done
1    a fault of Moesaic's own; the traceback is printed for the report
2    a mistake in what was given, or a file or disk that does not allow it; one line
3    training stopped because it must not go on, such as a loss that is not finite; one line
130  interrupted from the keyboard
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError

from moesaic.errors import ConfigError, MoesaicError
from moesaic.version import __version__

VERBS = {
    "upcycle": "Turn a dense model into a mixture of experts, with a proof.",
    "prepare": "Turn text into training data.",
    "plan train": "Find the fastest legal layout for training on a cluster.",
    "plan serve": "Say what each rank of a server holds, and how fast it is.",
    "plan check": "Hold the planner's predictions against published runs.",
    "measure": "Time a model's layers and the links between ranks, for the planner.",
    "train": "Train a model, dense or mixture of experts.",
    "evaluate": "Measure held-out loss and perplexity.",
    "quantize": "Shrink a model to FP8.",
    "generate": "Answer a prompt.",
    "serve": "Answer requests over HTTP as OpenAI's API does.",
    "chat": "Talk to a model or a server at the terminal.",
    "bench serve": "Put a server under load and measure it.",
    "inspect": "Show what a model folder holds.",
    "report": "Draw one HTML page about a training run.",
    "demo": "Run the whole path on a small real model.",
}
"""What `moesaic --help` says of each verb, so that it need not import any."""

GROUPS = {
    "plan": "Choose a layout before any GPU is rented.",
    "bench": "Measure how fast something is.",
}
"""What it says of verbs that have words of their own."""


def app() -> App:
    """The command line, with no verb's module imported yet."""
    moesaic = App(
        name="moesaic",
        help="Turn a dense language model into a mixture of experts, train it, shrink it, run it.",
        version=__version__,
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    groups: dict[str, App] = {}
    for words, summary in VERBS.items():
        module, _, name = words.partition(" ")
        if name and module not in groups:
            groups[module] = App(name=module, help=GROUPS[module], result_action="return_value")
            moesaic.command(groups[module])
        home = groups.get(module, moesaic)
        home.command(f"moesaic.cli.{module}:{name or module}", name=name or module, help=summary)
    return moesaic


def run(tokens: Sequence[str]) -> int:
    """Run one command line and return its exit status; see the head of this module."""
    try:
        refuse_second_spellings(tokens)
        status = app()(tokens, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as error:
        return fail(str(error), 2)
    except MoesaicError as error:
        return fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of a pipe has gone, as with `| head`. Python must not flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return fail(f"{error.strerror or error}{where}", 2)
    except Exception:
        traceback.print_exc()
        return fail("this is a fault of Moesaic. Please report it with the lines above.", 1)
    return status or 0  # --help and --version have none


def refuse_second_spellings(tokens: Sequence[str]) -> None:
    """A flag has one spelling; cyclopts would take `--top_k` for `--top-k`."""
    for token in itertools.takewhile(lambda token: token != "--", tokens):
        flag = token.partition("=")[0]
        if flag.startswith("--") and "_" in flag:
            raise ConfigError(f"Unknown option: {flag}. Did you mean {flag.replace('_', '-')}?")


def fail(message: str, status: int) -> int:
    """Say in one line on stderr what is wrong, and return `status`."""
    print(f"moesaic: {' '.join(message.split())}", file=sys.stderr)
    return status


def main() -> None:
    """Run the command line of this process."""
    # Python has None for a stream that its caller closed, as in `>&-`.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
