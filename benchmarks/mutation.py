"""Do the tests notice a small harmful change? `python benchmarks/mutation.py` prints scores and survivors, by file.

The changes are those of cosmic-ray's operators (`pip install '.[test,mutation]'`): another operator or comparison, a
number one up or down, a condition turned round, a decorator taken off, a loop that does nothing. Each is put into a
copy of the tree, never into this one, and the tests that are named for its file below run until one fails.

Cosmic-ray's own runner would start an interpreter and import torch for every change; here a process that has torch
imported is forked, so that a change costs a second or two. Where there are more changes than time, a sample is tried,
the same for the same seed, and that is said.

    python benchmarks/mutation.py                                    # all files, under an hour on two cores
    python benchmarks/mutation.py engine/training/metrics.py --most 1000      # all changes of one file
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Of each file the tests that should notice, the fast ones first: they run in this order until one fails.
TESTS: dict[str, Sequence[str]] = {
    "engine/training/metrics.py": ["training_metrics"],
    "engine/training/schedules.py": ["training_schedules"],
    "engine/run/saver.py": ["run_saver", "distributed_runs"],
    "engine/run/state.py": ["training_progress", "run_saver", "distributed_training"],
    "engine/data/splits.py": ["data_splits"],
    "engine/data/batches.py": ["data_order", "distributed_training"],
    "engine/data/devices.py": ["data_devices", "distributed_runs"],
    "engine/data/reader.py": ["data_reader", "data_workers", "distributed_training"],
    "engine/data/workers.py": ["data_workers", "distributed_training"],
    "engine/data/augment.py": ["data_augment_reference", "data_augment_edges", "data_augment"],
    "engine/data/draws.py": ["data_draws", "data_order", "data_augment_reference", "data_augment"],
    "engine/data/transforms.py": ["data_transforms", "data_augment_edges", "data_augment_reference"],
    "engine/run/checkpoint.py": [
        "run_checkpoint_checks",
        "export",
        "run_trust",
        "evaluate",
        "reference",
        "run_checkpoint",
    ],
    "engine/run/trust.py": ["run_trust_values", "run_trust", "run_checkpoint"],
    "engine/run/archive.py": ["run_archive", "run_trust", "run_checkpoint"],
    "engine/run/runs.py": ["run_directory", "run_compare"],
    "engine/command/resume.py": ["command_resume"],
    "engine/command/sweep.py": ["command_sweep_jobs", "command_sweep"],
    "train.py": ["train_parts", "training_progress", "training_transfer", "training_step", "distributed_runs"],
    "evaluate.py": ["reference", "evaluate", "distributed_programs"],
    "predict.py": ["predict", "reference", "export", "distributed_programs"],
    "engine/training/step.py": ["training_step", "distributed_training"],
    "engine/training/losses.py": ["training_losses"],
    "engine/training/optimizers.py": ["training_optimizers"],
    "engine/data/mixing.py": ["data_mixing", "distributed_training"],
}
IMPORTED = ("torch", "torchvision.transforms.v2", "numpy", "hydra", "pytest", "matplotlib.figure", "tqdm", "sklearn")
SKIPPED = re.compile(r"__name__ == ")  # whether a program is started by hand


@dataclass(frozen=True)
class Mutant:
    """A change of a file.

    Attributes:
        file: relative to the tree.
        line: of the change, from 1.
        operator: cosmic-ray's name.
        source: the whole file with the change.
    """

    file: str
    line: int
    operator: str
    source: str

    def shown(self) -> str:
        """Where it is, and the lines that differ."""
        before = (ROOT / self.file).read_text(encoding="utf-8").splitlines()
        lines = difflib.unified_diff(before, self.source.splitlines(), n=0, lineterm="")
        changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        return "\n".join([f"  {self.file}:{self.line}  {self.operator}", *(f"      {line}" for line in changed)])


# ---------------------------------------------------------------------------------------------------------------------
# The changes


def positions(source: str) -> list[tuple[int, str, int]]:
    """Line, operator and its occurrence of all changes; of the replacements for one sign one is drawn."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    draw = random.Random(0)
    found: dict[tuple[str, tuple[int, int], int], list[tuple[int, str, int]]] = {}
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments():  # these want the names of variables
            continue
        places = [place for node in nodes for place in operator().mutation_positions(node)]
        family = re.sub(r"(Operator_[A-Z]\w*?)_.*", r"\1", name)
        for occurrence, (begin, _end) in enumerate(places):
            number = occurrence if family == name else 0  # two changes of a number are two
            found.setdefault((family, begin, number), []).append((begin[0], name, occurrence))
    return [draw.choice(alike) for alike in found.values()]


def meaning(source: str) -> str | None:
    """The program without what changes no result; None if it is none.

    That is comments and annotations; `strict=` of zip, a guard against mistakes of our own; and how much of a foreign
    message or value is quoted.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
            if isinstance(node.func, ast.Name) and node.func.id in ("one_line", "shortened"):
                node.args = node.args[:1]
    return ast.dump(tree)


def mutants(file: str, most: int, seed: int) -> tuple[list[Mutant], int]:
    """At most so many changes of a file, and how many places for changes there are."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (ROOT / file).read_text(encoding="utf-8")
    lines, plain = source.splitlines(), meaning(source)
    places = positions(source)
    random.Random(seed).shuffle(places)
    found: list[Mutant] = []
    left_out = 0
    for line, operator, occurrence in places:
        if len(found) == most:
            break
        try:
            changed = mutate_code(source, get_operator(operator)(), occurrence)
        except AttributeError:  # of cosmic-ray, which has no other exception for one with a dotted name
            changed = None
        if changed is None or meaning(changed) in (None, plain) or SKIPPED.search(lines[line - 1]):
            left_out += 1
        else:
            found.append(Mutant(file, line, operator.removeprefix("core/"), changed))
    return found, len(places) - left_out


# ---------------------------------------------------------------------------------------------------------------------
# Running the tests on them

_tree: Path  # of a worker, its own copy


def begin_worker(folder: str) -> None:
    """Copy the tree and import what is slow to import, but nothing of the program."""
    global _tree
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tree = Path(tempfile.mkdtemp(dir=folder)) / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "checkpoints", "outputs")
    shutil.copytree(ROOT, _tree, ignore=ignored, symlinks=True)
    for name in IMPORTED:
        with suppress(ImportError):
            importlib.import_module(name)
    assert not any(name.partition(".")[0] in ("engine", "datasets", "models", "train") for name in sys.modules)


def tried(mutant: Mutant, limit: float) -> tuple[str, float]:
    """What came of it ("passed", "failed", "took too long" or what pytest says), and after how many seconds."""
    target = _tree / mutant.file
    original = target.read_text(encoding="utf-8")
    began = time.monotonic()
    target.write_text(mutant.source, encoding="utf-8")
    try:
        child = os.fork()
        if child == 0:
            run_tests(mutant.file)
        code = ended(child, began + limit)
    finally:
        target.write_text(original, encoding="utf-8")
    # 1: a test failed; 2 and 4: the change cannot even be imported; negative: the process died of it
    outcomes = {None: "took too long", 0: "passed", 3: "internal error of pytest", 5: "no tests"}
    return outcomes.get(code, "failed"), time.monotonic() - began


def run_tests(file: str) -> None:
    """In a child: run pytest in the copy and leave with its exit code."""
    os.setsid()
    os.chdir(_tree)
    quiet = os.open(_tree.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, source in ((0, nothing), (1, quiet), (2, quiet)):
        os.dup2(source, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path[:] = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "benchmarks"))]
    code = 3
    try:
        import pytest

        plain = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={_tree.parent / 'pytest'}"]
        if importlib.util.find_spec("pytest_randomly"):
            plain += ["-p", "no:randomly"]  # in the order of the table
        names = [f"tests/test_{name}.py" for name in TESTS[file]]
        code = int(pytest.main([*plain, *(name for name in names if Path(name).is_file())]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int, until: float) -> int | None:
    """The exit code of a child, or None if it had to be ended; what it started is ended with it."""
    code = None
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return code


def score(file: str, most: int, seed: int, until: float, pool: ProcessPoolExecutor, workers: int) -> Iterator[str]:
    """The lines to print about a file; what is not begun by the time `until` is left out."""
    source = (ROOT / file).read_text(encoding="utf-8")
    outcome, seconds = pool.submit(tried, Mutant(file, 0, "none", source), 600.0).result()
    if outcome != "passed":
        yield f"{file}: not tried, as its tests do not pass without a change ({outcome})"
        return
    found, possible = mutants(file, most, seed)
    limit = min(20 + 5 * seconds, 120.0)
    waiting, running = found[::-1], {}
    results: list[tuple[Mutant, str]] = []
    while waiting or running:
        while waiting and len(running) < workers and time.monotonic() < until:
            mutant = waiting.pop()
            future: Future[tuple[str, float]] = pool.submit(tried, mutant, limit)
            running[future] = mutant
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            results.append((running.pop(future), future.result()[0]))
    survivors = [mutant for mutant, outcome in results if outcome == "passed"]
    odd = [f"{mutant.file}:{mutant.line} {outcome}" for mutant, outcome in results if "pytest" in outcome]
    slow = sum(outcome == "took too long" for _, outcome in results)
    share = f"{1 - len(survivors) / len(results):.0%}" if results else "nothing tried"
    sample = "" if len(results) == possible else f", a sample of {possible} with seed {seed}"
    yield f"{file}: {share} noticed, {len(results) - len(survivors)} of {len(results)}{sample}" + (
        f"; {slow} by taking too long" if slow else ""
    )
    yield from (mutant.shown() for mutant in sorted(survivors, key=lambda mutant: mutant.line))
    yield from (f"  {line}" for line in odd)


def main() -> None:
    """Print the score of each file and its survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TESTS), help="of those in the table; all of them if left out")
    parser.add_argument("--most", type=int, default=150, help="changes tried of a file at most (150)")
    parser.add_argument("--minutes", type=float, default=55, help="begin no further change after so long (55)")
    parser.add_argument("--workers", type=int, default=2, help="changes tried at once (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    asked = parser.parse_args()
    unknown = [file for file in asked.files if file not in TESTS]
    if unknown:
        parser.error(f"no tests are named for {', '.join(unknown)}; there is {', '.join(TESTS)}")
    if not importlib.util.find_spec("cosmic_ray"):
        parser.error("needs cosmic-ray: pip install -c constraints.txt '.[test,mutation]'")
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, as in tests/conftest.py
    # A changed file may be as long and as old, to the second, as the one before: no bytecode may be kept of it.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        pool = ProcessPoolExecutor(asked.workers, get_context("fork"), begin_worker, (folder,))
        with pool:
            for number, file in enumerate(asked.files):
                left = began + asked.minutes * 60 - time.monotonic()
                until = time.monotonic() + left / (len(asked.files) - number)  # what one does not need, the others get
                for line in score(file, asked.most, asked.seed, until, pool, asked.workers):
                    print(line, flush=True)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
