"""What the worker processes run, by name, and how long each may take: the seam where faults are planted in tests."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jobs:
    """Functions as `module:function`, imported by the workers alone.

    Attributes:
        compile: as `flashgen.compile.compile_job`.
        start: as `gpu_jobs.start`; run once in each measuring process.
        stand_by: as `gpu_jobs.stand_by`; run in the process that takes the place of a measuring process that dies.
        evaluate: as `gpu_jobs.evaluate`.
        race: as `gpu_jobs.race`.
        confirm: as `gpu_jobs.confirm`.
        interpret: as `cpu_jobs.check_interpreted`.
        compile_timeout_s: after which a compiling process is killed; likewise the others.
        first_evaluate_timeout_s: of the first candidate in a measuring process, which also makes the references.
        evaluate_timeout_s: of the others.
        race_timeout_s: of the final comparison, and of `confirm`.
        interpret_timeout_s: of one check in the interpreter.
        idle_s: how long a run that has nothing else to do waits for what another machine claimed.
    """

    compile: str = "flashgen.compile:compile_job"
    start: str = "flashgen.tuning.gpu_jobs:start"
    stand_by: str = "flashgen.tuning.gpu_jobs:stand_by"
    evaluate: str = "flashgen.tuning.gpu_jobs:evaluate"
    race: str = "flashgen.tuning.gpu_jobs:race"
    confirm: str = "flashgen.tuning.gpu_jobs:confirm"
    interpret: str = "flashgen.tuning.cpu_jobs:check_interpreted"
    compile_timeout_s: float = 60.0
    first_evaluate_timeout_s: float = 30.0
    evaluate_timeout_s: float = 10.0
    race_timeout_s: float = 90.0
    interpret_timeout_s: float = 60.0
    idle_s: float = 30.0

    @property
    def lost_s(self) -> float:
        """After this long another machine's trial is given up: twice what a candidate may take, and a queue of them."""
        return 2 * (self.compile_timeout_s + self.first_evaluate_timeout_s) + 3 * self.evaluate_timeout_s
