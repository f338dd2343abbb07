"""Train GPT-2 small three times, with nothing but its attention changed, and compare speed, memory and loss.

    python examples/gpt2_training.py                       # one GPU; a minute and a half on an H200
    python examples/gpt2_training.py --attention flashgen,eager --json curves.json
    python examples/gpt2_training.py --device cpu --steps 20 --attention flashgen,eager \
        --layers 2 --heads 2 --width 64 --context 64 --batch 2 --vocabulary 256

What it shows: the same weights, the same batches and the same optimiser give the same loss curve within rounding noise
with `flashgen.attention` as with attention written out in PyTorch, in less time and memory. FlashAttention (Dao et al.
2022, arXiv:2205.14135) claims 3x in end-to-end training of GPT-2 at context 1K over implementations of the latter kind,
Hugging Face's and Megatron's, on the GPUs of its day; the column `x eager` is that ratio here. cuDNN's fused attention,
through PyTorch, is the third run: the fast yardstick, and how far two exact attentions differ by rounding alone.

The model is GPT-2 small, 124M parameters: 12 layers, 12 heads, width 768, context 1024; bfloat16 autocast on a GPU,
float32 on a CPU. The text is the source of Python's standard library, one token a byte. The vocabulary is padded from
256 to 50304 (GPT-2's 50257, up to a multiple of 64) so that the output layer costs what GPT-2's does; with
`--vocabulary 256` the model has 86M parameters and the share of attention is larger. There is no dropout, which spares
the eager run further passes over the scores. flashgen runs what its registry has; for its best speed, tune first:

    flashgen tune --shape "b=16 hq=12 hkv=12 sq=1024 sk=1024 d=64 causal bf16" --phase forward,backward
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashgen

# Takes q, k and v, each [batch, heads, context, head_dim], and returns the same shape.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def flashgen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return causal attention by flashgen's kernels."""
    return flashgen.attention(q, k, v, causal=True)


def eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return causal attention as GPT-2's own code computes it: every head's [context, context] scores in memory."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(dim=-1).to(v.dtype) @ v


def cudnn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return causal attention by cuDNN's fused kernels."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


ATTENTIONS: dict[str, Attention] = {
    "flashgen": flashgen_attention,
    "eager": eager_attention,
    "cudnn": cudnn_attention,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs share."""

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int
    batch: int
    steps: int
    learning_rate: float
    seed: int
    device: str
    compile: bool


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run gave: `losses` holds one per step; `peak_gib` is None where PyTorch does not count memory."""

    attention: str
    tokens_per_s: float
    peak_gib: float | None
    losses: list[float]


class Block(nn.Module):
    """One pre-LayerNorm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, settings: Settings, attention: Attention) -> None:
        super().__init__()
        width = settings.width
        self.heads, self.attention = settings.heads, attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, [batch, context, width] like x."""
        batch, context, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = self.attention(q, k, v)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, context, width))
        x = x + self.contract(F.gelu(self.expand(self.norm2(x)), approximate="tanh"))
        return x


class GPT2(nn.Module):
    """GPT-2 with learned positions and the token embedding tied to the output layer."""

    def __init__(self, settings: Settings, attention: Attention) -> None:
        super().__init__()
        self.tokens = nn.Embedding(settings.vocabulary, settings.width)
        self.positions = nn.Embedding(settings.context, settings.width)
        self.blocks = nn.ModuleList(Block(settings, attention) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The residual stream adds two outputs per layer; their weights are scaled to keep its variance.
                residual = name.endswith(("project.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * settings.layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy in nats of `targets` after `ids`, both int64 [batch, context]."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load_text() -> bytes:
    """Return the top-level modules of Python's standard library, in the order of their names: about 5 MB."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def make_optimizer(model: GPT2, settings: Settings) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves biases and norms alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at a step counted from 0: linear to 1, then a cosine down to 0.1."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def train(name: str, settings: Settings, text: torch.Tensor) -> Run:
    """Return what training from scratch with the named attention gives; seeds alone decide weights and batches."""
    device = torch.device(settings.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        # The model of the run before may hang in a reference cycle, and would count as memory of this one.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch.compiler.reset()
    torch.manual_seed(settings.seed)
    model = GPT2(settings, ATTENTIONS[name]).to(device)
    optimizer = make_optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings.steps))
    loss_of = torch.compile(model) if settings.compile else model

    batches = torch.Generator().manual_seed(settings.seed)
    window = torch.arange(settings.context + 1, device=device)
    losses: list[float] = []
    seconds: list[float] = []
    for _ in range(settings.steps):
        start = time.perf_counter()
        offsets = torch.randint(len(text) - settings.context, (settings.batch, 1), generator=batches)
        crops = text[offsets.to(device) + window].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = loss_of(crops[:, :-1], crops[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        # Reading the loss waits for the whole step, so the clock needs no other synchronisation.
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)

    # The first steps compile kernels and fill caches.
    timed = seconds[min(10, settings.steps // 2) :]
    return Run(
        attention=name,
        tokens_per_s=settings.batch * settings.context / median(timed),
        peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        losses=losses,
    )


def largest_difference(first: Run, second: Run) -> float:
    """Return the largest distance between two loss curves, each a moving average over 10 steps."""
    gaps = [a - b for a, b in zip(first.losses, second.losses, strict=True)]
    width = min(10, len(gaps))
    return max(abs(fmean(gaps[end - width : end])) for end in range(width, len(gaps) + 1))


def table(runs: Sequence[Run]) -> str:
    """Return the runs as aligned plain text, one a row."""
    eager = next((run.tokens_per_s for run in runs if run.attention == "eager"), None)
    steps = len(runs[0].losses)
    marks = sorted({max(1, steps * quarter // 4) for quarter in range(5)})
    rows = [["attention", "tokens/s", "x eager", "peak GiB", *(f"loss at {mark}" for mark in marks), "last 10"]]
    for run in runs:
        ratio = "-" if eager is None else f"{run.tokens_per_s / eager:.2f}"
        peak = "-" if run.peak_gib is None else f"{run.peak_gib:.1f}"
        losses = [run.losses[mark - 1] for mark in marks] + [fmean(run.losses[-10:])]
        rows.append([run.attention, f"{run.tokens_per_s:.0f}", ratio, peak, *(f"{loss:.4f}" for loss in losses)])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[list[str], Settings, Path | None]:
    """Return the attentions to train with, the settings they share, and where to write the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--attention", default=",".join(ATTENTIONS), help="which to train with, separated by commas")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--context", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50304, help="at least 256; the rest is padding")
    parser.add_argument("--learning-rate", type=float, default=6e-4, help="at its peak")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, results and whole loss curves here")
    values = vars(parser.parse_args(arguments))
    # In the order given, each once.
    names = list(dict.fromkeys(values.pop("attention").split(",")))
    if unknown := [name for name in names if name not in ATTENTIONS]:
        parser.error(f"--attention: got {', '.join(map(repr, unknown))}; allowed: {', '.join(ATTENTIONS)}")
    json_path = values.pop("json")
    settings = Settings(**values)
    if settings.vocabulary < 256 or settings.width % settings.heads or settings.steps < 1:
        parser.error("--vocabulary must be at least 256, --width a multiple of --heads, and --steps at least 1")
    return names, settings, json_path


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once with each attention asked for and print how the runs compare."""
    names, settings, json_path = parse_arguments(arguments)
    device = torch.device(settings.device)
    if "cudnn" in names and device.type != "cuda":
        print(f"cudnn: skipped, cuDNN's attention needs a CUDA device and --device is {device}")
        names.remove("cudnn")
    if not names:
        return

    data = load_text()
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    digest = hashlib.sha256(data).hexdigest()[:16]
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{machine}, torch {torch.__version__}, flashgen {flashgen.__version__}")
    print(f"text: standard library of Python {platform.python_version()}, {len(data)} bytes, sha256 {digest}")

    runs: list[Run] = []
    for name in names:
        run = train(name, settings, text)
        print(f"{name}: {settings.steps} steps, loss {run.losses[0]:.4f} to {run.losses[-1]:.4f}", flush=True)
        runs.append(run)

    print(f"\n{table(runs)}\n")
    eager = next((run for run in runs if run.attention == "eager"), None)
    differences = {run.attention: largest_difference(run, eager) for run in runs if eager and run is not eager}
    for name, difference in differences.items():
        print(f"largest difference of {name}'s loss from eager's (10-step averages): {difference:.4f}")
    if json_path is not None:
        record = {
            "settings": asdict(settings),
            "machine": machine,
            "torch": torch.__version__,
            "flashgen": flashgen.__version__,
            "text_sha256": digest,
            "runs": [asdict(run) for run in runs],
            "differences_from_eager": differences,
        }
        json_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
