"""Models of transformers with and without mmrec's kernels: training, memory and decoding.

    python benchmarks/kernels_in_models.py [MODEL …] [--dtype bfloat16] [--json FILE]

Each model has random weights, four layers of the shapes of a published model, and a vocabulary of
4,096 (so that the layers count, and not the last product). Logits and gradients are compared first;
a model that differs is not timed. With and without take turns in one process, and the median of
each is reported. Peak memory is that of a process of its own that makes three training steps. The
losses of 50 steps of AdamW are compared. Writes results/kernels_in_models.json.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from outputs import add_force, check_results
from torch import Tensor

from mmrec.integrations.transformers import enable
from mmrec.profiling.kernel_bench import describe_machine

RESULTS = Path(__file__).parent / "results" / "kernels_in_models.json"
VOCABULARY = 4096
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
KINDS = ["without", "with"]
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest difference of the logits and of all gradients together, as a share of their norm."""

THREE_IN_FOUR = ["linear_attention"] * 3 + ["full_attention"]
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3.5-0.8B": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {"hidden_size": 1024, "intermediate_size": 3584, "head_dim": 256}
        | {"num_attention_heads": 8, "num_key_value_heads": 2}
        | {"linear_num_key_heads": 16, "linear_num_value_heads": 16}
        | {"num_hidden_layers": 4, "layer_types": THREE_IN_FOUR},
    ),
    "Kimi-Linear, narrow": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8}
        | {"num_key_value_heads": 8, "linear_num_heads": 8, "kv_lora_rank": 256}
        | {"num_hidden_layers": 4, "layer_types": THREE_IN_FOUR}
        | {"mlp_layer_types": ["dense"] * 4},
    ),
    "mamba-130m": ("MambaConfig", "MambaForCausalLM", {"num_hidden_layers": 4}),
    "mamba2-130m": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"hidden_size": 768, "num_heads": 24, "n_groups": 1, "num_hidden_layers": 4},
    ),
}
"""Config class, model class and settings by the published model whose shapes they are."""


def make_model(name: str, dtype: str) -> Any:
    """A model with random weights, the same ones each time."""
    config_name, model_name, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**(TOKENS | settings))
    return getattr(transformers, model_name)(config).to(getattr(torch, dtype))


def kernels(kind: str) -> Any:
    """A context with mmrec's kernels or without."""
    return enable() if kind == "with" else nullcontext()


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of each next token."""
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def differences(model: Any, tokens: Tensor) -> dict[str, float]:
    """Difference with and without, as a share: of logits, all gradients, the worst gradient."""
    found = []
    for kind in KINDS:
        with kernels(kind):
            model.zero_grad()
            loss_of(model, tokens).backward()
            with torch.no_grad():
                logits = model(tokens, use_cache=False).logits.float()
            gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
            found.append((logits, gradients))
    model.zero_grad()
    (logits, gradients), (our_logits, our_gradients) = found
    sizes = torch.stack([x.norm() for x in gradients])
    errors = torch.stack([(x - y).norm() for x, y in zip(gradients, our_gradients, strict=True)])
    return {
        "logits": float((logits - our_logits).norm() / logits.norm()),
        "gradients": float(errors.norm() / sizes.norm()),
        "worst_gradient": float((errors / sizes.clamp_min(1e-30)).max()),
    }


def take_turns(call: Callable[[], object], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a call of each kind; they take turns until the time is over."""
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        with kernels(kind):
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[KINDS[0]]) < 3:
        for kind in KINDS:
            with kernels(kind):
                start = time.perf_counter()
                call()
                times[kind].append(1e3 * (time.perf_counter() - start))
    return times


def generate(model: Any, prompt: Tensor, count: int) -> Tensor:
    """Generate tokens after a prompt, one at a time, from a cache."""
    return model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)


def losses(name: str, dtype: str, kind: str, steps: int, tokens: Tensor) -> list[float]:
    """The losses of steps of AdamW from the same weights, each on a random text of tokens."""
    model = make_model(name, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    found = []
    with kernels(kind):
        for step in range(steps):
            batch = tokens.roll(step * 37)[:, : tokens.shape[1] // 2]
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
    return found


def peak_of(name: str, dtype: str, kind: str, shape: tuple[int, int]) -> dict[str, float]:
    """Megabytes of this process: before training, and the most during three training steps."""
    model = make_model(name, dtype).train()
    tokens = make_tokens(*shape)
    before = peak_memory()
    with kernels(kind):
        for _ in range(3):
            loss_of(model, tokens).backward()
    return {"before": before, "peak": peak_memory()}


def peak_memory() -> int:
    """The most memory that this program has had, in megabytes.

    ``resource.getrusage`` would give that of the process that started it, if that was larger.
    """
    line = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert line is not None
    return round(int(line[1]) / 1024)


def make_tokens(batch: int, time_: int) -> Tensor:
    """Random text in which some tokens are common."""
    generator = torch.Generator().manual_seed(1)
    return (VOCABULARY * torch.rand(batch, time_, generator=generator) ** 3).long()


def training(name: str, args: argparse.Namespace, tokens: Tensor) -> dict[str, Any]:
    """Forward and backward of one batch; only the difference if that is too large."""
    model = make_model(name, args.dtype).train()
    found, limit = differences(model, tokens), TOLERANCE[args.dtype]
    row: dict[str, Any] = {"differences": found}
    if not max(found["logits"], found["gradients"]) <= limit:
        return row | {"failed": f"logits or gradients differ by more than {limit}"}
    times = take_turns(lambda: loss_of(model, tokens).backward(), args.seconds)
    return row | {"training_step_ms": summary(times)}


@torch.inference_mode()
def inference(name: str, args: argparse.Namespace, tokens: Tensor) -> dict[str, Any]:
    """A long prompt, and generation of 32 tokens one at a time after a short one."""
    model, prompt = make_model(name, args.dtype).eval(), tokens[:1, :32]
    texts = []
    for kind in KINDS:
        with kernels(kind):
            texts.append(generate(model, prompt, 16))
    prefill = take_turns(lambda: model(tokens, use_cache=False), args.seconds / 3)
    first = take_turns(lambda: generate(model, prompt, 1), args.seconds / 3)
    whole = take_turns(lambda: generate(model, prompt, 33), args.seconds)
    per_token = {k: [(x - statistics.median(first[k])) / 32 for x in whole[k]] for k in KINDS}
    return {
        "same_text": bool(torch.equal(*texts)),
        "prefill_ms": summary(prefill),
        "decoding_ms_per_token": summary(per_token),
    }


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model."""
    tokens = make_tokens(*args.shape)
    row: dict[str, Any] = {"model": name, "dtype": args.dtype, "shape": list(args.shape)}
    row |= training(name, args, tokens)
    if "failed" in row:
        return row
    row |= inference(name, args, tokens)
    if args.steps:
        curves = [losses(name, args.dtype, kind, args.steps, tokens) for kind in KINDS]
        row["losses"] = dict(zip(KINDS, ([round(x, 5) for x in c] for c in curves), strict=True))
        row["largest_loss_difference"] = max(abs(x - y) for x, y in zip(*curves, strict=True))
    memory = {kind: peak_in_a_process(name, kind, args) for kind in KINDS}
    peaks = [memory[kind]["peak"] for kind in KINDS]
    return row | {"memory_mb": memory, "memory_ratio": round(peaks[1] / peaks[0], 3)}


def summary(times: dict[str, list[float]]) -> dict[str, float]:
    """Median of each kind, how many times faster ours is, and the number of calls."""
    without, ours = (statistics.median(times[kind]) for kind in KINDS)
    return {
        "without": round(without, 2),
        "with": round(ours, 2),
        "times_faster": round(without / ours, 2),
        "calls": len(times[KINDS[0]]),
    }


def peak_in_a_process(name: str, kind: str, args: argparse.Namespace) -> dict[str, float]:
    """What ``peak_of`` says in a process of its own."""
    shape = "x".join(map(str, args.shape))
    command = [sys.executable, __file__, name, "--dtype", args.dtype, "--shape", shape]
    output = subprocess.run([*command, "--peak", kind], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
    return result


def parse_shape(text: str) -> tuple[int, int]:
    """``BxT`` as two numbers."""
    batch, steps = map(int, text.split("x"))
    return batch, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--shape", type=parse_shape, default=(1, 1024), help="batch x tokens")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--seconds", type=float, default=30, help="time for each comparison")
    parser.add_argument("--steps", type=int, default=50, help="steps of the loss curves; 0: none")
    parser.add_argument("--json", type=Path, default=RESULTS, help="results, with earlier ones")
    parser.add_argument("--peak", choices=KINDS, help=argparse.SUPPRESS)
    add_force(parser)
    args = parser.parse_args()
    unknown = set(args.models) - MODELS.keys()
    if unknown:
        parser.error(f"MODEL must be one of {', '.join(MODELS)}; got {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    if args.peak:
        [name] = args.models
        print(json.dumps(peak_of(name, args.dtype, args.peak, args.shape)))
        return
    check_results(parser, args, args.json, option="--json")
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    for name in args.models or MODELS:
        row = measure(name, args)
        print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)
        keys = ("model", "dtype", "shape")
        rows = [r for r in rows if any(r[k] != row[k] for k in keys)] + [row]
        result = {"machine": describe_machine() | {"transformers": transformers.__version__}}
        args.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
