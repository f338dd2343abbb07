"""The rendered kernels that are kept as golden files: every structure that a template can take."""

from __future__ import annotations

import dataclasses
import itertools

from flashgen.codegen import RenderedKernel, TritonForwardConfig, render
from flashgen.codegen.config import Loads
from flashgen.spec import AttentionSpec, DType, causal, full
from flashgen.spec.masks import Mask

_MASKS: dict[str, Mask] = {"full": full(), "causal": causal(), "causal_top_left": causal("top_left")}
_LOADS: tuple[Loads, ...] = ("pointer", "descriptor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    spec: AttentionSpec
    config: TritonForwardConfig

    @property
    def rendered(self) -> RenderedKernel:
        return render(self.spec, self.config)


def _case(mask_name: str, loads: Loads, lse: bool) -> Case:
    return Case(
        name=f"forward_{mask_name}_{loads}" + ("_lse" if lse else ""),
        spec=AttentionSpec(dtype=DType.BF16, head_dim_qk=128, head_dim_v=128, mask=_MASKS[mask_name], lse=lse),
        config=TritonForwardConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, loads=loads),
    )


CASES = tuple(itertools.starmap(_case, itertools.product(_MASKS, _LOADS, (False, True))))
