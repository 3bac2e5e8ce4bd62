"""The oldest and the newest allowed version of every dependency, each tried with a few tests.

    python benchmarks/versions.py [SET ...] [--pin torch==2.14.1 ...]

A set is an environment of its own: mmrec from this checkout, with some of its extras, and the
oldest or the newest versions that pyproject.toml allows. uv resolves and installs them; it takes
the usual variables, such as UV_TORCH_BACKEND=cpu for torch without CUDA. Then the tests of TESTS
run that need what the set installs. Writes results/versions.json, where other sets stay.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from outputs import add_force, check_results
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "versions.json"
TRACKERS = "tests/training/test_trackers.py::"
TRAINING = "tests/test_api.py::test_train_load_generate_evaluate"
SERVER = "tests/server/test_completions.py"
TESTS: dict[str, list[str]] = {
    "numpy": [TRAINING],
    "numba": [TRAINING, "tests/inference/test_generate.py"],
    "llvmlite": [TRAINING, "tests/inference/test_generate.py"],
    "scipy": [TRAINING, "tests/evaluation/test_report.py"],
    "torch": [TRAINING],
    "h5py": [
        "tests/checkpoint/test_hdf5.py::test_round_trip",
        "tests/checkpoint/test_hdf5.py::test_files_that_are_not_ours",
        "tests/checkpoint/test_checkpoint.py::test_the_training_state_is_restored_bit_for_bit",
    ],
    "tokenizers": ["tests/data/test_tokenizer.py"],
    "fastokens": ["tests/data/test_tokenizer.py"],
    "typer": [
        "tests/cli/test_help.py::test_help_is_shown_as_it_is_written",
        "tests/cli/test_options.py",
    ],
    "tqdm": [TRAINING],
    "matplotlib": [TRAINING, "tests/training/test_plots.py::test_any_name_is_drawn_as_it_is"],
    "platformdirs": ["tests/data/test_sources.py::test_a_home_folder"],
    "filelock": ["tests/runtime/test_locking.py::test_a_folder_has_one_writer"],
    "tomli-w": ["tests/test_config.py::test_toml_round_trip"],
    "rensa": ["tests/data/test_documents.py::test_signatures_do_not_depend_on_the_batches"],
    "jinja2": ["tests/data/test_chat_template.py"],
    "pyarrow": ["tests/data/test_readers.py::test_every_form_gives_the_same_documents"],
    "backports-zstd": ["tests/data/test_readers.py::test_every_form_gives_the_same_documents"],
    "datasets": ["tests/data/test_readers.py::test_a_hugging_face_data_set"],
    "starlette": [SERVER],
    "uvicorn": [SERVER, "tests/server/test_command.py::test_the_openai_client"],
    "prometheus-client": [SERVER, "tests/server/test_command.py::test_the_openai_client"],
    "lm-eval": ["tests/evaluation/test_lm_eval.py"],
    "transformers": [
        "tests/export/test_transformers.py::test_text_is_that_of_mmrec_generate",
        "tests/export/test_transformers.py::test_the_tokenizer_is_ours",
        "tests/integrations/test_transformers.py::"
        "test_every_function_under_the_hook_is_one_that_we_know",
    ],
    "tensorboard": [f"{TRACKERS}test_tensorboard_reads_the_curves_and_texts"],
    "trackio": [f"{TRACKERS}test_trackio_stores_the_curves_and_texts"],
    "optuna": [
        "tests/training/test_tuning.py::test_the_best_are_promoted_and_so_are_the_settings_as_they_are",
        "tests/training/test_tuning.py::test_draws_follow_what_was_found",
    ],
    "accelerate": [
        "tests/export/test_transformers.py::test_the_trainer_trains_it_and_mmrec_takes_it_back"
    ],
    "peft": ["tests/export/test_transformers.py::test_lora_of_peft"],
    "onnx": ["tests/export/test_onnx.py::test_logits_and_states_are_those_of_the_model"],
    "onnxruntime": ["tests/export/test_onnx.py::test_logits_and_states_are_those_of_the_model"],
    "safetensors": [
        "tests/export/test_safetensors.py::test_a_model_comes_back_bit_for_bit",
        "tests/export/test_safetensors.py::test_weights_of_another_program",
    ],
}
"""Tests of each dependency, by its name in pyproject.toml. Together they take about a minute."""
TOOLS = ["pytest", "hypothesis"]
"""What all tests need, from the extra ``dev``."""


@dataclass(frozen=True)
class Environment:
    """A set of versions."""

    resolution: str
    """``lowest-direct`` or ``highest``: see ``uv pip compile --resolution``."""
    extras: tuple[str, ...]
    """Extras of mmrec, whose versions are tried."""
    tools: tuple[str, ...] = ()
    """Further packages of the extra ``dev``."""


# The oldest transformers needs newer packages than mmrec does, so the oldest are two sets. The
# bounds of the trackers are their newest versions.
SETS = {
    "oldest": Environment(
        "lowest-direct",
        ("files", "hf", "serve", "export", "tune"),
        ("httpx", "onnxruntime", "openai"),
    ),
    "oldest-transformers": Environment(
        "lowest-direct", ("transformers", "harness", "hf", "files"), ("accelerate", "peft")
    ),
    "newest": Environment(
        "highest", ("all",), ("accelerate", "httpx", "onnxruntime", "openai", "peft")
    ),
}


def requirements(environment: Environment) -> dict[str, Requirement]:
    """Return what an environment holds: requirements of pyproject.toml by their names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {
        name: [Requirement(line) for line in lines]
        for name, lines in project["optional-dependencies"].items()
    }

    def expand(lines: list[Requirement]) -> list[Requirement]:
        """Put the requirements of mmrec's own extras in the place of ``mmrec[...]``."""
        return [
            found
            for line in lines
            for found in (
                [r for extra in sorted(line.extras) for r in expand(extras[extra])]
                if line.name == "mmrec"
                else [line]
            )
        ]

    wanted = [Requirement(line) for line in project["dependencies"]]
    wanted += [r for extra in environment.extras for r in expand(extras[extra])]
    names = {*TOOLS, *environment.tools}
    wanted += [r for r in extras["dev"] if canonicalize_name(r.name) in names]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate()]
    return {canonicalize_name(r.name): r for r in wanted}


def tests_of(names: Iterable[str]) -> list[str]:
    """Return the tests of these packages."""
    return sorted({test for name in names for test in TESTS.get(name, [])})


def run_tests(python: Path, tests: list[str], folder: Path, minutes: float) -> dict[str, Any]:
    """Run tests with another interpreter.

    Args:
        python: the interpreter of the environment.
        tests: files or names of tests.
        folder: where kernels are cached and the report is written.
        minutes: after this time the tests are ended.

    Returns:
        Numbers of tests by result, names of failed ones, and seconds.
    """
    report, begin = folder / "report.xml", time.monotonic()
    options = ["-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    options.append("--continue-on-collection-errors")
    for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        options += ["-W", f"ignore::{category}"]  # what versions say of their own future
    try:
        subprocess.run(
            [python, "-m", "pytest", *options, *tests],
            cwd=ROOT,
            env={**os.environ, "NUMBA_CACHE_DIR": str(folder / "kernels")},
            timeout=60 * minutes,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"ended": f"not done after {minutes:g} minutes"}
    if not report.exists():
        return {"ended": "pytest did not start"}
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "failures": [
            f"{case.attrib['classname']}::{case.attrib['name']}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ],
        "seconds": round(time.monotonic() - begin),
    }


def try_set(name: str, pins: list[str], folder: Path, minutes: float) -> dict[str, Any]:
    """Install a set and run its tests.

    Args:
        name: its name in ``SETS``.
        pins: further requirements, such as ``torch==2.14.1``.
        folder: an empty folder for the environment.
        minutes: the most that the tests may take.

    Returns:
        The row of the results.
    """
    environment, python = SETS[name], folder / "env" / "bin" / "python"
    wanted = requirements(environment)
    lines = [*map(str, wanted.values()), *pins]
    (folder / "wanted.txt").write_text("\n".join(lines) + "\n", "utf-8")
    uv("venv", "-q", "--python", sys.executable, str(folder / "env"))
    versions = folder / "versions.txt"
    resolution = ["--resolution", environment.resolution]
    interpreter = ["--python", str(python)]
    uv("pip", "compile", "-q", *resolution, *interpreter, folder / "wanted.txt", "-o", versions)
    uv("pip", "install", "-q", *interpreter, "-r", versions)
    uv("pip", "install", "-q", *interpreter, "--no-deps", "-e", str(ROOT))
    installed = {
        canonicalize_name(package["name"]): package["version"]
        for package in json.loads(uv("pip", "list", "-q", *interpreter, "--format", "json"))
    }
    return {
        "set": name,
        "pins": pins,
        "python": platform.python_version(),
        "versions": {key: installed[key] for key in sorted(wanted)},
        "tests": run_tests(python, tests_of(wanted), folder, minutes),
    }


def uv(*words: str | Path) -> str:
    """Run uv and return what it printed; end with its message if it fails."""
    process = subprocess.run(["uv", *words], capture_output=True, encoding="utf-8", check=False)
    if process.returncode:
        raise SystemExit(f"uv {' '.join(map(str, words[:2]))} failed:\n{process.stderr.strip()}")
    return process.stdout


def write_row(row: dict[str, Any], path: Path) -> None:
    """Put a row into the results, in the place of the earlier one of its set and pins."""
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    rows = [r for r in rows if (r["set"], r["pins"]) != (row["set"], row["pins"])]
    rows = sorted([*rows, row], key=lambda r: ([*SETS].index(r["set"]), r["pins"]))
    machine = {"system": f"{platform.system()} {platform.machine()}"}
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", "utf-8")


def main() -> None:
    """Try the sets named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"by default {', '.join(SETS)}")
    parser.add_argument("--pin", action="append", default=[], help="such as torch==2.14.1")
    parser.add_argument("--minutes", type=float, default=5.0, help="the most that tests may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    add_force(parser)
    args = parser.parse_args()
    if unknown := [name for name in args.sets if name not in SETS]:
        parser.error(f"SET must be one of {', '.join(SETS)}; got {', '.join(unknown)}")
    if shutil.which("uv") is None:
        parser.error("this needs the program uv: pip install uv")
    check_results(parser, args, args.out)
    failed = 0
    for name in args.sets or SETS:
        with tempfile.TemporaryDirectory(prefix="mmrec-versions-") as folder:
            row = try_set(name, sorted(args.pin), Path(folder), args.minutes)
        write_row(row, args.out)
        print(f"{name}: {json.dumps(row['tests'])}", flush=True)
        failed += row["tests"].get("failed", 1)
    raise SystemExit(failed != 0)


if __name__ == "__main__":
    main()
