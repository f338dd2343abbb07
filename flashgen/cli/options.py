"""Options that several commands share."""

from __future__ import annotations

import typing
from pathlib import Path

import typer

DEFAULT_SEQLENS = "512,1024,2048,4096,8192,16384"

Model = typing.Annotated[
    Path | None,
    typer.Option("--model", metavar="CONFIG.json|DIR", help="Problems of a Hugging Face model, from its config.json."),
]
Preset = typing.Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="A named list of problems: quick, llama3-8b, grid, features, variants, prefill, small, more; with "
        "gradients: backward, training; of decoding: decode.",
    ),
]
Shapes = typing.Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="TEXT",
        help='A problem, e.g. "b=4 hq=32 hkv=8 s=4096 d=128 causal bf16"; repeatable. Masks: causal, '
        "sliding_window(127,0), prefix_lm(1024), causal&document, ...; features: softcap, alibi, varlen, ...; "
        "deterministic gradients: deterministic.",
    ),
]
Phase = typing.Annotated[
    str | None,
    typer.Option(
        "--phase",
        metavar="LIST",
        help="forward, backward, decode, or several: forward,backward is a training step, whose forward also writes "
        "lse. A --shape that names its phase keeps it. Default: what a problem says, and forward where it says "
        "nothing; of a --model forward,decode.",
    ),
]
Seqlens = typing.Annotated[
    str, typer.Option("--seqlen", metavar="LIST", help="Sequence lengths for --model, separated by commas.")
]
Device = typing.Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cuda:0 or cpu; default: the first GPU, if any.")
]
Devices = typing.Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="LIST",
        help="cuda:0, several GPUs of one kind such as cuda:0,cuda:1, all, or cpu; default: the first GPU, if any.",
    ),
]
Target = typing.Annotated[
    str | None,
    typer.Option("--target", metavar="NAME", help="A GPU by name, e.g. sm_90, H200 or gfx942; it need not be here."),
]
Registry = typing.Annotated[
    Path | None, typer.Option("--registry", metavar="PATH", help="A registry file or folder to search first.")
]
Config = typing.Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="TEXT",
        help='This config, e.g. "block_m=128 block_n=64 num_warps=8 num_stages=2"; for problems of one phase.',
    ),
]
Json = typing.Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
