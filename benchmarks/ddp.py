"""Throughput of ``--parallel ddp`` with two processes, against one process of one and two threads.

    python benchmarks/ddp.py input.txt --presets tiny mini --rounds 3
    sudo python benchmarks/ddp.py input.txt --namespaces    # two network namespaces: two machines

Each way trains the same steps in turn, in processes of its own, and tells its tokens per second of
training. With ``--namespaces``, which needs root and the programs ``ip`` and ``tc``, the two
processes also run in two network namespaces that a link of 10 Gbit/s joins, with a delay of 1 ms
there and back where the kernel has netem. Writes results/ddp.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outputs import add_force, check_results

from mmrec.profiling.kernel_bench import describe_machine

RESULTS = Path(__file__).parent / "results" / "ddp.json"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MMREC = ["-m", "mmrec", "train"]
NAMESPACES = ("mmrec-0", "mmrec-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29_577


def ip(words: str) -> None:
    """Run ``ip``."""
    subprocess.run(["ip", *words.split()], check=True)


@contextlib.contextmanager
def joined_namespaces(rate: str, delay: str) -> Iterator[dict[str, Any]]:
    """Make two network namespaces and a link between them; remove them in the end.

    Args:
        rate: of the link, as ``tc`` takes it.
        delay: one way, as ``tc`` takes it.

    Yields:
        What the link has: its rate, and its delay or None if the kernel cannot delay.
    """
    try:
        for name in NAMESPACES:
            ip(f"netns add {name}")
        ip(f"link add v0 netns {NAMESPACES[0]} type veth peer name v1 netns {NAMESPACES[1]}")
        link: dict[str, Any] = {"rate": rate, "delay": delay}
        for number, (name, address) in enumerate(zip(NAMESPACES, ADDRESSES, strict=True)):
            ip(f"-n {name} addr add {address}/24 dev v{number}")
            for device in (f"v{number}", "lo"):
                ip(f"-n {name} link set {device} up")
            shape = ["tc", "-n", name, "qdisc", "replace", "dev", f"v{number}", "root"]
            netem = [*shape, "netem", "delay", delay, "rate", rate]
            if subprocess.run(netem, stderr=subprocess.DEVNULL, check=False).returncode:
                limit = [*shape, "tbf", "rate", rate, "burst", "10mb", "latency", "10ms"]
                subprocess.run(limit, check=True)
                link["delay"] = None
        yield link
    finally:
        for name in NAMESPACES:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def commands(way: str) -> list[list[str]]:
    """The programs that start the processes of a way, without the arguments of ``mmrec train``."""
    if way in ("one thread", "two threads"):
        return [[sys.executable, *MMREC]]
    if way == "ddp":
        return [[*TORCHRUN, "--nproc-per-node", "2", *MMREC]]
    return [
        [
            *("ip", "netns", "exec", name, *TORCHRUN, "--nnodes", "2", "--node-rank", str(rank)),
            *("--master-addr", ADDRESSES[0], "--master-port", str(PORT)),
            *("--nproc-per-node", "1", *MMREC),
        ]
        for rank, name in enumerate(NAMESPACES)
    ]


def tokens_per_second(way: str, words: list[str], folder: Path) -> float:
    """Train once, and return the tokens per second of training."""
    threads = 2 if way == "two threads" else 1
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    parallel = [] if "thread" in way else ["--parallel", "ddp"]
    out = folder / "run"
    processes = []
    for number, start in enumerate(commands(way)):
        own = {"GLOO_SOCKET_IFNAME": f"v{number}"} if way == "namespaces" else {}
        arguments = [*start, *words, *parallel, "--out", str(out), "--force"]
        processes.append(
            subprocess.Popen(arguments, env=environment | own, stdout=subprocess.DEVNULL)
        )
    if any(process.wait() for process in processes):
        raise SystemExit(f"{way} failed")
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    return float(summary["tokens"] / summary["seconds"])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", help="the text")
    parser.add_argument("--presets", nargs="+", default=["tiny", "mini"])
    parser.add_argument("--tokenizer", default="char", choices=("bpe", "char"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--namespaces", action="store_true", help="two network namespaces, too")
    parser.add_argument("--rate", default="10gbit", help="of the link between them")
    parser.add_argument("--delay", default="500us", help="of the link, one way")
    add_force(parser)
    args = parser.parse_args()
    check_results(parser, args, RESULTS)
    ways = ["one thread", "ddp", "two threads", *["namespaces"] * args.namespaces]
    rows, link = [], None
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.namespaces:
            link = stack.enter_context(joined_namespaces(args.rate, args.delay))
        for name in args.presets:
            words = [name, "--data", str(Path(args.data).resolve()), "--tokenizer", args.tokenizer]
            words += ["--steps", str(args.steps), "--eval-every", "1000000"]
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way in ways:
                    rates[way].append(round(tokens_per_second(way, words, folder), 1))
                    print(f"{name}, {way}: {rates[way][-1]:,.0f} tokens/s", flush=True)
            medians = {way: statistics.median(found) for way, found in rates.items()}
            ratios = {way: round(m / medians["one thread"], 3) for way, m in medians.items()}
            print(f"{name}, times one thread: {ratios}")
            rows.append({"preset": name, "tokens_per_second": rates, "times_one_thread": ratios})
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "force")}
    result = {"machine": describe_machine(), "settings": settings, "link": link, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
