"""The first program of a sandboxed interpreter: wait for one program, bound it, run it.

It is not imported by the package. `interpreter.py` passes its text and a call of `main` to
`python3 -I -S -c` inside the sandbox, with the settings as one argument (hexadecimal marshal data);
`sandbox_fusion.py` sends its text and a call of `run_here` to an interpreter elsewhere, so that a
program behaves alike in both. `main` writes "R" to standard
output once the interpreter is warm, reads one request (marshal data) from standard input up to its
end, writes "S", and becomes that program. Whatever comes after the "S" was written by the program
and proves nothing.

Source code of unknown origin is parsed here and never outside: CPython's parser can be crashed by
hostile source.

Only the standard library, and nothing newer than Python 3.10: the sandbox may hold another version
than ours. Modules written in Python are imported when needed only: `json`, `ast`, `typing` and
`traceback` together would double the CPU time of a call.
"""

from __future__ import annotations

import _ast
import _sitebuiltins
import builtins
import marshal
import os
import resource
import sys
import time
import types

PROGRAM_NAME = "<code>"


def apply_limits(limits: dict[str, int]) -> None:
    """Lower the hard limits of this process, which its children inherit, for good."""
    warm_up_seconds = int(time.process_time()) + 1
    values = {
        resource.RLIMIT_CPU: limits["cpu_seconds"] + warm_up_seconds,
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 65536,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for name, value in values.items():
        hard = resource.getrlimit(name)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(name, (value, value))


def replace_standard_input(text: str) -> None:
    """Give the program its own standard input: empty, or an unlinked file with `text`."""
    if text:
        path = "stdin"
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        descriptor = os.open(path, os.O_RDONLY)
        os.unlink(path)
    else:
        descriptor = os.open("/dev/null", os.O_RDONLY)
    os.dup2(descriptor, 0)
    os.close(descriptor)
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="replace", closefd=False)


def install_traceback(code: str, message_only: bool, program: types.ModuleType) -> None:
    """Print uncaught exceptions as if the program had been started by itself."""

    def print_exception(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        import linecache
        import traceback

        lines = [line + "\n" for line in code.split("\n")]
        # No modification time: the entry is then never checked against a file.
        linecache.cache[PROGRAM_NAME] = (len(code), None, lines, PROGRAM_NAME)
        # By globals, not by file name: this text may itself run as the program of another one.
        while trace is not None and trace.tb_frame.f_globals is not program.__dict__:
            trace = trace.tb_next
        if message_only:
            message = traceback.format_exception_only(kind, error)
            sys.stderr.write(next(line for line in message if not line[:1].isspace()))
        else:
            # Not sys.__excepthook__: it would look for the source lines in a file.
            traceback.print_exception(kind, error, trace)

    sys.excepthook = print_exception


def show(value: object) -> None:
    """What becomes of the last expression's value: printed, unless there is none."""
    if value is not None:
        print(value)


def install_exit() -> None:
    """What Python's `site` gives every program, and what `-S` leaves out."""
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))


def run(request: dict) -> None:
    """Run the program as `__main__`. Its last expression is shown if the request says so.

    It is compiled without this file's own `from __future__ import annotations`.
    """
    install_exit()
    main_module = types.ModuleType("__main__")
    install_traceback(request["code"], request["short_traceback"], main_module)
    tree: _ast.Module = compile(  # type: ignore[assignment]
        request["code"], PROGRAM_NAME, "exec", _ast.PyCF_ONLY_AST, dont_inherit=True
    )
    last = None
    if request["print_last_expression"] and tree.body and isinstance(tree.body[-1], _ast.Expr):
        shown = _ast.Interactive(body=[tree.body.pop()])
        last = compile(shown, PROGRAM_NAME, "single", dont_inherit=True)
        sys.displayhook = show
    program = compile(tree, PROGRAM_NAME, "exec", dont_inherit=True)
    sys.modules["__main__"] = main_module
    sys.argv = [PROGRAM_NAME]
    exec(program, main_module.__dict__)
    if last is not None:
        exec(last, main_module.__dict__)


def prepare_streams() -> None:
    """Line buffering, so that what a program printed before it was killed is not lost."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(  # type: ignore[union-attr]
            encoding="utf-8", errors="backslashreplace", line_buffering=True
        )


def run_here(request: dict) -> None:
    """Run the program in an interpreter that somebody else has bounded and given its input."""
    prepare_streams()
    run(request)


def main() -> None:
    """Warm up, wait, run."""
    settings = marshal.loads(bytes.fromhex(sys.argv[1]))
    sys.path.extend(settings["package_paths"])
    for module in settings["preloaded_modules"]:
        __import__(module)
    os.write(1, b"R")
    payload = sys.stdin.buffer.read()
    if not payload:
        os._exit(0)  # closed unused
    request = marshal.loads(payload)
    replace_standard_input(request["stdin"])
    apply_limits({**settings["limits"], "memory_bytes": request["memory_bytes"]})
    prepare_streams()
    os.write(1, b"S")
    run(request)
