"""Generate greedily with a Llama-shaped model over a paged cache, check every token, and compare tokens per second.

    python examples/llama_generation.py                             # a tiny model: seconds, on a CPU too
    python examples/llama_generation.py --size 8b-shard --batch 16 --prompt 4096 --tokens 128 --json generation.json

What it shows: `flashgen.attention_with_kvcache` as the whole attention of a decoder. One call a layer rotates the query
and the new key, writes key and value into the pages of their sequence and attends over all that it holds, prompts of
different lengths beside each other. Lengths and pages are known on the device alone, so one CUDA graph of a step serves
every step. Pages come from a free list and go back to it (W. Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention", 2023, arXiv:2309.06180).

First, in float32, all runs must give the very tokens that attention written out in PyTorch gives over a dense cache.
Equal tokens say something as long as rounding cannot flip a choice by itself: the gap between the best two logits is
printed beside the largest difference of the best one. Then, in bfloat16 on a GPU, tokens per second of the decoding
steps, with a CUDA graph and without, beside PyTorch's SDPA over a dense cache that is just as long as it must be.

The model is Llama 3's (RMSNorm, rotary positions, grouped-query attention, SwiGLU) with random weights. `8b-shard` is
what one of four GPUs holds of an 8B model under tensor parallelism, without the communication. flashgen runs what its
registry has; for its best speed, tune first:

    flashgen tune --shape "b=16 hq=8 hkv=2 sq=1 sk=4096 d=128 full bf16" --phase decode
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from llama_model import CACHES, SIZES, Cache, EagerCache, Llama, Settings, Size

import flashgen

WARMUP_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What one run gave: `tokens` int64 [batch, tokens], `best` the two best logits of each, float32 [..., 2]."""

    tokens: torch.Tensor
    best: torch.Tensor
    tokens_per_s: float


class Decoder:
    """A batch of sequences; what a step reads and writes stays where it is, so that a CUDA graph can hold the step."""

    def __init__(self, model: Llama, cache: Cache, prompts: Sequence[torch.Tensor], chunk: int) -> None:
        self.model, self.cache, self.prompts, self.chunk = model, cache, prompts, chunk
        self.ids = torch.zeros(len(prompts), 1, dtype=torch.int64, device=cache.device)
        self.logits = torch.zeros(len(prompts), model.size.vocabulary, dtype=cache.dtype, device=cache.device)

    def prefill(self) -> None:
        """Start over: read every prompt, a chunk at a time, and choose its first token."""
        self.cache.clear()
        for sequence, prompt in enumerate(self.prompts):
            alone = slice(sequence, sequence + 1)
            for start in range(0, len(prompt), self.chunk):
                ids = prompt[start : start + self.chunk]
                self.cache.reserve(sequence, start + len(ids))
                self.logits[alone] = self.model(ids[None], self.cache, alone)
        self.choose()

    def step(self) -> None:
        """Append the chosen token of every sequence, and choose the next."""
        self.logits.copy_(self.model(self.ids, self.cache, slice(None)))
        self.choose()

    def choose(self) -> None:
        """Take the best token of every sequence."""
        self.ids.copy_(self.logits.argmax(dim=-1, keepdim=True))

    def run(self, step: Callable[[], None], count: int) -> Iterator[int]:
        """Take `count` steps, with room for each, and yield the number of each when it is under way."""
        for number in range(count):
            for sequence, prompt in enumerate(self.prompts):
                self.cache.reserve(sequence, len(prompt) + number + 1)
            step()
            yield number


@torch.no_grad()
def generate(decoder: Decoder, tokens: int, *, graph: bool, watch: bool) -> Generation:
    """Return what greedy decoding gives, `graph` with the step as a CUDA graph; the best logits only where watched."""
    on_gpu = decoder.cache.device.type == "cuda"
    # The first steps compile kernels and fill caches.
    decoder.prefill()
    warmup = min(WARMUP_STEPS, tokens - 1)
    for _ in decoder.run(decoder.step, warmup):
        pass
    step = captured(decoder.step) if graph else decoder.step

    decoder.prefill()
    ids = torch.zeros(len(decoder.prompts), tokens, dtype=torch.int64, device=decoder.ids.device)
    best = torch.zeros(*ids.shape, 2, device=ids.device)
    ids[:, :1] = decoder.ids
    best[:, 0] = decoder.logits.topk(2).values
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for number in decoder.run(step, tokens - 1):
        ids[:, number + 1] = decoder.ids[:, 0]
        if watch:
            best[:, number + 1] = decoder.logits.topk(2).values
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Generation(tokens=ids, best=best, tokens_per_s=ids.shape[0] * (tokens - 1) / seconds)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return what replays a CUDA graph of the step."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def make_model(size: Size, settings: Settings, dtype: torch.dtype) -> Llama:
    """Return the model with the weights that the seed gives."""
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        return Llama(size).to(dtype).requires_grad_(False)


def make_prompts(size: Size, settings: Settings) -> list[torch.Tensor]:
    """Return random prompts, the first of full length and the others down to a quarter of it."""
    chance = torch.Generator().manual_seed(settings.seed)
    lengths = torch.randint(max(1, settings.prompt // 4), settings.prompt + 1, (settings.batch,), generator=chance)
    lengths[0] = settings.prompt
    return [
        torch.randint(size.vocabulary, (length,), generator=chance).to(settings.device) for length in lengths.tolist()
    ]


def run_each(
    model: Llama, settings: Settings, caches: dict[str, type[Cache]], graphs: Sequence[bool], *, watch: bool
) -> dict[str, Generation]:
    """Return what each kind of cache gives, with and without a CUDA graph as `graphs` says."""
    prompts = make_prompts(model.size, settings)
    found = {}
    for name, cache_type in caches.items():
        decoder = Decoder(model, cache_type(model.size, settings, model.dtype), prompts, settings.chunk)
        for graph in graphs:
            label = f"{name}, graph" if graph else name
            found[label] = generate(decoder, settings.tokens, graph=graph, watch=watch)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """A run beside eager attention.

    Attributes:
        first_difference: where the tokens differ first, [sequence, step], or None.
        margin_there: how far apart eager attention's best two logits are there.
        logit_difference: how far the best logits differ at most. After a token that differs, logits are of other texts:
            only those before it count.
    """

    first_difference: list[int] | None
    margin_there: float | None
    logit_difference: float


def compare(run: Generation, eager: Generation) -> Agreement:
    """Return how a run agrees with eager attention."""
    same = (run.tokens == eager.tokens).cumprod(dim=1).bool()
    gaps = (run.best - eager.best)[..., 0].abs()[same]
    margins = eager.best[..., 0] - eager.best[..., 1]
    first = next(iter((~same).nonzero().tolist()), None)
    return Agreement(
        first_difference=first,
        margin_there=None if first is None else float(margins[first[0], first[1]]),
        logit_difference=float(gaps.max()) if len(gaps) else 0.0,
    )


def speed_table(runs: dict[str, Generation]) -> str:
    """Return tokens per second as aligned plain text, one run a row."""
    rows = [["decoding", "tokens/s", "x sdpa"]]
    for name, run in runs.items():
        sdpa = runs.get(name.replace("flashgen", "sdpa"))
        ratio = "-" if sdpa is None else f"{run.tokens_per_s / sdpa.tokens_per_s:.2f}"
        rows.append([name, f"{run.tokens_per_s:.0f}", ratio])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[Size, Settings, list[str], Path | None]:
    """Return the size, what all runs share, the caches to compare, and where to write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--attention", default=",".join(CACHES), help="which to run beside eager, separated by commas")
    parser.add_argument("--size", default="tiny", choices=SIZES, help="what follows replaces a number of it")
    fields = [field.name for field in dataclasses.fields(Size)]
    for name in fields:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--prompt", type=int, default=48, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate for each sequence")
    parser.add_argument("--chunk", type=int, default=256, help="most tokens of a prompt that are read at once")
    parser.add_argument("--page-size", type=int, default=16, help="tokens a page")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and the order of pages")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, results and all tokens here")
    values = vars(parser.parse_args(arguments))
    names = list(dict.fromkeys(values.pop("attention").split(",")))
    if unknown := [name for name in names if name not in CACHES]:
        parser.error(f"--attention: got {', '.join(map(repr, unknown))}; allowed: {', '.join(CACHES)}")
    size = dataclasses.replace(
        SIZES[values.pop("size")], **{name: values.pop(name) for name in fields if name in values}
    )
    json_path = values.pop("json")
    settings = Settings(**values)
    if settings.tokens < 2 or min(settings.batch, settings.prompt, settings.chunk, settings.page_size) < 1:
        parser.error("--tokens must be at least 2, and --batch, --prompt, --chunk and --page-size at least 1")
    if size.heads % size.kv_heads:
        parser.error(f"--heads must be a multiple of --kv-heads, got {size.heads} and {size.kv_heads}")
    return size, settings, names, json_path


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate with each attention asked for, check the tokens, and print how fast the runs are.

    Raises:
        SystemExit: if a token differs from eager attention's.
    """
    size, settings, names, json_path = parse_arguments(arguments)
    device = torch.device(settings.device)
    caches = {name: CACHES[name] for name in names}
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{machine}, torch {torch.__version__}, flashgen {flashgen.__version__}")
    lengths = [len(prompt) for prompt in make_prompts(size, settings)]
    print(
        f"{settings.batch} sequences, prompts of {min(lengths)} to {max(lengths)} tokens, {settings.tokens} more each"
    )

    graphs = (False, True) if device.type == "cuda" else (False,)
    model = make_model(size, settings, torch.float32)
    eager = run_each(model, settings, {"eager": EagerCache}, (False,), watch=True)["eager"]
    runs = run_each(model, settings, caches, graphs, watch=True)
    agreements = {name: compare(run, eager) for name, run in runs.items()}
    margin = float((eager.best[..., 0] - eager.best[..., 1]).min())
    print(f"float32: the best two logits of eager attention are at least {margin:.1e} apart")
    for name, agreement in agreements.items():
        first = agreement.first_difference
        said = f"all {eager.tokens.numel()} tokens equal eager's"
        if first is not None:
            said = f"differs first at {first}, where eager's best two are {agreement.margin_there:.1e} apart"
        print(f"{name}: {said}; the best logit by at most {agreement.logit_difference:.1e}", flush=True)

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    speeds = run_each(model.to(dtype), settings, caches, graphs, watch=False)
    print(f"\n{str(dtype).removeprefix('torch.')}:\n{speed_table(speeds)}")
    if json_path is not None:
        record = {
            "size": dataclasses.asdict(size),
            "settings": dataclasses.asdict(settings),
            "machine": machine,
            "torch": torch.__version__,
            "flashgen": flashgen.__version__,
            "margin": margin,
            "agreements": {name: dataclasses.asdict(each) for name, each in agreements.items()},
            "tokens": {name: run.tokens.tolist() for name, run in {"eager": eager, **runs}.items()},
            "speed_dtype": str(dtype),
            "tokens_per_s": {name: run.tokens_per_s for name, run in speeds.items()},
        }
        json_path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if wrong := [name for name, agreement in agreements.items() if agreement.first_difference is not None]:
        raise SystemExit(f"tokens differ from eager attention's: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
